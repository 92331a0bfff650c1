"""What is particular to one method: GSAM's radius, LookSAM's schedule, bad options of all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_cases import assert_bitwise, copies, make_closure, make_model
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


def test_gsam_ties_a_group_of_the_base_optimizers_to_its_own_learning_rate():
    """Added past GSAM, it has no largest rate yet: that is the one it is first seen with."""
    late = nn.Parameter(torch.ones(2))
    optimizer = GSAM(make_model().parameters(), torch.optim.SGD, rho=0.5, rho_min=0.1, lr=0.4)
    optimizer.base_optimizer.add_param_group({"params": [late], "lr": 0.2})
    group = optimizer.param_groups[1]
    assert optimizer.radius(group) == pytest.approx(0.5)
    group["lr"] = 0.05
    assert optimizer.radius(group) == pytest.approx(0.1 + 0.4 * 0.25)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 100_000])
def test_looksam_does_not_take_rounding_for_a_flat_direction(dtype, size):
    """Of a multiple of |w|^2, g_s is a multiple of g, so that g_v = 0: what rounding leaves of it must not be added."""
    weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = LookSAM([weight], torch.optim.SGD, rho=0.05, alpha=0.7, lr=0.0)

    def closure():
        loss = 0.37 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    ready = weight.grad.clone()
    optimizer.zero_grad()
    closure()
    assert_bitwise([ready], [weight.grad])


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


def test_looksam_is_the_base_optimizer_once_rho_has_fallen_to_zero():
    model = make_model()
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, k=3, rho=0.1, lr=0.1)
    optimizer.step(make_closure(model))
    optimizer.param_groups[0]["rho"] = 0.0
    optimizer.zero_grad()
    make_closure(model)()
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    optimizer.step()
    for actual, true in zip(copies(model), expected, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-14, atol=1e-16)


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
