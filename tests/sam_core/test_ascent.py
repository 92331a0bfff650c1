"""Ascent rules, exact weights and list arithmetic against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_cases import assert_bitwise, true_perturbation
from sam_core import ASAM, SAM, AdaptiveAscent, L2Ascent, compute_perturbation, perturb, perturbed, restore
from sam_core._checks import check_count
from sam_core._tensors import norm, scale_


def random_lists(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (4,), (), (2, 1, 2)]
    return [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(2)]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3])
def test_perturbation_formula(eta, foreach):
    params, grads = random_lists()
    rule = L2Ascent(rho=0.7) if eta is None else AdaptiveAscent(rho=0.7, eta=eta)
    (actual,) = compute_perturbation([rule], [grads], [params], foreach=foreach)
    for a, e in zip(actual, true_perturbation(params, grads, 0.7, eta), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=0)


def test_norm_is_global_and_rho_is_per_group():
    params, grads = random_lists()
    rules = [L2Ascent(rho=0.5), L2Ascent(rho=0.1), AdaptiveAscent(rho=2.0, eta=0.1)]
    groups = [slice(0, 1), slice(1, 3), slice(3, 4)]
    actual = compute_perturbation(rules, [grads[g] for g in groups], [params[g] for g in groups])
    t = [*(torch.ones_like(p) for p in params[:3]), params[3].abs() + 0.1]
    length = sum(((a * g) ** 2).sum() for a, g in zip(t, grads, strict=True)).sqrt()
    expected = [rho * a**2 * g / length for rho, a, g in zip((0.5, 0.1, 0.1, 2.0), t, grads, strict=True)]
    for a, e in zip([move for group in actual for move in group], expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=0)


def test_per_group_rho_in_the_optimizer():
    a, b = (nn.Parameter(torch.tensor([v, 1.0], dtype=torch.float64)) for v in (3.0, 2.0))
    optimizer = SAM([{"params": [a], "rho": 0.5}, {"params": [b]}], torch.optim.SGD, rho=0.1, lr=0.1)
    a.grad, b.grad = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double()
    optimizer.first_step()
    torch.testing.assert_close(
        a.detach(), torch.tensor([3.0 + 0.5 * 3 / 5, 1.0], dtype=torch.float64), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        b.detach(), torch.tensor([2.0, 1.0 + 0.1 * 4 / 5], dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_asam_group_that_is_not_adaptive_has_unit_scale():
    weight, bias = (nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64)) for _ in range(2))
    optimizer = ASAM([{"params": [weight]}, {"params": [bias], "adaptive": False}], torch.optim.SGD, rho=1.0, lr=0.1)
    weight.grad, bias.grad = torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0, -1.0]).double()
    optimizer.first_step()
    length = (2**2 + 3**2 + 1 + 1) ** 0.5
    moved = torch.tensor([2.0 + 4 / length, -3.0 + 9 / length]).double()
    torch.testing.assert_close(weight.detach(), moved, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        bias.detach(), torch.tensor([2 + 1 / length, -3 - 1 / length]).double(), rtol=1e-6, atol=0
    )


def test_adaptive_perturbation_does_not_see_a_rescaled_layer():
    params, grads = random_lists()
    (e,) = compute_perturbation([AdaptiveAscent(rho=0.5)], [grads], [params])
    scaled = [10 * params[0], *params[1:]], [grads[0] / 10, *grads[1:]]
    (f,) = compute_perturbation([AdaptiveAscent(rho=0.5)], [scaled[1]], [scaled[0]])
    torch.testing.assert_close(f, [10 * e[0], *e[1:]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", [L2Ascent(rho=0.5), AdaptiveAscent(rho=0.5, eta=0.1)])
def test_zero_gradient_gives_zero_perturbation(rule):
    params, _ = random_lists()
    (actual,) = compute_perturbation([rule], [[torch.zeros_like(p) for p in params]], [params])
    assert_bitwise(actual, [torch.zeros_like(p) for p in params])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-10, 1.0, 1e25])
def test_perturbation_has_length_rho_whatever_the_size_of_the_gradient(dtype, size):
    grad = torch.tensor([3.0, 4.0], dtype=dtype) * size
    (actual,), *_ = compute_perturbation([L2Ascent(rho=0.05)], [[grad]], [[torch.ones_like(grad)]])
    if size == 1e-44 and dtype != torch.float64:  # subnormal: the factor rho / ||g|| would be infinite
        assert actual.isfinite().all()
        assert actual.norm() < 0.05
    else:
        torch.testing.assert_close(actual.norm().item(), 0.05, rtol=1e-5, atol=0)


def test_half_adaptive_products_do_not_vanish():
    w, g = torch.full((4,), 0.01).half(), torch.full((4,), 1e-6).half()
    (actual,), *_ = compute_perturbation([AdaptiveAscent(rho=1.0)], [[g]], [[w]])
    torch.testing.assert_close(actual.float(), torch.full((4,), w[0].item() / 2), rtol=1e-3, atol=0)


def test_maximize_looks_downhill():
    param = nn.Parameter(torch.zeros(2))
    optimizer = SAM([param], torch.optim.SGD, rho=1.0, lr=0.1, maximize=True)
    param.grad = torch.tensor([3.0, 4.0])
    optimizer.first_step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.6, -0.8]))


# norm -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [None, True, False])
def test_norm_of_mixed_dtypes(foreach):
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float16, torch.float64, torch.complex64, torch.bfloat16, torch.float32, torch.float16]
    tensors = [torch.randn(5, generator=generator).to(dtype) for dtype in dtypes]
    expected = sum((t.to(torch.complex128).abs() ** 2).sum() for t in tensors).sqrt()
    actual = norm([*tensors, torch.zeros(0)], foreach=foreach)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_norm_of_halves_is_float32_and_does_not_overflow():
    actual = norm([torch.full((100,), 60000.0).half()])
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.item(), 60000.0 * 10, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_norm_of_a_bad_entry_is_not_finite(bad):
    assert not norm([torch.ones(3), torch.tensor([0.0, bad])]).isfinite()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_tensors_are_scaled_by_the_factor_itself(dtype, foreach):
    """Not by the factor rounded to their type, as torch's fused form does on CPUs."""
    x = torch.linspace(-2, 2, 1001).to(dtype)
    scaled = x.clone()
    scale_([scaled], 1.2345678, foreach=foreach)
    assert torch.equal(scaled, (x.double() * 1.2345678).to(dtype))


def test_norm_of_nothing_is_zero():
    assert norm([]).item() == norm([torch.zeros(0)]).item() == norm([torch.zeros(3)]).item() == 0.0


# weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("size", [1e-3, 1e4, float("nan")])
def test_restore_is_exact_and_in_place(dtype, size):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(7, generator=generator).to(dtype)) for _ in range(3)]
    params.append(nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype).t()))
    before, pointers = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    backup = perturb(params, [torch.full_like(p, size) for p in params])
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    restore(params, backup)
    assert_bitwise(params, before)
    assert [p.data_ptr() for p in params] == pointers
    assert all(p.requires_grad and p.is_leaf for p in params)


def test_perturbed_restores_after_an_exception():
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(KeyError, match="inside"), perturbed([param], [torch.ones(2)]):
        assert param.tolist() == [2.0, 2.0]
        raise KeyError("inside")
    assert param.tolist() == [1.0, 1.0]


def test_perturb_refuses_lists_that_do_not_match():
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"^perturbation must have 1 tensors, one a parameter, got 2\.$"):
        perturb([param], [torch.ones(2), torch.ones(2)])
    with pytest.raises(ValueError, match=r"^perturbation 0 must have shape \[2\], got \[3\]\.$"):
        perturb([param], [torch.ones(3)])
    assert param.tolist() == [1.0, 1.0]


# rules and checks -----------------------------------------------------------------------------------------------------


def test_rules_check_themselves():
    with pytest.raises(ValueError, match=r"^rho must be >= 0, got -1\.$"):
        L2Ascent(rho=-1)
    with pytest.raises(ValueError, match=r"^eta must be finite, got inf\.$"):
        AdaptiveAscent(rho=1.0, eta=float("inf"))


@pytest.mark.parametrize("value", [0, 1.5, True, "2"])
def test_counts_are_whole_numbers(value):
    with pytest.raises(ValueError, match=r"^k must be an integer >= 1, got "):
        check_count("k", value, at_least=1)
