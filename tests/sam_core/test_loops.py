"""The ready-made loop does what its parts do."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from sam_cases import assert_bitwise, copies, make_batch
from sam_core import SAM, disable_running_stats, enable_running_stats, train_with_sam


def make_normed_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_loop_is_the_source_listing_done_right(caplog):
    loader = [make_batch(seed, torch.float32) for seed in range(3)]
    model = make_normed_model()
    reference = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, logger="sam_core.training.loops"):
        assert train_with_sam(model, loader, epochs=2, lr=0.05, rho=0.1) is model
    assert [record.message.split(":")[0] for record in caplog.records] == ["epoch 1/2", "epoch 2/2"]

    optimizer = SAM(reference.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.base_optimizer, T_max=2)
    for _ in range(2):
        for inputs, targets in loader:
            enable_running_stats(reference)
            nn.functional.cross_entropy(reference(inputs), targets).backward()
            optimizer.first_step(zero_grad=True)
            disable_running_stats(reference)
            nn.functional.cross_entropy(reference(inputs), targets).backward()
            optimizer.second_step(zero_grad=True)
        scheduler.step()
    assert_bitwise(copies(model), copies(reference))
    assert_bitwise(list(model.buffers()), list(reference.buffers()))
    assert model[1].momentum == 0.1


def test_loop_learns():
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    targets = inputs[:, :3].argmax(dim=1)
    model = train_with_sam(make_normed_model(), [(inputs, targets)], epochs=40, device="cpu")
    assert (model.eval()(inputs).argmax(dim=1) == targets).float().mean() > 0.9


def test_loop_takes_no_epochs_but_no_empty_loader():
    model = make_normed_model()
    before = copies(model)
    train_with_sam(model, [], epochs=0)
    assert_bitwise(copies(model), before)
    with pytest.raises(ValueError, match=r"^train_loader must give at least one batch, got none\.$"):
        train_with_sam(model, [], epochs=1)
    with pytest.raises(ValueError, match=r"^epochs must be an integer >= 0, got 1\.5\.$"):
        train_with_sam(model, [], epochs=1.5)
