"""Two processes in accelerate, Lightning and Hugging Face's Trainer: ranks stay equal, and train as one process does.

trainer_ranks.py runs the cases; here stands what must come out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sam_cases import BASES, METHODS, assert_bitwise, copies, make_model, method_class

pytestmark = pytest.mark.slow

NUM_STEPS, SHARE = 3, 8
TRAINERS = ("accelerate", "accelerate fsdp2", "lightning", "hugging_face")
LOCAL = ("sam", "asam", "memoryefficientsam")
SYNCED = [method for method in METHODS if not method_class(method).takes_sample_losses]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank's trainers made of the weights."""
    folder, here = tmp_path_factory.mktemp("trainers"), Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(here / "trainer_ranks.py"), str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def make_steps() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of both ranks together."""
    generator = torch.Generator().manual_seed(5)
    num = 2 * SHARE * NUM_STEPS
    inputs = torch.randn(num, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (num,), generator=generator)
    return list(zip(inputs.split(2 * SHARE), targets.split(2 * SHARE), strict=True))


def make_optimizer(model: nn.Module, method: str):
    return METHODS[method](model.parameters(), BASES["sgd"][0], **BASES["sgd"][1])


def test_ranks_are_equal_bit_for_bit(ranks):
    assert ranks[0].keys() == ranks[1].keys()
    for key, weights in ranks[0].items():
        assert_bitwise(weights, ranks[1][key])


@pytest.mark.parametrize(
    ("trainer", "method"),
    [
        *((trainer, method) for trainer in TRAINERS for method in SYNCED),
        *(("hugging_face accumulated", method) for method in ("gsam", "looksam", "msam")),
    ],
)
def test_two_ranks_are_one_process_with_the_whole_batch(ranks, trainer, method):
    model = make_model()
    optimizer = make_optimizer(model, method)
    for inputs, targets in make_steps():

        def closure(inputs=inputs, targets=targets):
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    with optimizer.at_weights():
        expected = copies(model)
    for actual, value in zip(ranks[0][trainer, method], expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trainer", ["accelerate", "lightning"])
@pytest.mark.parametrize("method", LOCAL)
def test_local_ascents_are_m_sharpness(ranks, trainer, method):
    """Each rank looks for its own share's worst neighbour: a half in accelerate, every other sample in Lightning."""
    model = make_model()
    optimizer = make_optimizer(model, method)
    for inputs, targets in make_steps():
        halves, alternating = (slice(SHARE), slice(SHARE, None)), (slice(0, None, 2), slice(1, None, 2))

        def make(part, inputs=inputs, targets=targets):
            def closure():
                loss = cross_entropy(model(inputs[part]), targets[part]) / 2
                loss.backward()
                return loss

            return closure

        optimizer.step_m_sharpness([make(part) for part in (halves if trainer == "accelerate" else alternating)])
    for actual, value in zip(ranks[0][f"{trainer} local", method], copies(model), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-12)
    assert not torch.equal(ranks[0][f"{trainer} local", method][0], ranks[0][trainer, method][0])
