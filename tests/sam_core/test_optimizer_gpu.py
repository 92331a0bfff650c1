"""The benchmark for a GPU, as far as a CPU can tell: what it counts, that float16 trains, that it ends without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

import optimizer_gpu
from profiled_calls import count_calls

from sam_core import METHODS

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert optimizer_gpu.main([]) == 0
    assert capsys.readouterr().out == "No CUDA device: nothing was measured.\n"


def test_the_parts_that_need_no_gpu(capsys):
    argv = ["--device", "cpu", "--models", "mobilenet_v3_large", "--repeats", "1", "--steps", "2", "--width", "8"]
    assert optimizer_gpu.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("16777216") or " 4194304" in line] == list(METHODS)
    assert sum(line.startswith("mobilenet_v3_large") for line in lines) >= 3
    assert not any("CUDA graph" in line for line in lines)


def test_operators_within_others_do_not_count():
    x = torch.ones(3, 3)

    def function():
        x.add_(1)
        nn.functional.linear(x, x, x[0])  # 2: x[0] is select, and linear calls addmm and t

    calls = count_calls(function, "cpu")
    assert (calls.operators, calls.launches, calls.copies, calls.waits) == (3, 0, 0, 0)


def test_operators_a_parameter():
    """Of tensors of one dtype: one each for the copy that sam_core keeps, and five in a loop."""

    def operators(num_params: int) -> dict[str, int]:
        params = [nn.Parameter(torch.ones(4)) for _ in range(num_params)]
        for param in params:
            param.grad = torch.ones(4)
        return {name: count_calls(f, "cpu").operators for name, f in optimizer_gpu.ascents(params).items()}

    few, many = operators(3), operators(13)
    growth = {name: (many[name] - few[name]) / 10 for name in few}
    assert growth["loop"] == 5
    assert growth["sam_core"] == 1
    assert growth['sam_core, "ignore"'] == 2  # and the gradients as they are, detached


@pytest.mark.parametrize("method", METHODS)
def test_float16_from_end_to_end(method):
    """The first steps overflow and are skipped, the scale falls and grows again, the loss falls."""
    ran = optimizer_gpu.train_half(method, "cpu", 60, 64)
    assert ran.losses[1] == ran.losses[0]  # skipped
    assert ran.losses[-1] < 0.3 * ran.losses[0]
    falls = sum(after < before for before, after in zip(ran.scales, ran.scales[1:], strict=False))
    assert ran.num_skipped == falls > 0
    assert min(ran.scales) < ran.scales[-1] < ran.scales[0]


@pytest.mark.parametrize("method", optimizer_gpu.CAPTURED)
def test_the_step_that_is_captured(method):
    step = optimizer_gpu.make_step(method, "sgd", optimizer_gpu.make_task("cpu", 16))
    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert not step().requires_grad


@needs_cuda
@pytest.mark.filterwarnings("ignore:.*capturable=True.*:UserWarning")
@pytest.mark.parametrize("base", optimizer_gpu.BASES)
@pytest.mark.parametrize("method", optimizer_gpu.CAPTURED)
def test_a_graph_takes_the_same_steps(method, base):
    *_, difference = optimizer_gpu.compare_graph(method, base, 64, 20)
    assert difference < 1e-4


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_float16_on_the_gpu(method):
    ran = optimizer_gpu.train_half(method, "cuda", 60, 64)
    assert ran.losses[-1] < 0.3 * ran.losses[0]
    assert ran.num_skipped > 0
