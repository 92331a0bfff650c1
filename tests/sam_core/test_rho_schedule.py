"""rho follows its schedule in every method, composes with schedules of the learning rate, and resumes exactly."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from sam_cases import BASES, METHODS, assert_bitwise, copies, make_batch, make_closure, make_model
from sam_core import GSAM, MSAM, SAM
from sam_core.tuning import Decay, RhoScheduler, Warmup


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def make_optimizer(method, model, base="sgd", **options):
    own = {"rho_min": None} if method == "gsam" else {}  # its own schedule is refused
    return METHODS[method](model.parameters(), BASES[base][0], **{**BASES[base][1], **own, **options})


def sam(**options):
    return SAM(make_model().parameters(), torch.optim.SGD, **{"lr": 0.4, "rho": 0.1, **options})


def groups(*options):
    """A group of one weight for each set of options."""
    return [{"params": [nn.Parameter(torch.ones(2))], **group} for group in options]


def rhos(optimizer):
    return [group["rho"] for group in optimizer.param_groups]


def clean(optimizer, model):
    with optimizer.at_weights():
        return copies(model)


# Values ---------------------------------------------------------------------------------------------------------------


def test_factors_multiply_and_are_those_of_torchs_schedulers():
    """LinearLR and CosineAnnealingLR, independent code for the same curves, on the learning rate of a twin."""
    optimizer, twin = sam(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = RhoScheduler(optimizer, Warmup(num_steps=4), Decay(num_steps=10, final=0.2))
    cosine = lr_scheduler.CosineAnnealingLR(twin, T_max=10, eta_min=0.02)
    for step in range(11):
        expected = min(step / 4, 1.0) * twin.param_groups[0]["lr"]
        assert rhos(optimizer) == scheduler.get_last_rho() == [pytest.approx(expected, rel=1e-12)]
        assert scheduler.last_epoch == step
        scheduler.step()
        twin.step()
        cosine.step()
    assert rhos(optimizer) == [pytest.approx(0.02)]

    twin = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    linear = lr_scheduler.LinearLR(twin, 1.0, 0.25, total_iters=5)
    for step in range(8):
        assert Decay(num_steps=5, final=0.25, shape="linear")(step) == pytest.approx(twin.param_groups[0]["lr"])
        twin.step()
        linear.step()


def test_a_function_of_ones_own_is_a_factor():
    scheduler = RhoScheduler(sam(), lambda step: float(step >= 2))
    for expected in (0.0, 0.0, 0.1, 0.1):
        assert scheduler.get_last_rho() == [expected]
        scheduler.step()


def test_every_group_keeps_its_own_rho_and_learning_rate():
    optimizer = SAM(groups({"rho": 0.4, "lr": 1.0}, {"rho": 0.1, "lr": 0.1}), torch.optim.SGD, lr=1.0)
    steps = lr_scheduler.LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda step: 0.5**step])
    scheduler = RhoScheduler(optimizer, Warmup(num_steps=2), follow_lr=True)
    seen = []
    for _ in range(4):
        seen.append(rhos(optimizer))
        optimizer._opt_called = True  # no step is taken here
        steps.step()
        scheduler.step()
    expected = [[0.4 * min(t / 2, 1) / (1 + t), 0.1 * min(t / 2, 1) * 0.5**t] for t in range(4)]
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=0)
    assert scheduler.base_rhos == [0.4, 0.1]


LR_SCHEDULERS = {
    "warm-up and cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)],
        milestones=[3],
    ),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=12, cycle_momentum=False),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.7),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_rho_is_proportional_to_the_learning_rate_under_any_scheduler(name):
    optimizer = sam(lr=0.4, rho=0.1)
    scheduler = LR_SCHEDULERS[name](optimizer)
    rho_scheduler = RhoScheduler(optimizer, follow_lr=True)
    largest = 2.0 if name == "one cycle" else 0.4
    seen = set()
    for _ in range(9):
        lr = optimizer.param_groups[0]["lr"]
        assert rhos(optimizer) == [pytest.approx(0.1 * lr / largest, rel=1e-12)]
        seen.add(round(lr, 6))
        optimizer._opt_called = True
        scheduler.step(*([1.0] if name == "plateau" else []))
        rho_scheduler.step()
    assert len(seen) > 4


def test_following_the_learning_rate_is_gsams_schedule_from_zero():
    model = make_model()
    own = GSAM(model.parameters(), torch.optim.SGD, rho=0.3, rho_min=0.0, lr=0.5)
    driven = GSAM(make_model().parameters(), torch.optim.SGD, rho=0.3, lr=0.5)
    cosines = [lr_scheduler.CosineAnnealingLR(optimizer, T_max=5) for optimizer in (own, driven)]
    scheduler = RhoScheduler(driven, follow_lr=True)
    for _ in range(6):
        radii = [optimizer.radius(optimizer.param_groups[0]) for optimizer in (own, driven)]
        assert radii[1] == pytest.approx(radii[0], rel=1e-12, abs=1e-12)
        for optimizer, cosine in zip((own, driven), cosines, strict=True):
            optimizer._opt_called = True
            cosine.step()
        scheduler.step()


def test_the_largest_learning_rate_may_be_given():
    optimizer = SAM(groups({}, {}), torch.optim.SGD, rho=0.1, lr=0.4)
    assert RhoScheduler(optimizer, follow_lr=True, lr_max=0.8).get_last_rho() == pytest.approx([0.05, 0.05])
    optimizer = SAM(groups({}, {}), torch.optim.SGD, rho=0.1, lr=torch.tensor(0.4))
    assert RhoScheduler(optimizer, follow_lr=True, lr_max=[0.8, 1.6]).get_last_rho() == pytest.approx([0.05, 0.025])


def test_a_group_added_later_takes_part_from_the_next_step():
    optimizer = sam(lr=0.4)
    scheduler = RhoScheduler(optimizer, Decay(num_steps=4, shape="linear"), follow_lr=True)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.8, "lr": 1.0})
    assert scheduler.get_last_rho() == [0.1]
    scheduler.step()
    assert rhos(optimizer) == pytest.approx([0.075, 0.6])
    scheduler.step()
    assert rhos(optimizer) == pytest.approx([0.05, 0.4])


# Training -------------------------------------------------------------------------------------------------------------


def test_without_factors_nothing_changes(method):
    results = []
    for scheduled in (True, False):
        model = make_model()
        optimizer = make_optimizer(method, model)
        scheduler = RhoScheduler(optimizer) if scheduled else None
        for seed in range(3):
            optimizer.step(make_closure(model, make_batch(seed), method=method))
            if scheduler is not None:
                scheduler.step()
        results.append(clean(optimizer, model))
    assert_bitwise(*results)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "msam"], indirect=True)
def test_a_schedule_is_rho_written_by_hand_before_each_step(method):
    results, wanted = [], [0.0, 0.05, 0.1, 0.1]
    for scheduled in (True, False):
        model = make_model()
        optimizer = make_optimizer(method, model, rho=0.1)
        scheduler = RhoScheduler(optimizer, Warmup(num_steps=2)) if scheduled else None
        for seed, rho in enumerate(wanted):
            if scheduler is None:
                optimizer.param_groups[0]["rho"] = rho
            optimizer.step(make_closure(model, make_batch(seed), method=method))
            if scheduler is not None:
                scheduler.step()
        results.append(copies(model))
    assert_bitwise(*results)


def test_at_rho_zero_a_step_is_the_base_optimizers_in_one_pass(method):
    model, plain = make_model(), make_model()
    optimizer, base = make_optimizer(method, model), BASES["sgd"][0](plain.parameters(), **BASES["sgd"][1])
    scheduler, calls = RhoScheduler(optimizer, lambda step: float(step >= 3)), []
    for seed in range(3):
        closure = make_closure(model, make_batch(seed), method=method)
        optimizer.step(lambda closure=closure: (calls.append(1), closure())[1])
        base.zero_grad()
        make_closure(plain, make_batch(seed))()
        base.step()
        assert_bitwise(copies(model), copies(plain))  # MSAM's too: its weights are not moved out
        scheduler.step()
    assert len(calls) == 3
    optimizer.step(make_closure(model, make_batch(3), method=method))


def test_a_scheduled_sam_is_the_formula():
    """w <- w - lr grad L(w + rho_t g / ||g||), by hand in float64."""
    model, twin = make_model(), make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
    scheduler = RhoScheduler(optimizer, Warmup(num_steps=2), Decay(num_steps=8, shape="linear"))
    for step in range(5):
        optimizer.step(make_closure(model, make_batch(step)))
        scheduler.step()

        weights, rho = list(twin.parameters()), 0.2 * min(step / 2, 1) * (1 - step / 8)
        grads = torch.autograd.grad(loss(twin, step), weights)
        length = math.sqrt(sum(float((g**2).sum()) for g in grads))
        before = copies(twin)
        with torch.no_grad():
            for w, g in zip(weights, grads, strict=True):
                w += rho * g / length
        grads = torch.autograd.grad(loss(twin, step), weights)
        with torch.no_grad():
            for w, old, g in zip(weights, before, grads, strict=True):
                w.copy_(old - 0.1 * g)
    torch.testing.assert_close(copies(model), copies(twin), rtol=1e-12, atol=1e-13)


def loss(model, step):
    inputs, targets = make_batch(step)
    return nn.functional.cross_entropy(model(inputs), targets)


def test_msam_takes_each_gradient_at_its_own_distance_and_keeps_w_exact():
    """v <- 0.9 v + grad L(w - rho_t v / ||v||); w <- w - 0.1 v, by hand in float64, rho_t from the schedule."""
    model, twin = make_model(), make_model()
    optimizer = MSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    scheduler = RhoScheduler(optimizer, lambda step: (0.0, 0.5, 0.0, 1.0, 0.25, 1.0)[step])
    weights, momenta = copies(twin), [torch.zeros_like(p) for p in twin.parameters()]
    for step in range(5):
        optimizer.step(make_closure(model, make_batch(step)))
        before = clean(optimizer, model)
        scheduler.step()
        assert_bitwise(clean(optimizer, model), before)

        rho = 0.5 * (0.0, 0.5, 0.0, 1.0, 0.25)[step]
        length = math.sqrt(sum(float((v**2).sum()) for v in momenta)) or 1.0
        with torch.no_grad():
            for p, w, v in zip(twin.parameters(), weights, momenta, strict=True):
                p.copy_(w - rho * v / length)
        grads = torch.autograd.grad(loss(twin, step), list(twin.parameters()))
        momenta = [0.9 * v + g for v, g in zip(momenta, grads, strict=True)]
        weights = [w - 0.1 * v for w, v in zip(weights, momenta, strict=True)]
        torch.testing.assert_close(before, weights, rtol=1e-12, atol=1e-13)

    length = math.sqrt(sum(float((v**2).sum()) for v in momenta))
    moved = [w - 0.5 * v / length for w, v in zip(weights, momenta, strict=True)]
    torch.testing.assert_close(copies(model), moved, rtol=1e-12, atol=1e-13)


def test_evaluating_in_between_changes_no_training(method):
    results = []
    for looks in (True, False):
        model = make_model()
        optimizer = make_optimizer(method, model, rho=0.4)
        scheduler = RhoScheduler(optimizer, Decay(num_steps=4))
        for seed in range(4):
            optimizer.step(make_closure(model, make_batch(seed), method=method))
            if looks:
                clean(optimizer, model)
            scheduler.step()
            if looks:
                clean(optimizer, model)
        results.append(clean(optimizer, model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_msams_rho_may_be_set_within_at_weights():
    model = make_model()
    optimizer = MSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    scheduler = RhoScheduler(optimizer, Decay(num_steps=2, shape="linear"))
    optimizer.step(make_closure(model))
    with optimizer.at_weights():
        weights = copies(model)
        scheduler.step()
        assert_bitwise(copies(model), weights)
    away = torch.cat([(p - w).flatten() for p, w in zip(model.parameters(), weights, strict=True)]).norm()
    assert away.item() == pytest.approx(0.25, rel=1e-12)


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, scheduler_first):
    def build(model):
        optimizer = make_optimizer(method, model, "adamw", rho=0.3)
        decay = lr_scheduler.ExponentialLR(optimizer, 0.8)
        return optimizer, decay, RhoScheduler(optimizer, Warmup(num_steps=3), follow_lr=True)

    def run(model, parts, seeds):
        for seed in seeds:
            parts[0].step(make_closure(model, make_batch(seed), method=method))
            parts[1].step()
            parts[2].step()

    model = make_model()
    parts = build(model)
    run(model, parts, range(2))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, *parts)], file)
    run(model, parts, range(2, 6))

    resumed = make_model()
    new = build(resumed)
    states = torch.load(io.BytesIO(file.getvalue()))
    order = (0, 3, 1, 2) if scheduler_first else (0, 1, 2, 3)
    for i in order:
        (resumed, *new)[i].load_state_dict(states[i])
    run(resumed, new, range(2, 6))
    assert_bitwise(clean(new[0], resumed), clean(parts[0], model))
    assert rhos(new[0]) == rhos(parts[0])
    assert new[2].state_dict() == parts[2].state_dict()


def test_a_scheduler_made_after_the_optimizer_was_loaded_starts_from_the_same_rho():
    optimizer = sam()
    scheduler = RhoScheduler(optimizer, Decay(num_steps=4, shape="linear"), follow_lr=True)
    scheduler.step()
    assert rhos(optimizer) == [pytest.approx(0.075)]
    other = sam(rho=7.0)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"] = 0.2  # as if it had fallen: the scheduler's state knows the largest
    resumed = RhoScheduler(other, Decay(num_steps=4, shape="linear"), follow_lr=True)
    resumed.load_state_dict(scheduler.state_dict())
    resumed.step()
    assert rhos(other) == [pytest.approx(0.1 * 0.5 * 0.5)]


def test_loading_the_moments_of_the_base_optimizer_alone_leaves_the_schedule():
    model = make_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    make_closure(model)()
    plain.step()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.4, momentum=0.9)
    scheduler = RhoScheduler(optimizer, Warmup(num_steps=2))
    optimizer.load_state_dict(plain.state_dict())
    scheduler.step()
    assert rhos(optimizer) == [0.05]


def test_state_of_other_groups_is_refused():
    state = RhoScheduler(SAM(groups({}, {}), torch.optim.SGD, lr=0.1)).state_dict()
    with pytest.raises(ValueError, match=r"state_dict must have rho of 1 groups, got 2\."):
        RhoScheduler(sam()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state_dict must be that of follow_lr=True, got False\."):
        RhoScheduler(sam(), follow_lr=True).load_state_dict(RhoScheduler(sam()).state_dict())


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: RhoScheduler(torch.optim.SGD(groups({}), lr=0.1)),
            r"optimizer must be one of sam_core's, .* got SGD\.",
        ),
        (lambda: RhoScheduler(sam(), 0.5), r"factors must be functions of the step, e\.g\. Warmup.*, got 0\.5\."),
        (lambda: RhoScheduler(sam(), follow_lr=1.5), r"follow_lr must be one of True, False, got 1\.5\."),
        (lambda: RhoScheduler(sam(), lr_max=0.1), r"lr_max must be None without follow_lr=True, got 0\.1\."),
        (lambda: RhoScheduler(sam(), follow_lr=True, lr_max=[1, 2]), r"lr_max must have 1 values, one a group, got 2"),
        (lambda: RhoScheduler(sam(), follow_lr=True, lr_max=0.0), r"lr_max must be > 0, got 0\.0\."),
        (lambda: RhoScheduler(sam(lr=0.0), follow_lr=True), r"lr_max must be > 0, got 0\.0\."),
        (
            lambda: RhoScheduler(sam(), follow_lr=True, lr_max=0.1),
            r"lr_max must be >= the learning rate, got 0\.1 where lr of group 0 is 0\.4\.",
        ),
        (lambda: RhoScheduler(sam(), lambda step: -1.0), r"factor <function .*> at step 0 must be >= 0, got -1\.0\."),
        (lambda: RhoScheduler(sam(), lambda step: math.nan), r"factor .* at step 0 must be finite, got nan\."),
        (
            lambda: RhoScheduler(GSAM(groups({}), torch.optim.SGD, rho=0.1, rho_min=0.02, lr=0.1)),
            r"rho_min must be None with RhoScheduler, got 0\.02: GSAM ties rho to the learning rate itself\.",
        ),
        (lambda: Warmup(num_steps=0), r"num_steps must be an integer >= 1, got 0\."),
        (lambda: Decay(num_steps=2.5), r"num_steps must be an integer >= 1, got 2\.5\."),
        (lambda: Decay(num_steps=2, final=-0.1), r"final must be >= 0, got -0\.1\."),
        (lambda: Decay(num_steps=2, shape="step"), r"shape must be one of 'cosine', 'linear', got 'step'\."),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_optimizer_without_rho_is_refused():
    optimizer = sam()
    del optimizer.param_groups[0]["rho"]
    with pytest.raises(ValueError, match=r"optimizer must have rho in its parameter groups, got none in group 0\."):
        RhoScheduler(optimizer)


@pytest.mark.parametrize("kind", ["one cycle", "cyclic"])
def test_a_learning_rate_above_its_largest_is_refused_instead_of_a_wrong_share(kind):
    """A scheduler made after ours; and CyclicLR, which keeps its largest rate to itself."""
    optimizer = sam(lr=0.4)
    if kind == "one cycle":
        scheduler = RhoScheduler(optimizer, follow_lr=True)
        rates = lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=12, cycle_momentum=False)
    else:
        rates = lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=2.0, step_size_up=4, cycle_momentum=False)
        scheduler = RhoScheduler(optimizer, follow_lr=True)
    with pytest.raises(ValueError, match=r"lr_max must be >= the learning rate, .* or give lr_max\."):
        for _ in range(5):
            optimizer._opt_called = True
            rates.step()
            scheduler.step()


def test_a_second_writer_of_rho_is_noticed():
    optimizer = sam()
    first = RhoScheduler(optimizer, Warmup(num_steps=4))
    RhoScheduler(optimizer, Decay(num_steps=4))
    with pytest.raises(
        ValueError, match=r"rho of group 0 must be what RhoScheduler set, 0\.0, got 0\.1\. One scheduler"
    ):
        first.step()
