"""Sharpness against dense Hessians, closed forms, and the state that the model must be left in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_cases import make_batch, make_model, true_perturbation
from sam_core import compute_hessian_vector_product, compute_sam_sharpness, power_iteration_top_eigenvalue, sharpness

cross_entropy = nn.functional.cross_entropy


def dense_hessian(model, loss_fn, inputs, targets):
    model = copy.deepcopy(model).eval()
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)

    def loss(flat):
        pieces = torch.split(flat, [p.numel() for p in params.values()])
        values = {name: piece.view(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        return loss_fn(functional_call(model, values, inputs), targets)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        return hessian(loss, torch.cat([p.flatten() for p in params.values()]))


class TwoInputs(nn.Module):
    """A tuple input, a frozen part, dropout, batch statistics, attention and tied weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(5, 4)
        self.b = nn.Linear(5, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.block = nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, dropout=0.3, batch_first=True)
        self.out = nn.Linear(4, 4)
        self.out.weight = self.block.self_attn.out_proj.weight
        self.double()

    def forward(self, x, y):
        hidden = self.norm(torch.tanh(self.a(x)) + self.b(y))
        return self.out(self.block(hidden[:, None])[:, 0])


@pytest.fixture(params=["mlp", "mlp frozen", "two inputs"])
def case(request):
    inputs, targets = make_batch()
    if request.param == "two inputs":
        return TwoInputs(), (inputs, inputs.flip(0)), targets
    model = make_model()
    if request.param == "mlp frozen":
        model[0].weight.requires_grad_(False)
    return model, inputs, targets


def test_hessian_vector_product_against_the_dense_hessian(case):
    model, inputs, targets = case
    dense = dense_hessian(model, cross_entropy, inputs, targets)
    for seed in range(2):
        vector = torch.randn(len(dense), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        actual = compute_hessian_vector_product(model, cross_entropy, inputs, targets, vector)
        torch.testing.assert_close(actual, dense @ vector, rtol=1e-9, atol=1e-11)


def test_top_eigenvalue_against_the_dense_hessian(case):
    model, inputs, targets = case
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, inputs, targets))
    expected = max(eigenvalues.tolist(), key=abs)
    actual = power_iteration_top_eigenvalue(model, cross_entropy, inputs, targets, n_iterations=500, tol=1e-10)
    assert actual == pytest.approx(expected, rel=1e-6)


def test_top_eigenvalue_of_least_squares():
    """The Hessian of mean (x . w - y)^2 is 2 X'X / n, whatever w."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, k, generator=generator, dtype=torch.float64) for k in (4, 1))
    model = nn.Linear(4, 1, bias=False).double()
    expected = 2 * torch.linalg.matrix_norm(x, 2).item() ** 2 / 50
    assert power_iteration_top_eigenvalue(model, nn.functional.mse_loss, x, y, tol=1e-12) == pytest.approx(expected)


class Quadratic(nn.Module):
    """L(w) = scale/2 sum_i lambda_i w_i^2, through inputs = lambda."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float64))

    def forward(self, eigenvalues):
        return 0.5 * (eigenvalues * self.w**2).sum()


def value(output, targets):
    return output


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize(
    ("eigenvalues", "expected"), [((-5.0, 3.0, 1.0), -5.0), ((5.0, -3.0), 5.0), ((-0.5, -0.1), -0.5)]
)
def test_top_eigenvalue_is_signed_and_its_tolerance_relative(eigenvalues, expected, scale):
    inputs = torch.tensor(eigenvalues, dtype=torch.float64) * scale
    model = Quadratic([1.0] * len(eigenvalues))
    assert power_iteration_top_eigenvalue(model, value, inputs, None) == pytest.approx(expected * scale, rel=1e-4)


@pytest.mark.parametrize("small", [-2.0, -1.98])
def test_top_eigenvalue_where_two_signs_compete(small):
    """Where v . H v may come out as anything between +2 and -2."""
    model = Quadratic([1.0] * 3)
    inputs = torch.tensor([2.0, small, 0.5], dtype=torch.float64)
    assert abs(power_iteration_top_eigenvalue(model, value, inputs, None)) == pytest.approx(2.0, rel=0.01)


def test_top_eigenvalue_of_a_zero_hessian():
    model = nn.Linear(3, 1)
    assert power_iteration_top_eigenvalue(model, lambda out, t: out.sum(), torch.ones(2, 3), None) == 0.0
    assert power_iteration_top_eigenvalue(model, lambda out, t: out.sum() * 0, torch.ones(2, 3), None) == 0.0


def test_power_iteration_takes_its_start_from_the_generator():
    model, inputs = Quadratic([1.0] * 3), torch.tensor([2.0, 1.9, 1.8], dtype=torch.float64)
    results = [
        power_iteration_top_eigenvalue(
            model, value, inputs, None, n_iterations=1, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("rho", [0.0, 0.05, 0.5])
def test_sam_sharpness_against_the_formula(case, rho):
    model, inputs, targets = case
    twin = copy.deepcopy(model).eval()
    params = [p for p in twin.parameters() if p.requires_grad]
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    loss = cross_entropy(twin(*arguments), targets)
    moves = true_perturbation([p.detach() for p in params], torch.autograd.grad(loss, params), rho, None)
    with torch.no_grad():
        for param, move in zip(params, moves, strict=True):
            param.add_(move)
        expected = (cross_entropy(twin(*arguments), targets) - loss).item()
    actual = compute_sam_sharpness(model, cross_entropy, inputs, targets, rho=rho)
    assert actual == pytest.approx(expected, rel=1e-8, abs=1e-14)
    assert actual > 0 or rho == 0


def test_sam_sharpness_of_least_squares():
    """For L = |w|^2/2:  ((|w| + rho)^2 - |w|^2) / 2."""
    model = Quadratic([3.0, 4.0])
    actual = compute_sam_sharpness(model, value, torch.ones(2, dtype=torch.float64), None, rho=0.1)
    assert actual == pytest.approx((5.1**2 - 5**2) / 2, rel=1e-12)
    assert compute_sam_sharpness(Quadratic([0.0, 0.0]), value, torch.ones(2).double(), None) == 0.0


class Restless(nn.Module):
    """Writes a buffer and draws random numbers in eval mode too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3).double()
        self.register_buffer("num_calls", torch.tensor(0))

    def forward(self, x):
        self.num_calls += 1
        return self.linear(x) + torch.randn(3)


CHEAP = {
    sharpness.power_iteration_top_eigenvalue: {"n_iterations": 3},
    sharpness.compute_top_eigenvalues: {"k": 2, "max_products": 3},
    sharpness.compute_hessian_trace: {"num_products": 6},
    sharpness.compute_spectral_density: {"num_runs": 1, "num_steps": 2},
    sharpness.compute_hessian: {},
    sharpness.compute_hessian_sharpness: {"max_dense": 0, "num_trace_products": 2, "top_k": 1},
    sharpness.compute_m_sharpness: {"m": 8},
    sharpness.compute_worst_case_sharpness: {"num_steps": 2, "num_restarts": 1},
    sharpness.compute_average_sharpness: {"num_draws": 2},
    sharpness.compute_loss_landscape: {"num_points": 3},
}


@pytest.mark.parametrize("make", [TwoInputs, Restless])
def test_model_is_left_exactly_as_found(make):
    model = make()
    next(model.children()).eval()
    inputs, targets = make_batch()
    inputs = (inputs, inputs) if make is TwoInputs else inputs
    for number, param in enumerate(model.parameters()):
        param.grad = torch.full_like(param, 7.0) if number % 2 else None
    vector = torch.ones(sum(p.numel() for p in model.parameters() if p.requires_grad), dtype=torch.float64)

    def everything():
        return (
            [module.training for module in model.modules()],
            [p.data_ptr() for p in model.parameters()],
            [p.detach().clone() for p in model.parameters()],
            [p.grad.clone() for p in model.parameters() if p.grad is not None],
            [buffer.clone() for buffer in model.buffers()],
            [torch.get_rng_state()],
            torch.is_grad_enabled(),
        )

    before = everything()
    rises = [compute_sam_sharpness(model, cross_entropy, inputs, targets) for _ in range(2)]
    with torch.no_grad():
        product = compute_hessian_vector_product(model, cross_entropy, inputs, targets, vector)
    for measure, options in CHEAP.items():
        results = [measure(model, cross_entropy, inputs, targets, **options) for _ in range(2)]
        assert repr(results[0]) == repr(results[1]), measure  # nothing but the arguments decides
        torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError):
        compute_sam_sharpness(model, lambda out, t: 1 / 0, inputs, targets)
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    assert rises[0] == rises[1]
    assert not product.requires_grad


def test_errors():
    model, (inputs, targets) = make_model(), make_batch()
    with pytest.raises(ValueError, match=r"^rho must be >= 0, got -1\.$"):
        compute_sam_sharpness(model, cross_entropy, inputs, targets, rho=-1)
    with pytest.raises(ValueError, match=r"^loss_fn must return a scalar, got shape \[16, 3\]\.$"):
        compute_sam_sharpness(model, value, inputs, targets)
    with pytest.raises(ValueError, match=r"^vector must have shape \[39\], got \[3\]\.$"):
        compute_hessian_vector_product(model, cross_entropy, inputs, targets, torch.ones(3))
    with pytest.raises(ValueError, match=r"^n_iterations must be an integer >= 1, got 0\.$"):
        power_iteration_top_eigenvalue(model, cross_entropy, inputs, targets, n_iterations=0)
    with pytest.raises(ValueError, match=r"^tol must be finite, got nan\.$"):
        power_iteration_top_eigenvalue(model, cross_entropy, inputs, targets, tol=float("nan"))
    model.requires_grad_(False)
    message = r"^model must have a parameter that requires a gradient, got none\.$"
    for measure in (compute_sam_sharpness, power_iteration_top_eigenvalue):
        with pytest.raises(ValueError, match=message):
            measure(model, cross_entropy, inputs, targets)
