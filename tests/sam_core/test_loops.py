"""The ready-made loops do what their parts do."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from sam_cases import (
    DEFAULTS,
    METHODS,
    assert_bitwise,
    copies,
    make_batch,
    make_closure,
    make_model,
    true_perturbation,
)
from sam_core import (
    SAM,
    disable_running_stats,
    enable_running_stats,
    make_closures,
    train_sam_with_accumulation,
    train_with_sam,
)
from sam_core.training import check_ranks_agree, train_sam_distributed


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


# Accumulation ---------------------------------------------------------------------------------------------------------


def make_loader(sizes=(5, 5, 6, 4, 4)):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(n, 5, generator=generator).double(), torch.randint(3, (n,), generator=generator)) for n in sizes
    ]


@pytest.mark.parametrize("method", ["sam", "gsam", "looksam", "msam"])
def test_accumulation_steps_on_the_union_of_its_parts(method):
    """Both gradients are those of the whole batch, also of what is left at the end."""
    loader, model, whole = make_loader(), make_model(), make_model()
    optimizer = METHODS[method](model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    assert train_sam_with_accumulation(model, loader, optimizer, accumulation_steps=3) is model
    reference = METHODS[method](whole.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    for parts in (loader[:3], loader[3:]):
        batch = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        reference.step(make_closure(whole, batch))
    for actual, expected in zip(copies(model), copies(whole), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)


def test_accumulation_with_a_loss_scaler_and_batch_normalisation():
    loader = [(inputs.float(), targets) for inputs, targets in make_loader()]
    model, plain = make_normed_model(), make_normed_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for net, options in ((model, {"grad_scaler": scaler}), (plain, {})):
        optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        train_sam_with_accumulation(net, loader, optimizer, 2, device="cpu", **options)
    assert_bitwise(copies(model), copies(plain))
    assert model[1].num_batches_tracked == 5


@pytest.mark.parametrize("method", ["sam", "asam", "memoryefficientsam"])
def test_m_sharpness_gives_each_part_its_own_perturbation(method):
    loader, model, plain = make_loader(), make_model(), make_model()
    optimizer = METHODS[method](model.parameters(), torch.optim.SGD, lr=0.1)
    train_sam_with_accumulation(model, loader, optimizer, accumulation_steps=5, m_sharpness=True)
    total = [torch.zeros_like(p) for p in plain.parameters()]
    rho, eta = DEFAULTS[method]["rho"], DEFAULTS[method].get("eta")
    for batch in loader:
        net = copy.deepcopy(plain)
        make_closure(net, batch)()
        e = true_perturbation(copies(net), [p.grad for p in net.parameters()], rho, eta)
        with torch.no_grad():
            for param, move in zip(net.parameters(), e, strict=True):
                param.add_(move)
        net.zero_grad()
        make_closure(net, batch)()
        for sum_of_grads, param in zip(total, net.parameters(), strict=True):
            sum_of_grads += param.grad * len(batch[1]) / 24
    for actual, start, grad in zip(copies(model), copies(plain), total, strict=True):
        torch.testing.assert_close(actual, start - 0.1 * grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("answer", ["skip", "raise", "scaler"])
@pytest.mark.parametrize("bad_call", [1, 2, 3, 4])
def test_m_sharpness_skips_a_step_with_one_bad_part(bad_call, answer):
    model, calls = make_model(), []
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, nonfinite="skip" if answer == "skip" else "raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if answer == "scaler" else None
    before, closure = copies(model), make_closure(model, scaler=scaler)

    def spoiled():
        loss = closure()
        calls.append(1)
        if len(calls) == bad_call:
            model[0].bias.grad.fill_(float("nan"))
        return loss

    if answer == "raise":
        with pytest.raises(FloatingPointError, match=r"^the gradient of parameter 1 .* is not finite at w"):
            optimizer.step_m_sharpness([spoiled, spoiled])
    else:
        optimizer.step_m_sharpness([spoiled, spoiled], grad_scaler=scaler)
    assert optimizer.num_skipped == (answer != "raise")
    assert_bitwise(copies(model), before)
    if scaler is not None:
        scaler.update()
        assert scaler.get_scale() == 2.0**9
    optimizer.step_m_sharpness([closure], grad_scaler=scaler)
    assert not torch.equal(copies(model)[0], before[0])


def test_m_sharpness_with_a_loss_scaler():
    loader, models = [(x.float(), y) for x, y in make_loader()], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        models.append(make_model(torch.float32))
        optimizer = SAM(models[-1].parameters(), torch.optim.SGD, lr=0.1, max_grad_norm=0.1)
        train_sam_with_accumulation(models[-1], loader, optimizer, 3, m_sharpness=True, grad_scaler=scaler)
    assert_bitwise(copies(models[0]), copies(models[1]))


def test_m_sharpness_leaves_groups_out_as_a_step_does():
    models, batch = [make_model(), make_model()], make_batch()
    for model in models:
        groups = [{"params": model[0].parameters(), "perturb": False}, {"params": model[2].parameters()}]
        optimizer, closure = SAM(groups, torch.optim.SGD, lr=0.1), make_closure(model, batch)
        for _ in range(3):
            optimizer.step(closure) if model is models[0] else optimizer.step_m_sharpness([closure])
    assert_bitwise(copies(models[0]), copies(models[1]))


def test_m_sharpness_without_a_radius_is_the_base_optimizer_in_one_pass():
    loader, model, plain = make_loader(), make_model(), make_model()
    optimizer, calls = SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1), []
    parts = make_closures(model, loader, nn.functional.cross_entropy, optimizer)
    loss = optimizer.step_m_sharpness([lambda part=part: (calls.append(1), part())[1] for part in parts])
    assert len(calls) == len(loader)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    total = sum(part() for part in make_closures(plain, loader, nn.functional.cross_entropy, optimizer))
    base.step()
    assert loss == total
    assert_bitwise(copies(model), copies(plain))


def test_m_sharpness_comes_back_when_a_closure_raises():
    model, calls = make_model(), []
    optimizer, before, closure = SAM(model.parameters(), torch.optim.SGD, lr=0.1), copies(model), make_closure(model)

    def failing():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step_m_sharpness([failing, failing])
    assert_bitwise(copies(model), before)
    closure()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"^step_m_sharpness must not follow first_step; call second_step, or"):
        optimizer.step_m_sharpness([closure])


def test_accumulation_refuses():
    model = make_model()
    sam = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    gsam = METHODS["gsam"](model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"^accumulation_steps must be an integer >= 1, got 0\.$"):
        train_sam_with_accumulation(model, make_loader(), sam, 0)
    with pytest.raises(ValueError, match=r"^train_loader must give at least one batch, got none\.$"):
        train_sam_with_accumulation(model, [], sam)
    with pytest.raises(ValueError, match=r"^optimizer must be SAM or ASAM with m_sharpness=True, got GSAM\.$"):
        train_sam_with_accumulation(model, make_loader(), gsam, m_sharpness=True)
    with pytest.raises(ValueError, match=r"^closures must hold at least one micro-batch, got none\.$"):
        sam.step_m_sharpness([])


# One rank; several are in test_ddp.py ---------------------------------------------------------------------------------


class Stream(IterableDataset):
    """A dataset without a length."""

    def __iter__(self):
        return iter(make_loader())


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_the_distributed_loop_in_one_process(method, one_rank, caplog):
    loader, models = [make_batch(seed) for seed in range(3)], [make_model(), make_model(), make_model()]
    samples = partial(nn.functional.cross_entropy, reduction="none")
    loss_fn = samples if method == "efficientsam" else nn.functional.cross_entropy
    optimizers = [METHODS[method](model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9) for model in models]
    losses = [optimizers[0].step(make_closure(models[0], batch, method=method)) for batch in loader]
    with caplog.at_level(logging.INFO, logger="sam_core.training.distributed"):
        assert train_sam_distributed(models[1], loader, optimizers[1], "cpu", loss_fn) is models[1]
        train_sam_distributed(DistributedDataParallel(models[2]), loader, optimizers[2], loss_fn=loss_fn)
    assert [record.message for record in caplog.records] == 2 * [f"loss {sum(losses) / 3:.4f}"]
    for model in models[1:]:
        assert_bitwise(copies(model), copies(models[0]))


@pytest.mark.parametrize("context", ["no_sync", "none"])
def test_m_sharpness_sums_gradients_that_share_the_memory_of_a_bucket(context, one_rank):
    results = []
    for views in (False, True):
        model = DistributedDataParallel(make_model(), gradient_as_bucket_view=views)
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.5)
        for _ in range(2):
            parts = make_closures(model, make_loader(), nn.functional.cross_entropy, optimizer)
            optimizer.step_m_sharpness(parts, no_sync=model.no_sync if context == "no_sync" else None)
        results.append(copies(model))
    assert_bitwise(*results)


def test_accumulation_leaves_ranks_to_the_distributed_loop(one_rank):
    model = DistributedDataParallel(make_model())
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"^model must not be a DistributedDataParallel: train it with train_sam_"):
        train_sam_with_accumulation(model, make_loader(), optimizer)


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_parameters_of_fsdp1_are_refused(use_orig_params, one_rank):
    model = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"^params must not be those of FullyShardedDataParallel \(FSDP1\): shard with"
    ):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("method", ["sam", "msam", "efficientsam"])
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_an_optimizer_made_before_fsdp1_refuses_its_first_step(method, one_rank):
    """As accelerate makes it: FSDP1 keeps the parameters that the optimizer has, and takes their parts away."""
    net = make_model()
    optimizer = METHODS[method](net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    before = copies(net)
    model = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"^params must not be those of FullyShardedDataParallel \(FSDP1\): shard with"
    ):
        optimizer.step(make_closure(model, method=method))
    assert_bitwise(copies(net), before)


def test_without_a_process_group_there_is_nothing_to_agree_on():
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for loader in (iter(make_loader()), DataLoader(Stream(), batch_size=None)):
        before = copies(model)
        train_sam_distributed(model, loader, optimizer)
        assert not torch.equal(copies(model)[0], before[0])
    for values in (model, optimizer, copies(model), dict(model.named_parameters())):
        check_ranks_agree(values)
