"""What is particular to one method: GSAM's radius, LookSAM's schedule, EfficientSAM's choices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_cases import assert_bitwise, copies, make_batch, make_closure, make_model
from sam_core import GSAM, WSAM, EfficientSAM, FriendlySAM, LookSAM, MomentumSAM

# GSAM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "options", "expected"),
    [
        (0.4, {}, 0.5),
        (0.1, {}, 0.1 + 0.4 * 0.25),
        (0.0, {}, 0.1),
        (0.25, {"lr_max": 1.0, "lr_min": 0.2}, 0.1 + 0.4 * 0.0625),
        (0.1, {"lr_max": 1.0, "lr_min": 0.2}, 0.1),  # warm-up below lr_min
        (0.9, {}, 0.5),
        (0.1, {"rho_min": None}, 0.5),
        (0.1, {"lr_max": 0.4, "lr_min": 0.4}, 0.5),
        (torch.tensor(0.1), {}, 0.1 + 0.4 * 0.25),
    ],
)
def test_gsam_radius_follows_the_learning_rate(lr, options, expected):
    optimizer = GSAM(make_model().parameters(), torch.optim.SGD, **{"rho": 0.5, "rho_min": 0.1, **options}, lr=0.4)
    optimizer.param_groups[0]["lr"] = lr
    torch.testing.assert_close(optimizer.radius(optimizer.param_groups[0]), expected, rtol=1e-6, atol=0)


def test_gsam_uses_that_radius_and_keeps_its_range_over_a_resume():
    model = make_model()
    optimizer = GSAM(model.parameters(), torch.optim.SGD, rho=0.5, rho_min=0.1, lr=0.4)
    optimizer.param_groups[0]["lr"] = 0.1
    other = GSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.3)
    other.load_state_dict(optimizer.state_dict())
    before = copies(model)
    make_closure(model)()
    other.first_step()
    length = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    torch.testing.assert_close(length.item(), 0.2, rtol=1e-12, atol=0)


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (GSAM, {"alpha": -1}, r"^alpha must be >= 0, got -1\.$"),
        (GSAM, {"rho_min": 0.1}, r"^rho_min must be <= rho = 0\.05, got 0\.1\.$"),
        (GSAM, {"rho_min": -0.1}, r"^rho_min must be >= 0, got -0\.1\.$"),
        (GSAM, {"rho_min": 0.01, "lr_max": 0.1, "lr_min": 0.2}, r"^lr_max must be >= lr_min = 0\.2, got 0\.1\.$"),
        (GSAM, {"lr_max": -1.0}, r"^lr_max must be >= 0, got -1\.0\.$"),
        (WSAM, {"gamma": 1.0}, r"^gamma must be in \[0, 1\), got 1\.0\.$"),
        (WSAM, {"decouple": 3}, r"^decouple must be one of True, False, got 3\.$"),
        (FriendlySAM, {"sigma": -1.0}, r"^sigma must be >= 0, got -1\.0\.$"),
        (FriendlySAM, {"lmbda": 1}, r"^lmbda must be in \[0, 1\), got 1\.$"),
        (LookSAM, {"k": 0}, r"^k must be an integer >= 1, got 0\.$"),
        (LookSAM, {"alpha": float("nan")}, r"^alpha must be finite, got nan\.$"),
        (MomentumSAM, {"perturbation_momentum": -0.1}, r"^perturbation_momentum must be in \[0, 1\), got -0\.1\.$"),
        (EfficientSAM, {"perturbation_ratio": 0}, r"^perturbation_ratio must be in \(0, 1\], got 0\.$"),
        (EfficientSAM, {"sample_ratio": 1.5}, r"^sample_ratio must be in \(0, 1\], got 1\.5\.$"),
        (EfficientSAM, {"seed": -1}, r"^seed must be an integer >= 0, got -1\.$"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(make_model().parameters(), torch.optim.SGD, lr=0.1, **options)


# LookSAM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("form", ["closure", "grads_ready", "two_step"])
def test_looksam_runs_the_closure_one_and_one_kth_times_a_step(k, form):
    """Regression: peers' defect 8, two passes on every step."""
    model, calls = make_model(), []
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, rho=0.1, k=k, lr=0.1)

    def closure():
        calls.append(optimizer.should_apply_sam())
        return make_closure(model)()

    for step in range(2 * k):
        assert optimizer.should_apply_sam() == (step % k == 0)
        if form == "closure":
            assert optimizer.step(closure) is not None
            continue
        optimizer.zero_grad()
        closure()
        if form == "grads_ready":
            assert (optimizer.step(closure, grads_ready=True) is None) == (step % k != 0)
        elif optimizer.should_apply_sam():
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
        else:
            optimizer.step()
    assert len(calls) == 2 * k + 2
    assert calls.count(True) == 4


def test_looksam_adds_a_vector_orthogonal_to_g_and_of_length_alpha_g():
    model = make_model()
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, rho=0.3, alpha=0.6, lr=0.0)
    g = []

    def closure():
        loss = make_closure(model)()
        g[:] = [p.grad.clone() for p in model.parameters()]
        return loss

    optimizer.step(closure)
    optimizer.step(closure)  # lr is 0: the same g; .grad holds what the base optimizer stepped with
    g = torch.cat([x.flatten() for x in g])
    added = torch.cat([p.grad.flatten() for p in model.parameters()]) - g
    torch.testing.assert_close((added.norm() / g.norm()).item(), 0.6, rtol=1e-10, atol=0)
    assert abs(added @ g) < 1e-12 * g.norm() ** 2


def test_looksam_leaves_weights_alone_between_its_sam_steps():
    """Regression: peers' defect 12, weights of the last SAM step were put back on every step."""
    model = make_model()
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, k=3, rho=0.1, lr=0.1)
    optimizer.step(make_closure(model))
    optimizer.zero_grad()
    make_closure(model)()
    with torch.no_grad():
        model[0].bias.fill_(2.0)
    before = copies(model)
    optimizer.first_step()
    assert_bitwise(copies(model), before)
    optimizer.second_step()
    for weight, old, param in zip(copies(model), before, model.parameters(), strict=True):
        torch.testing.assert_close(weight, old - 0.1 * param.grad, rtol=1e-14, atol=1e-16)


def test_looksam_tries_a_skipped_sam_step_again():
    model = make_model()
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, k=3, rho=0.1, lr=0.1, nonfinite="skip")
    bad = [True]

    def closure():
        loss = make_closure(model)()
        if bad[0]:
            model[0].bias.grad.fill_(float("nan"))
        return loss

    optimizer.step(closure)
    assert optimizer.should_apply_sam()
    bad[0] = False
    optimizer.step(closure)
    assert not optimizer.should_apply_sam()


def test_looksam_parameters_without_a_flat_gradient_step_with_their_own():
    model, late = make_model(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, k=3, rho=0.1, lr=0.1)
    optimizer.step(make_closure(model))
    optimizer.add_param_group({"params": [late]})

    def closure():
        loss = make_closure(model)()
        late.grad = torch.full_like(late, 2.0)
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(late.detach(), torch.full_like(late, 0.8), rtol=1e-14, atol=0)


# EfficientSAM ---------------------------------------------------------------------------------------------------------


def make_efficient(model, **options):
    return EfficientSAM(model.parameters(), torch.optim.SGD, **{"rho": 0.1, "lr": 0.1, **options})


@pytest.mark.parametrize(
    ("size", "ratio", "selected"), [(16, 0.5, 8), (16, 0.6, 10), (1, 0.5, 1), (2, 0.5, 1), (3, 0.1, 1), (10, 0.7, 7)]
)
def test_efficient_passes_have_the_promised_sizes(size, ratio, selected):
    """Regressions: peers' defect 13; one sample too few, B = 1 failed, B = 2 gave NaN."""
    model, sizes = make_model(), []
    inputs, targets = (x[:size] for x in make_batch())
    closure = make_closure(model, (inputs, targets), method="efficientsam")

    def watching(indices=None):
        losses = closure(indices)
        sizes.append((len(losses), torch.is_grad_enabled()))
        return losses

    loss = make_efficient(model, sample_ratio=ratio).step(watching)
    middle = [(size, False)] if selected < size else []
    assert sizes == [(size, True), *middle, (selected, True)]
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


def test_efficient_ties_still_give_the_promised_number():
    model, sizes = make_model(), []
    inputs, targets = (x[:1].repeat_interleave(8, 0) for x in make_batch())
    closure = make_closure(model, (inputs, targets), method="efficientsam")

    def watching(indices=None):
        sizes.append(8 if indices is None else len(indices))
        return closure(indices)

    make_efficient(model).step(watching)
    assert sizes == [8, 8, 4]


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.75, 1.0])
def test_efficient_moves_the_drawn_weights_alone_and_differentiates_only_these(ratio):
    model, moved, wanted = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 3)).double(), [], []
    optimizer = make_efficient(model, perturbation_ratio=ratio, rho=0.05)
    closure, before = make_closure(model, method="efficientsam"), []

    def watching(indices=None):
        now = copies(model)
        if optimizer.in_second_pass and torch.is_grad_enabled():
            moved.append([not torch.equal(a, b) for a, b in zip(now, before[0], strict=True)])
            length = torch.cat([(a - b).flatten() for a, b in zip(now, before[0], strict=True)]).norm()
            torch.testing.assert_close(length.item(), 0.05, rtol=1e-9, atol=0)
        elif torch.is_grad_enabled():
            before[:] = [now]
        return closure(indices)

    real_grad = torch.autograd.grad
    torch.autograd.grad = lambda outputs, inputs, **options: (
        wanted.append(list(inputs)),
        real_grad(outputs, inputs, **options),
    )[1]
    try:
        for _ in range(20):
            optimizer.step(watching)
    finally:
        torch.autograd.grad = real_grad
    params = list(model.parameters())
    assert moved == [[any(p is q for q in drawn) for p in params] for drawn in wanted]
    assert {sum(flags) for flags in moved} == {max(1, round(ratio * 8))}
    assert ratio == 1.0 or len({tuple(flags) for flags in moved}) > 4  # another draw each step
    if ratio == 0.5:
        assert all(any(flags[i] for flags in moved) for i in range(8))


def test_efficient_draws_depend_on_seed_and_step_alone():
    torch.manual_seed(0)
    first = [make_efficient(make_model(), seed=seed)._draw() for seed in range(6)]
    state = torch.get_rng_state()
    optimizer = make_efficient(make_model(), seed=3)
    assert [p.shape for p in optimizer._draw()] == [p.shape for p in first[3]]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(p.shape for p in drawn) for drawn in first}) > 1
    resumed = make_efficient(make_model())
    resumed.load_state_dict(optimizer.state_dict())
    assert [p.shape for p in resumed._draw()] == [p.shape for p in first[3]]


def test_efficient_skips_parameters_that_the_loss_does_not_use():
    model, unused = make_model(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = EfficientSAM([*model.parameters(), unused], torch.optim.SGD, rho=0.1, lr=0.1)
    for _ in range(5):
        optimizer.step(make_closure(model, method="efficientsam"))
    assert_bitwise([unused], [torch.ones(3, dtype=torch.float64)])


def test_efficient_two_step_form_moves_the_drawn_weights():
    results = []
    for form in ("closure", "two_step"):
        model = make_model()
        optimizer = make_efficient(model, sample_ratio=1.0)
        for _ in range(3):
            if form == "closure":
                optimizer.step(make_closure(model, method="efficientsam"))
            else:
                make_closure(model)()
                optimizer.first_step(zero_grad=True)
                make_closure(model)()
                optimizer.second_step(zero_grad=True)
        results.append(copies(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_efficient_refuses():
    model = make_model()
    optimizer, closure = make_efficient(model), make_closure(model, method="efficientsam")
    with pytest.raises(ValueError, match=r"^grads_ready must be False for EfficientSAM: it needs each sample's loss"):
        optimizer.step(closure, grads_ready=True)
    with pytest.raises(
        ValueError, match=r"^closure must return one loss a sample, a tensor \[B\] with B >= 1, got shape \[\]"
    ):
        optimizer.step(make_closure(model))
    with pytest.raises(ValueError, match=r"^closure must return one loss a sample, .*, got None\.$"):
        optimizer.step(lambda: None)
    before = copies(model)
    with pytest.raises(ValueError, match=r"^closure must return one loss a sample, .*, got 3\.0\.$"):
        optimizer.step(lambda indices=None: closure() if not optimizer.in_second_pass else 3.0)
    assert_bitwise(copies(model), before)
    with pytest.raises(ValueError, match=r"^closure must be given, got None"):
        make_closure(model)()
        optimizer.step()
