"""Estimates against 2 and 4 gloo processes; and one process that stands for many calls exactly what they call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import planning_ranks
from planning_ranks import BUCKET_BYTES, COUNTED
from sam_core.planning import METHOD_NAMES, Collective, estimate_communication, estimate_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

from simulated_ranks import simulated_ranks
from small_models import K, LanguageModel

pytestmark = pytest.mark.slow
SHARDINGS = ("ddp", "fsdp")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each rank saw."""
    folder = tmp_path_factory.mktemp(f"planning{request.param}")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    done = subprocess.run(
        [sys.executable, *command, planning_ranks.__file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def sizes(shape):
    model = LanguageModel(**shape)
    units = {"unit_params": model.unit_params, "root_params": model.root_params}
    return sum(p.numel() for p in model.parameters()), units


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_communication(ranks, method, sharding):
    """Real collectives: those of the estimate, the same on all ranks, and call by call those of a simulated rank."""
    case = f"{method} {sharding}"
    calls = [Collective(*call) for call in ranks[0]["collectives"][case]]
    assert all(rank["collectives"][case] == ranks[0]["collectives"][case] for rank in ranks)
    with simulated_ranks(len(ranks)):
        assert [Collective(*call) for call in planning_ranks.count(method, sharding)[0]] == calls

    num_params, units = sizes(COUNTED)
    estimate = estimate_communication(
        num_params,
        method,
        sharding=sharding,
        num_ranks=len(ranks),
        num_units=COUNTED["depth"],
        root_params=units["root_params"],
        bucket_bytes=BUCKET_BYTES,
        k=K,
    )
    large = [call for call in calls if call.num_bytes > 8]
    assert len(large) / K == pytest.approx(estimate.num_collectives)
    assert (len(calls) - len(large)) / K == pytest.approx(estimate.num_scalars)
    assert sum(call.bytes_sent(len(ranks)) for call in large) / K == pytest.approx(estimate.bytes_sent)


def test_a_local_ascent_is_silent(ranks):
    """SAM all-reduces its gradients once a step, as plain training does; synchronised, twice."""
    collectives = ranks[0]["collectives"]
    assert collectives["sam ddp"] == collectives["base ddp"]
    assert len(collectives["sam synchronised"]) == 2 * len(collectives["base ddp"])


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("method", [method for method in METHOD_NAMES if method != "base"])
def test_bytes_that_a_rank_holds(ranks, method, sharding):
    num_params, units = sizes(COUNTED)
    estimate = estimate_memory(num_params, method, sharding=sharding, num_ranks=len(ranks), k=K, **units)
    for rank in ranks:
        assert rank["held"][f"{method} {sharding}"] == {
            name: getattr(estimate, name) for name in ("parameters", "base_state", "method_state")
        }
