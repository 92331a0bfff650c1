"""Worst and average case, m-sharpness and landscapes against brute force, closed forms and each other."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sam_core
from sam_cases import copies, make_batch, make_model
from sam_core.sharpness import (
    compute_average_sharpness,
    compute_hessian,
    compute_hessian_sharpness,
    compute_loss_landscape,
    compute_m_sharpness,
    compute_sam_sharpness,
    compute_worst_case_sharpness,
)

cross_entropy = nn.functional.cross_entropy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bowl(nn.Module):
    """L(w) = w^T A w / 2 over inputs A."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float64))

    def forward(self, matrix):
        return self.w @ matrix @ self.w / 2


def value(output, targets):
    return output


def rise(model, move, inputs, targets):
    """L(w + e) - L(w), by hand."""
    twin = copy.deepcopy(model).eval()
    before = cross_entropy(twin(inputs), targets).item()
    with torch.no_grad():
        for param, piece in zip(twin.parameters(), move, strict=True):
            param.add_(piece)
    return cross_entropy(twin(inputs), targets).item() - before


# Worst case -----------------------------------------------------------------------------------------------------------


def trust_region_maximum(matrix, w, rho):
    """max_{||e|| = rho} L(w + e) - L(w) of a bowl, by its secular equation: (lambda - A) e = A w, ||e|| = rho."""
    eigenvalues, basis = torch.linalg.eigh(matrix)
    gradient = basis.T @ (matrix @ w)
    low, high = float(eigenvalues[-1]), float(eigenvalues[-1]) + float(gradient.norm()) / rho
    for _ in range(200):
        middle = (low + high) / 2
        if float((gradient / (middle - eigenvalues)).norm()) > rho:
            low = middle
        else:
            high = middle
    move = gradient / (high - eigenvalues)
    return float(gradient @ move + (eigenvalues * move.square()).sum() / 2)


@pytest.mark.parametrize("rho", [0.1, 1.0, 5.0])
def test_worst_case_of_a_bowl_is_that_of_the_trust_region(rho):
    matrix = torch.randn(6, 6, generator=seeded()).double()
    matrix = matrix @ matrix.T
    w = torch.randn(6, generator=seeded(1)).double()
    expected = trust_region_maximum(matrix, w, rho)
    actual = compute_worst_case_sharpness(Bowl(w), value, matrix, None, rho, num_steps=200)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert actual <= expected * (1 + 1e-9)


def test_worst_case_in_a_box_is_that_of_its_corners():
    """The maximum of a convex function over a box is at a corner."""
    matrix = torch.randn(6, 6, generator=seeded()).double()
    matrix, w = matrix @ matrix.T, torch.randn(6, generator=seeded(1)).double()
    corners = torch.cartesian_prod(*[torch.tensor([-0.3, 0.3], dtype=torch.float64)] * 6)
    ends = w + corners
    expected = float(((ends @ matrix) * ends).sum(dim=1).max() - w @ matrix @ w) / 2
    actual = compute_worst_case_sharpness(Bowl(w), value, matrix, None, 0.3, norm="linf", num_restarts=10)
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.05, 0.5, 5.0])
def test_worst_case_is_at_least_the_one_step_value_and_grows_with_the_effort(rho, adaptive):
    data = make_batch()
    model = make_model()
    one = compute_sam_sharpness(model, cross_entropy, *data, rho=rho, adaptive=adaptive, eta=0.01)
    values = [
        compute_worst_case_sharpness(
            model, cross_entropy, *data, rho, adaptive=adaptive, eta=0.01, num_steps=steps, num_restarts=restarts
        )
        for steps, restarts in ((1, 0), (10, 0), (30, 0), (30, 2))
    ]
    assert [one, *values] == sorted([one, *values])
    assert (values[-1] > one) if rho else values[-1] == one == 0.0


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_box_holds_the_ball(adaptive):
    """So its worst case is no less than one SAM step, even where a step of signs falls and one of lengths rises."""
    matrix = torch.diag(torch.tensor([1.0, -100.0])).double()
    options = {"rho": 0.5, "adaptive": adaptive, "eta": 0.01}
    one = compute_sam_sharpness(Bowl([1.0, -1e-4]), value, matrix, None, **options)
    box = compute_worst_case_sharpness(Bowl([1.0, -1e-4]), value, matrix, None, norm="linf", num_steps=1, **options)
    assert box >= one > 0
    if not adaptive:
        assert box == one  # a step of signs goes to (1.5, 0.5), far below


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_no_random_neighbour_is_worse(norm, adaptive):
    inputs, targets = make_batch()
    model, rho = make_model(), 0.3
    worst = compute_worst_case_sharpness(model, cross_entropy, inputs, targets, rho, norm=norm, adaptive=adaptive)
    sizes = [p.numel() for p in model.parameters()]
    for seed in range(200):
        u = torch.randn(sum(sizes), generator=seeded(seed)).double()
        u = rho * u / u.norm() if norm == "l2" else rho * u.sign()
        pieces = [piece.view_as(p) for piece, p in zip(u.split(sizes), model.parameters(), strict=True)]
        if adaptive:
            pieces = [piece * p.detach().abs() for piece, p in zip(pieces, model.parameters(), strict=True)]
        assert rise(model, pieces, inputs, targets) <= worst


def test_worst_case_needs_a_restart_at_a_saddle():
    matrix = torch.diag(torch.tensor([2.0, -1.0])).double()
    assert compute_worst_case_sharpness(Bowl([0.0, 0.0]), value, matrix, None, 0.5) == 0.0
    found = compute_worst_case_sharpness(Bowl([0.0, 0.0]), value, matrix, None, 0.5, num_restarts=1)
    assert found == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l1"}, r"^norm must be one of 'l2', 'linf', got 'l1'\.$"),
        ({"rho": -0.1}, r"^rho must be >= 0, got -0\.1\.$"),
        ({"eta": -1.0}, r"^eta must be >= 0, got -1\.0\.$"),
        ({"adaptive": "yes"}, r"^adaptive must be one of True, False, got 'yes'\.$"),
        ({"num_steps": 0}, r"^num_steps must be"),
        ({"num_restarts": -1}, r"^num_restarts must be"),
    ],
)
def test_bad_options_of_the_worst_case(options, message):
    with pytest.raises(ValueError, match=message):
        compute_worst_case_sharpness(make_model(), cross_entropy, *make_batch(), **options)


# One step, whole and in parts -----------------------------------------------------------------------------------------


def test_adaptive_sharpness_is_the_rise_at_asam_s_neighbour():
    inputs, targets = make_batch()
    model = make_model()
    optimizer = sam_core.ASAM(model.parameters(), torch.optim.SGD, rho=0.4, eta=0.02, lr=0.1)
    before = copies(model)
    loss = cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.first_step()
    move = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    optimizer.restore()
    actual = compute_sam_sharpness(model, cross_entropy, inputs, targets, rho=0.4, adaptive=True, eta=0.02)
    assert actual == pytest.approx(rise(model, move, inputs, targets), rel=1e-10)


@pytest.mark.parametrize("m", [1, 5, 16, 100])
def test_m_sharpness_is_the_mean_over_parts(m):
    inputs, targets = make_batch()
    model = make_model()
    parts = [(inputs[i : i + m], targets[i : i + m]) for i in range(0, 16, m)]
    rises = [len(y) * compute_sam_sharpness(model, cross_entropy, x, y, rho=0.2) for x, y in parts]
    actual = compute_m_sharpness(model, cross_entropy, inputs, targets, rho=0.2, m=m)
    assert actual == pytest.approx(math.fsum(rises) / 16, rel=1e-10)


def test_m_sharpness_takes_the_batches_of_a_loader():
    inputs, targets = make_batch()
    loader = DataLoader(list(zip(inputs, targets, strict=True)), batch_size=5)
    actual = compute_m_sharpness(make_model(), cross_entropy, loader, rho=0.2)
    expected = compute_m_sharpness(make_model(), cross_entropy, inputs, targets, rho=0.2, m=5)
    assert actual == pytest.approx(expected, rel=1e-12)
    whole = compute_sam_sharpness(make_model(), cross_entropy, loader, rho=0.2)
    assert whole == pytest.approx(compute_sam_sharpness(make_model(), cross_entropy, inputs, targets, rho=0.2))
    assert actual > whole


def test_m_must_be_a_count():
    with pytest.raises(ValueError, match=r"^m must be"):
        compute_m_sharpness(make_model(), cross_entropy, *make_batch(), m=0)


# Average case ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_rise_of_a_bowl(adaptive):
    """sigma^2 / 2 sum_i A_ii (w_i^2): exact for quadratics."""
    matrix = torch.randn(20, 20, generator=seeded()).double()
    matrix, w = matrix @ matrix.T, torch.randn(20, generator=seeded(1)).double()
    scale = w.square() if adaptive else torch.ones(20).double()
    expected = 0.01**2 / 2 * float((matrix.diagonal() * scale).sum())
    found = compute_average_sharpness(Bowl(w), value, matrix, None, 0.01, adaptive=adaptive, num_draws=400)
    assert abs(found.value - expected) < 4 * found.standard_error
    assert found.standard_error < 0.1 * expected
    assert found.num_products == 801


def test_average_rise_is_half_sigma_squared_times_the_trace():
    data, sigma = make_batch(), 1e-3
    model = make_model()
    trace = float(compute_hessian(model, cross_entropy, *data).trace())
    found = compute_average_sharpness(model, cross_entropy, *data, sigma, num_draws=300)
    assert abs(found.value - sigma**2 * trace / 2) < 4 * found.standard_error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -1.0}, r"^sigma must be >= 0"),
        ({"num_draws": 1}, r"^num_draws must be"),
        ({"adaptive": 3}, r"^adaptive"),
    ],
)
def test_bad_options_of_the_average(options, message):
    with pytest.raises(ValueError, match=message):
        compute_average_sharpness(make_model(), cross_entropy, *make_batch(), **options)


# What a rescaling of the network changes ------------------------------------------------------------------------------


def relu_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()


def rescaled(model, factor):
    """Another set of weights for the same function."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.mul_(factor)
        twin[2].weight.div_(factor)
    return twin


MEASURES = {
    "adaptive one step": lambda m, x, y: compute_sam_sharpness(m, cross_entropy, x, y, rho=0.2, adaptive=True),
    "adaptive worst case l2": lambda m, x, y: compute_worst_case_sharpness(m, cross_entropy, x, y, 0.2, adaptive=True),
    "adaptive worst case linf": lambda m, x, y: compute_worst_case_sharpness(
        m, cross_entropy, x, y, 0.2, norm="linf", adaptive=True
    ),
    "adaptive average": lambda m, x, y: compute_average_sharpness(m, cross_entropy, x, y, 0.2, adaptive=True).value,
    "filter-normalised landscape": lambda m, x, y: float(
        compute_loss_landscape(m, cross_entropy, x, y, num_directions=1, num_points=5).rise.sum()
    ),
    "one step": lambda m, x, y: compute_sam_sharpness(m, cross_entropy, x, y, rho=0.2),
    "worst case l2": lambda m, x, y: compute_worst_case_sharpness(m, cross_entropy, x, y, 0.2),
    "worst case linf": lambda m, x, y: compute_worst_case_sharpness(m, cross_entropy, x, y, 0.05, norm="linf"),
    "average": lambda m, x, y: compute_average_sharpness(m, cross_entropy, x, y, 0.2).value,
    "largest eigenvalue": lambda m, x, y: compute_hessian_sharpness(m, cross_entropy, x, y)["max_eigenvalue"],
    "trace": lambda m, x, y: compute_hessian_sharpness(m, cross_entropy, x, y)["trace"],
}
INVARIANT = ["adaptive one step", "adaptive worst case l2", "adaptive worst case linf", "adaptive average"]


@pytest.mark.parametrize("measure", MEASURES)
def test_which_measures_a_rescaled_network_keeps(measure):
    """Dinh et al. 2017: the same function, as sharp as one likes by every measure that does not follow the weights."""
    inputs, targets = make_batch()
    model = relu_network()
    twin = rescaled(model, 8.0)
    torch.testing.assert_close(twin(inputs), model(inputs))
    before, after = (MEASURES[measure](m, inputs, targets) for m in (model, twin))
    if measure in INVARIANT or measure == "filter-normalised landscape":
        assert after == pytest.approx(before, rel=1e-9)
    else:
        assert not 0.7 < after / before < 1.4


# Landscape ------------------------------------------------------------------------------------------------------------


def test_landscape_is_the_loss_at_its_points():
    inputs, targets = make_batch()
    model = make_model()
    directions = [torch.randn(39, generator=seeded(s)).double() for s in range(2)]
    surface = compute_loss_landscape(
        model, cross_entropy, inputs, targets, radius=0.5, num_points=3, normalization="none", directions=directions
    )
    assert surface.coordinates.tolist() == [-0.5, 0.0, 0.5]
    sizes = [p.numel() for p in model.parameters()]
    for i, a in enumerate(surface.coordinates):
        for j, b in enumerate(surface.coordinates):
            pieces = (a * directions[0] + b * directions[1]).split(sizes)
            move = [piece.view_as(p) for piece, p in zip(pieces, model.parameters(), strict=True)]
            assert float(surface.rise[i, j]) == pytest.approx(rise(model, move, inputs, targets), abs=1e-12)


def test_directions_are_normalised_by_filter():
    """A step of 1 moves each row by its own length, and biases not at all."""
    inputs, targets = make_batch()
    model = make_model()
    direction = torch.randn(39, generator=seeded()).double()
    line = compute_loss_landscape(
        model, cross_entropy, inputs, targets, num_directions=1, num_points=3, directions=[direction]
    )
    move = []
    for param, piece in zip(model.parameters(), direction.split([p.numel() for p in model.parameters()]), strict=True):
        piece = piece.view_as(param)
        rows = piece / piece.norm(dim=-1, keepdim=True) * param.detach().norm(dim=-1, keepdim=True)
        move.append(rows if param.ndim == 2 else torch.zeros_like(piece))
    assert float(line.rise[2]) == pytest.approx(rise(model, move, inputs, targets), abs=1e-12)
    assert float(line.rise[0]) == pytest.approx(rise(model, [-m for m in move], inputs, targets), abs=1e-12)


@pytest.mark.parametrize("num_directions", [1, 2])
def test_landscape_has_a_picture(num_directions, tmp_path):
    landscape = compute_loss_landscape(
        make_model(), cross_entropy, *make_batch(), num_directions=num_directions, num_points=5
    )
    assert landscape.losses.shape == (5,) * num_directions
    landscape.plot(tmp_path / "landscape.png")
    assert (tmp_path / "landscape.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 3}, r"^num_directions must be one of 1, 2, got 3\.$"),
        ({"radius": 0.0}, r"^radius must be > 0"),
        ({"num_points": 4}, r"^num_points must be odd, so that the middle one is w, got 4\.$"),
        ({"num_points": 1}, r"^num_points must be"),
        ({"normalization": "layer"}, r"^normalization must be one of 'filter', 'none', got 'layer'\.$"),
        ({"directions": [torch.ones(39)]}, r"^directions must be 2 vectors \[39\], got shapes \[\[39\]\]\.$"),
    ],
)
def test_bad_options_of_the_landscape(options, message):
    with pytest.raises(ValueError, match=message):
        compute_loss_landscape(make_model(), cross_entropy, *make_batch(), **options)
