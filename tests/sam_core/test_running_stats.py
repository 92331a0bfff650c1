"""BatchNorm's running statistics: exactly those of the clean passes, each layer's own settings kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_cases import assert_bitwise
from sam_core import SAM, disable_running_stats, enable_running_stats, frozen_running_stats


class HandMadeNorm(nn.Module):
    """Not a torch BatchNorm, and counts and averages in its own way."""

    def __init__(self):
        super().__init__()
        self.momentum = 0.25
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), self.momentum)
            self.num_batches_tracked += 1
        return x - x.mean(0)


class Derived(nn.BatchNorm1d):
    pass


LAYERS = {
    "momentum": lambda: nn.BatchNorm1d(3, momentum=0.3),
    "cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "derived": lambda: Derived(3, momentum=0.7),
    "sync": lambda: nn.SyncBatchNorm(3, momentum=0.2),
    "lazy": lambda: nn.LazyBatchNorm1d(momentum=0.2),
    "by hand": HandMadeNorm,
}


@pytest.fixture(params=LAYERS)
def layer(request):
    layer = LAYERS[request.param]()
    layer(batch(0))
    return layer


def batch(seed):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def buffers(layer):
    return [buffer.clone() for buffer in layer.buffers()]


def test_frozen_passes_leave_no_trace(layer):
    plain = copy.deepcopy(layer)
    settings = (layer.momentum, getattr(layer, "track_running_stats", None))
    for seed in (1, 2):
        output, expected = layer(batch(seed)), plain(batch(seed))
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        before = buffers(layer)
        with frozen_running_stats(layer):
            frozen_output = layer(batch(seed + 10))
            layer(batch(seed + 20))
        assert_bitwise(buffers(layer), before)
        torch.testing.assert_close(frozen_output, copy.deepcopy(plain)(batch(seed + 10)), rtol=0, atol=0)
    assert_bitwise(buffers(layer), buffers(plain))
    assert (layer.momentum, getattr(layer, "track_running_stats", None)) == settings
    assert layer.__dict__.keys() == plain.__dict__.keys()


def test_helpers_are_idempotent(layer):
    """Regression: peers' defect 4, disabling twice lost the momentum for good."""
    plain = copy.deepcopy(layer)
    enable_running_stats(layer)
    disable_running_stats(layer)
    disable_running_stats(layer)
    layer(batch(5))
    enable_running_stats(layer)
    enable_running_stats(layer)
    assert layer.momentum == plain.momentum
    layer(batch(6))
    plain(batch(6))
    assert_bitwise(buffers(layer), buffers(plain))


def test_frozen_statistics_do_not_take_in_nan():
    layer = nn.BatchNorm1d(3)
    with frozen_running_stats(layer):
        layer(torch.full((4, 3), float("nan")))
    assert layer.running_mean.tolist() == [0.0, 0.0, 0.0]


def test_inner_context_leaves_outer_freeze_alone():
    layer = nn.BatchNorm1d(3)
    with frozen_running_stats(layer):
        with frozen_running_stats(layer):
            pass
        layer(batch(1))
        assert layer.num_batches_tracked == 0
    with pytest.raises(KeyError), frozen_running_stats(layer):
        raise KeyError
    layer(batch(1))
    assert layer.num_batches_tracked == 1


def test_eval_mode_uses_the_statistics_while_frozen():
    layer = nn.BatchNorm1d(3)
    layer(batch(0))
    layer.eval()
    expected = layer(batch(1))
    with frozen_running_stats(layer):
        torch.testing.assert_close(layer(batch(1)), expected, rtol=0, atol=0)


def test_layers_without_statistics_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3), nn.LazyBatchNorm1d())
    with frozen_running_stats(model):
        model(batch(0))  # the lazy layer's first batch makes its statistics
    assert model[2].num_batches_tracked == 1


def test_statistics_of_a_sam_run_are_those_of_the_clean_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    mean, variance = torch.zeros(3), torch.ones(3)
    for seed in range(3):
        inputs = batch(seed)

        def closure(inputs=inputs):
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        hidden = model[0](inputs).detach()
        mean, variance = 0.9 * mean + 0.1 * hidden.mean(0), 0.9 * variance + 0.1 * hidden.var(0)
        optimizer.zero_grad()
        closure()
        with frozen_running_stats(model):
            optimizer.step(closure, grads_ready=True)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, variance, rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 3
