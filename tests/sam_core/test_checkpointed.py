"""MemoryEfficientSAM: SAM to the last bit, with fewer activations alive, and the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_cases import assert_bitwise, copies, make_batch
from sam_core import SAM, MemoryEfficientSAM, checkpointed, frozen_running_stats, kept_running_stats

LOSS = nn.functional.cross_entropy


class Blocks(nn.Module):
    """Not sequential: two inputs, a residual connection and a nested block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh(), nn.Dropout(0.3))
        self.second = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
        self.last = nn.Linear(6, 3)

    def forward(self, x, factor):
        x = self.first(x)
        return self.last(x + factor * self.second(x))


def make_sequential():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)]
    layers += [nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None), nn.Dropout(0.5), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def make_blocks():
    torch.manual_seed(0)
    return Blocks().double()


CASES = {
    "1 segment": (make_sequential, {"checkpoint_segments": 1}, {}),
    "3 segments": (make_sequential, {"checkpoint_segments": 3}, {}),
    "8 segments": (make_sequential, {"checkpoint_segments": 8}, {}),
    "named": (make_blocks, {}, {"modules": ["first", "second"]}),
    "nested": (make_blocks, {}, {"modules": ["second.2", "first"]}),
    "no modules": (make_blocks, {}, {"modules": []}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rho", [0.3, 0.0])
def test_steps_are_sams_bit_for_bit(case, rho):
    make, options, arguments = CASES[case]
    model, plain = make(), make()
    inputs, targets = make_batch()
    inputs = inputs if make is make_sequential else (inputs, 0.5)
    optimizer = MemoryEfficientSAM(model.parameters(), torch.optim.AdamW, rho, lr=0.05, **options)
    reference = SAM(plain.parameters(), torch.optim.AdamW, rho, lr=0.05)

    def closure():
        with frozen_running_stats(plain if reference.in_second_pass else nn.Identity()):
            outputs = plain(*inputs) if isinstance(inputs, tuple) else plain(inputs)
        loss = LOSS(outputs, targets)
        loss.backward()
        return loss

    for seed in range(3):
        torch.manual_seed(seed)
        loss = optimizer.step_with_checkpointing(model, inputs, targets, LOSS, **arguments)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert_bitwise([loss], [reference.step(closure).detach()])
        assert torch.equal(torch.get_rng_state(), state)
    assert_bitwise(copies(model), copies(plain))
    assert_bitwise(list(model.buffers()), list(plain.buffers()))
    assert_bitwise([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert not loss.requires_grad
    assert not any("forward" in module.__dict__ for module in model.modules())


def saved_entries(make, arguments, **options):
    """Entries that autograd keeps for the backward of one pass."""
    model, entries = make(), []
    inputs, targets = make_batch()
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        entries.append(tensor.numel() if tensor.data_ptr() not in parameters else 0)
        return tensor

    with checkpointed(model, **options), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        LOSS(model(*arguments(inputs)), targets)
    return sum(entries)


def test_fewer_activations_are_kept():
    few = saved_entries(make_sequential, lambda x: (x,), segments=2)
    all_of_them = saved_entries(make_sequential, lambda x: (x,), modules=[])
    assert few < 0.7 * all_of_them
    few = saved_entries(make_blocks, lambda x: (x, 0.5), modules=["first", "second"])
    assert few < 0.7 * saved_entries(make_blocks, lambda x: (x, 0.5), modules=[])


def test_loss_scaling():
    model, plain = make_sequential().float(), make_sequential().float()
    inputs, targets = make_batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for net, options in ((model, {"grad_scaler": scaler}), (plain, {})):
        torch.manual_seed(1)
        optimizer = MemoryEfficientSAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        for _ in range(2):
            optimizer.step_with_checkpointing(net, inputs, targets, LOSS, **options)
            if options:
                scaler.update()
    assert_bitwise(copies(model), copies(plain))


def test_model_is_left_as_it_was_after_an_error():
    model = make_blocks()
    own = model.second.forward
    model.second.forward = own  # a forward of its own is put back, not lost
    before, buffers = copies(model), [b.clone() for b in model.buffers()]
    optimizer = MemoryEfficientSAM(model.parameters(), torch.optim.SGD, lr=0.1)

    def failing(outputs, targets):
        if optimizer.in_second_pass:
            raise KeyError("loss")
        return LOSS(outputs, targets)

    inputs, targets = make_batch()
    with pytest.raises(KeyError, match="loss"):
        optimizer.step_with_checkpointing(model, (inputs, 1.0), targets, failing, modules=["first", "second"])
    assert_bitwise(copies(model), before)
    assert model.second.forward is own
    assert "forward" not in model.first.__dict__
    assert model.first[1].momentum is None
    assert model.first[1].track_running_stats
    assert not torch.equal(next(iter(model.buffers())), buffers[0])  # the first pass counts


def test_refusals():
    model, blocks = make_sequential(), make_blocks()
    inputs, targets = make_batch()
    optimizer = MemoryEfficientSAM(model.parameters(), torch.optim.SGD, checkpoint_segments=9, lr=0.1)
    with pytest.raises(ValueError, match=r"^segments must be <= 8, the model's length, got 9\.$"):
        optimizer.step_with_checkpointing(model, inputs, targets, LOSS)
    with pytest.raises(
        ValueError, match=r"^modules must be named for a model that is not nn\.Sequential, got Blocks\.$"
    ):
        optimizer.step_with_checkpointing(blocks, (inputs, 1.0), targets, LOSS)
    with pytest.raises(ValueError, match=r"^modules must be modules of the model or their names, got 'third'\.$"):
        optimizer.step_with_checkpointing(blocks, (inputs, 1.0), targets, LOSS, modules=["third"])
    with pytest.raises(ValueError, match=r"^modules must be modules of the model or their names, got Linear"):
        optimizer.step_with_checkpointing(blocks, (inputs, 1.0), targets, LOSS, modules=[nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"^checkpoint_segments must be an integer >= 1, got 0\.$"):
        MemoryEfficientSAM(model.parameters(), torch.optim.SGD, checkpoint_segments=0, lr=0.1)


def test_kept_statistics_come_back_and_layers_run_as_usual():
    model = make_sequential()
    inputs, _ = make_batch()
    expected = copy.deepcopy(model)(inputs) if torch.manual_seed(3) else None
    torch.manual_seed(3)
    before = [buffer.clone() for buffer in model.buffers()]
    with kept_running_stats(model):
        output = model(inputs)
        assert not torch.equal(model[1].running_mean, before[0])
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert_bitwise(list(model.buffers()), before)
