"""Every method under FSDP2 against one process on the same global batch: two ranks, and four as 2 x 2."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import sam_core
from fsdp_cases import (
    CASES,
    FSDP2,
    HSDP_CASES,
    NUM_STEPS,
    TENSOR_PARALLEL_CASES,
    make_batch,
    make_net,
    train,
    train_normed,
)
from fsdp_ranks import PASSES
from sam_cases import METHODS, method_class
from sam_core import _tensors

pytestmark = pytest.mark.slow
RANKS = Path(__file__).with_name("fsdp_ranks.py")
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}  # float64; sums over shards have another order
ALONE = ("plain", "clipped", "reloaded", "m_sharpness")  # variants that make a difference in one process as well

# Of two FSDP units: the root is gathered once a pass and kept for its backward, the block twice; both are reduced.
PLAIN_PASS = {"_allgather_base_": 3, "_reduce_scatter_base_": 2}
#: Numbers that are summed over the ranks in one step: a norm a pass, and what the method asks for.
NUM_SUMS = dict.fromkeys(METHODS, 2) | {
    "asam": 3,  # and ||T g||
    "friendlysam": 3,  # and ||g - sigma m||
    "momentumsam": 3,  # and ||m||
    "efficientsam": 3,  # and ||g|| of the drawn weights
    "gsam": 4,  # and two products
    "looksam": 5,  # and two products, and ||g_v||
}


def launch(num_ranks: int, directory: Path) -> list[dict]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *command, str(directory)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return launch(4, tmp_path_factory.mktemp("four_ranks"))


@cache
def truth(method: str, base: str, variant: str) -> dict:
    return train(method, base, variant)


def assert_like_one_process(ranks: list[dict], method: str, base: str, variant: str) -> None:
    expected = truth(method, base, variant if variant in ALONE else "plain")
    for results in ranks:
        actual = results["train"][method, base, variant]
        torch.testing.assert_close(actual["weights"], expected["weights"], **TOLERANCE)
        torch.testing.assert_close(actual["norms"], expected["norms"], **TOLERANCE)
        torch.testing.assert_close(
            actual["weights"], ranks[0]["train"][method, base, variant]["weights"], rtol=0, atol=0
        )


def test_every_method_has_a_word_on_fsdp2():
    assert FSDP2.keys() == METHODS.keys()


@pytest.mark.parametrize(("method", "base", "variant"), CASES, ids=map("-".join, CASES))
def test_weights_and_norms_are_those_of_one_process(ranks, method, base, variant):
    assert_like_one_process(ranks, method, base, variant)


@pytest.mark.parametrize(("method", "base", "variant"), HSDP_CASES, ids=map("-".join, HSDP_CASES))
def test_replicated_shards_are_counted_once(four_ranks, method, base, variant):
    assert_like_one_process(four_ranks, method, base, variant)


@pytest.mark.parametrize(("method", "base", "variant"), TENSOR_PARALLEL_CASES, ids=map("-".join, TENSOR_PARALLEL_CASES))
def test_shards_of_tensor_parallel_layers(four_ranks, method, base, variant):
    assert_like_one_process(four_ranks, method, base, variant)


def test_the_cases_differ():
    """So that equality above means something: methods, bases and variants move the weights differently."""
    ends = {
        case: torch.cat([p.flatten() for p in truth(*case)["weights"][-1]])
        for case in CASES
        if case[2] in ALONE and case[0] != "memoryefficientsam"  # SAM to the last bit
    }
    flat = list(ends.values())
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(flat) for b in flat[:i])


@pytest.mark.parametrize("method", METHODS)
def test_collectives_of_a_step(ranks, method):
    """Two passes of FSDP2's own, and sums of single numbers."""
    num_passes = 1 if method == "msam" else 2
    expected = {name: num_passes * number for name, number in PLAIN_PASS.items()}
    if method == "efficientsam":
        expected["_allgather_base_"] += 1  # the block in the forward that chooses; the root stays gathered after it
    assert ranks[0]["counts"][method] == {**expected, "allreduce_": NUM_SUMS[method], "largest": 1}


@pytest.mark.parametrize(("method", "bad_pass"), PASSES)
def test_a_bad_gradient_on_one_rank_stops_all_ranks(ranks, method, bad_pass):
    for results in ranks:
        skip = results["skips"][method, bad_pass]
        assert skip["skipped"] == 1
        assert skip["same"]
        assert skip["message"].startswith("the gradient of parameter 0 with shape [4, 5] is not finite at w")
        assert skip["message"] == ranks[0]["skips"][method, bad_pass]["message"]


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_scaler_hears_of_an_overflow_in_a_shard_of_another_rank(ranks, bad_pass):
    for results in ranks:
        assert results["overflows"][bad_pass] == {"scale": 512.0, "skipped": 1, "same": True}


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_has_no_ascent_gradient_of_its_own(ranks, method):
    """Methods that would take one are told so; the others do not enter the context."""
    takes_one = getattr(method_class(method), "local_ascent", False)
    for results in ranks:
        assert ("ascent_context must be None for DTensors" in results["refusals"][method]) == takes_one


@pytest.mark.parametrize("method", ["sam", "memoryefficientsam"])
def test_batch_normalisation_and_checkpointed_activations(ranks, method):
    expected = train_normed("sam")
    for results in ranks:
        torch.testing.assert_close(results["normed"][method]["weights"], expected["weights"], **TOLERANCE)
        assert results["normed"][method]["num_batches"] == NUM_STEPS


def test_norms_and_products_of_every_placement(ranks):
    for results in ranks:
        for actual, expected in results["arithmetic"]["pairs"]:
            assert actual.dtype == expected.dtype
            rtol = 2**-7 if expected.dtype == torch.bfloat16 else 1e-5 if expected.dtype == torch.float32 else 1e-12
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)
        assert not results["arithmetic"]["bad"].isfinite()


def test_half_weights_are_perturbed_in_their_float32_shards(ranks):
    """Against bfloat16 copies of float32 weights by hand; their rounding may fall otherwise: 2^-8 of a step of 0.01."""
    model = make_net().float()
    optimizer = sam_core.SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01)
    for step in range(NUM_STEPS):

        def closure(step=step):
            names, params = zip(*model.named_parameters(), strict=True)
            for rank in range(2):
                copies = [p.detach().bfloat16().requires_grad_(p.requires_grad) for p in params]
                inputs, targets = make_batch(step, rank)
                outputs = torch.func.functional_call(model, dict(zip(names, copies, strict=True)), inputs.bfloat16())
                nn.functional.mse_loss(outputs.float(), targets.float()).backward()
                for param, half in zip(params, copies, strict=True):
                    if half.grad is not None:
                        part = half.grad.float() / 2
                        param.grad = part if param.grad is None else param.grad + part

        optimizer.step(closure)
    for results in ranks:
        torch.testing.assert_close(
            results["half"]["weights"], [p.detach() for p in model.parameters()], rtol=0, atol=0.01 / 2**8 * NUM_STEPS
        )
        assert results["half"]["radii"][0::2] == [0.0] * NUM_STEPS
        torch.testing.assert_close(results["half"]["radii"][1::2], [0.1] * NUM_STEPS, rtol=1e-5, atol=0)
    start = [p.detach() for p in make_net().float().parameters()]
    ends = [w - s for w, s in zip(ranks[0]["half"]["weights"], start, strict=True)]
    assert _tensors.norm(ends) > 0.05
