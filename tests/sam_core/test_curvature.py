"""Spectrum, trace and density against the dense Hessian, closed forms and two other libraries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sam_cases import make_batch, make_model
from sam_core.sharpness import (
    compute_hessian,
    compute_hessian_sharpness,
    compute_hessian_trace,
    compute_hessian_vector_product,
    compute_spectral_density,
    compute_top_eigenvalues,
    hessian_operator,
    power_iteration_top_eigenvalue,
)
from sam_core.sharpness.lanczos import find_eigenpairs, tridiagonalize

cross_entropy = nn.functional.cross_entropy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic(nn.Module):
    """L(w) = w^T A w / 2 over inputs A."""

    def __init__(self, num_entries: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(num_entries, dtype=dtype))

    def forward(self, matrix):
        return self.w @ matrix @ self.w / 2


def value(output, targets):
    return output


def symmetric(eigenvalues, seed: int = 0):
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=seeded(seed)).double()).Q
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


# The Hessian itself ---------------------------------------------------------------------------------------------------


def test_hessian_of_least_squares():
    """2 X'X / n, whatever w."""
    x, y = torch.randn(50, 4, generator=seeded()).double(), torch.randn(50, 1, generator=seeded(1)).double()
    model = nn.Linear(4, 1, bias=False).double()
    torch.testing.assert_close(compute_hessian(model, nn.functional.mse_loss, x, y), 2 * x.T @ x / 50)


def test_hessian_of_logistic_regression():
    """X' diag(p (1 - p)) X / n."""
    x, y = torch.randn(50, 4, generator=seeded()).double(), torch.randint(2, (50, 1), generator=seeded(1)).double()
    model = nn.Linear(4, 1, bias=False).double()
    p = torch.sigmoid(model(x)).detach()
    expected = x.T @ (p * (1 - p) * x) / 50
    actual = compute_hessian(model, nn.functional.binary_cross_entropy_with_logits, x, y)
    torch.testing.assert_close(actual, expected)


def test_hessian_of_softmax_regression():
    """mean (diag(p) - p p') kron x x', for weights stored class by class."""
    x, y = torch.randn(30, 4, generator=seeded()).double(), torch.randint(3, (30,), generator=seeded(1))
    model = nn.Linear(4, 3, bias=False).double()
    p = model(x).softmax(dim=1).detach()
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nij,nk,nl->ikjl", blocks, x, x).reshape(12, 12) / 30
    torch.testing.assert_close(compute_hessian(model, cross_entropy, x, y), expected)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_hessian_is_that_of_torch(chunk_size):
    model, (inputs, targets) = make_model(), make_batch()
    names = [name for name, _ in model.named_parameters()]

    def loss(*params):
        outputs = torch.func.functional_call(model, dict(zip(names, params, strict=True)), (inputs,))
        return cross_entropy(outputs, targets)

    blocks = torch.autograd.functional.hessian(loss, tuple(model.parameters()))
    sizes = [p.numel() for p in model.parameters()]
    rows = [torch.cat([b.reshape(n, -1) for b in row], dim=1) for n, row in zip(sizes, blocks, strict=True)]
    actual = compute_hessian(model, cross_entropy, inputs, targets, chunk_size=chunk_size)
    torch.testing.assert_close(actual, torch.cat(rows), rtol=1e-10, atol=1e-12)
    assert torch.equal(actual, actual.T)


def test_hessian_refuses_a_large_model():
    with pytest.raises(ValueError, match=r"^model must have at most max_entries = 38 trainable entries, got 39; "):
        compute_hessian(make_model(), cross_entropy, *make_batch(), max_entries=38)


def test_operator_multiplies_vectors_and_blocks():
    model, (inputs, targets) = make_model(), make_batch()
    dense = compute_hessian(model, cross_entropy, inputs, targets)
    block = torch.randn(len(dense), 3, generator=seeded()).double()
    with hessian_operator(model, cross_entropy, inputs, targets) as hessian:
        for _ in range(2):  # the second time with the graph kept
            torch.testing.assert_close(hessian @ block, dense @ block, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(hessian @ block[:, 0], dense @ block[:, 0], rtol=1e-10, atol=1e-12)
        assert not (hessian @ block).requires_grad
        with pytest.raises(ValueError, match=r"^vector must have shape \[39\] or \[39, k\], got \[38\]\.$"):
            hessian @ torch.ones(38)


# Batches and loaders --------------------------------------------------------------------------------------------------


class Pairs(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.layers = make_model()

    def forward(self, x, y):
        return self.layers(x + y)


@pytest.mark.parametrize("form", ["list", "loader", "shuffled"])
@pytest.mark.parametrize("two_inputs", [False, True])
def test_a_loader_of_unequal_batches_is_the_batch_of_all(form, two_inputs):
    inputs, targets = make_batch()
    model = Pairs() if two_inputs else make_model()
    whole = (inputs, inputs.flip(0)) if two_inputs else inputs
    if form == "list":
        parts = [slice(0, 3), slice(3, 16)]
        loader = [(tuple(t[p] for t in whole) if two_inputs else whole[p], targets[p]) for p in parts]
    else:
        samples = [((x, whole[1][i]) if two_inputs else x, targets[i]) for i, x in enumerate(inputs)]
        loader = DataLoader(samples, batch_size=5, shuffle=form == "shuffled")
    expected = compute_hessian(model, cross_entropy, whole, targets)
    state = torch.get_rng_state()
    torch.testing.assert_close(compute_hessian(model, cross_entropy, loader), expected, rtol=1e-10, atol=1e-12)
    vector = torch.randn(39, 2, generator=seeded()).double()
    with hessian_operator(model, cross_entropy, loader) as hessian:
        torch.testing.assert_close(hessian @ vector, expected @ vector, rtol=1e-10, atol=1e-12)
    top = power_iteration_top_eigenvalue(model, cross_entropy, loader, n_iterations=500, tol=1e-12)
    assert top == pytest.approx(max(torch.linalg.eigvalsh(expected).tolist(), key=abs), rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


class Counted(list):
    """Batches that are counted as they are taken."""

    num_taken = 0

    def __iter__(self):
        for batch in list.__iter__(self):
            self.num_taken += 1
            yield batch


@pytest.mark.parametrize(("room", "num_passes"), [(2**28, 2), (3_000, 5), (0, 5)])
def test_graphs_of_a_loader_are_kept_where_they_are_small(room, num_passes, monkeypatch):
    """3,000 bytes hold the graph of the first batch alone."""
    monkeypatch.setattr("sam_core.sharpness.hessian._KEPT_BYTES", room)
    inputs, targets = make_batch()
    loader = Counted([(inputs[:6], targets[:6]), (inputs[6:], targets[6:])])
    dense = compute_hessian(make_model(), cross_entropy, inputs, targets)
    vectors = torch.randn(39, 3, generator=seeded()).double()
    with hessian_operator(make_model(), cross_entropy, loader) as hessian:
        for product in [hessian @ vectors for _ in range(4)] + [(hessian @ vectors[:, :1])]:
            expected = dense @ vectors[:, : product.shape[1]]
            torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)
    assert loader.num_taken == 2 * num_passes


def test_a_loader_without_batches_is_refused():
    used_up = iter([make_batch()])
    compute_hessian_vector_product(make_model(), cross_entropy, used_up, None, torch.ones(39).double())
    for empty in ([], used_up):
        with pytest.raises(ValueError, match=r"^inputs must give at least one batch \(inputs, targets\) each time"):
            compute_hessian(make_model(), cross_entropy, empty)


def test_a_loader_must_let_its_samples_be_counted():
    with pytest.raises(
        ValueError, match=r"^inputs must give batches whose targets or inputs are tensors \[n, \.\.\.\]"
    ):
        compute_hessian(Quadratic(2), value, [(torch.tensor(1.0), None)])


# Lanczos --------------------------------------------------------------------------------------------------------------

SPECTRA = {
    "one": [3.0],
    "zero": [0.0] * 12,
    "negative": torch.linspace(-5, -1, 40),
    "even": torch.linspace(-1, 1, 101),
    "wide": torch.logspace(-8, 3, 120),
    "multiple": [5.0] * 3 + [1.0] * 40 + [0.0] * 60,
    "low rank": [9.0, 4.0, -2.0] + [0.0] * 97,
    "outliers": [100.0, 50.0, *torch.linspace(0, 0.1, 150).tolist()],
}


def wanted(eigenvalues, which, k):
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    key = {"largest": eigenvalues, "smallest": -eigenvalues, "magnitude": eigenvalues.abs()}[which]
    return eigenvalues[key.argsort(descending=True)[: min(k, len(eigenvalues))]]


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_top_eigenvalues_of_known_spectra(spectrum, which):
    matrix = symmetric(SPECTRA[spectrum])
    model, k = Quadratic(len(matrix)), 4
    found = compute_top_eigenvalues(model, value, matrix, None, k, which=which, tol=1e-7, max_products=2000)
    expected = wanted(SPECTRA[spectrum], which, k)
    scale = max(torch.as_tensor(SPECTRA[spectrum]).abs().max().item(), 1e-12)
    crowded = (spectrum, which) == ("wide", "smallest")  # a hundred eigenvalues closer than a hundredth of the norm
    atol = 2e-5 * scale if crowded else 1e-9 * scale
    torch.testing.assert_close(found.eigenvalues.abs(), expected.abs(), rtol=0, atol=atol)
    product = matrix @ found.eigenvectors - found.eigenvectors * found.eigenvalues
    torch.testing.assert_close(product.norm(dim=0), found.residuals, rtol=1e-3, atol=1e-12 * scale)
    gram = found.eigenvectors.T @ found.eigenvectors
    torch.testing.assert_close(gram, torch.eye(len(expected)).double(), rtol=0, atol=1e-10)
    assert found.residuals.max() <= 1e-7 * scale or (crowded and found.num_products == 2000)


def test_restarts_keep_the_basis_small():
    matrix = symmetric(torch.linspace(-1, 1, 300))
    small = compute_top_eigenvalues(Quadratic(300), value, matrix, None, 3, tol=1e-6, basis_size=8, max_products=3000)
    torch.testing.assert_close(small.eigenvalues, wanted(torch.linspace(-1, 1, 300), "largest", 3), rtol=0, atol=1e-9)
    assert small.num_products > 8


def test_too_few_products_show_in_the_residuals():
    matrix = symmetric(torch.linspace(-1, 1, 300))
    found = compute_top_eigenvalues(Quadratic(300), value, matrix, None, 3, tol=0.0, max_products=15)
    assert found.num_products == 15
    true = wanted(torch.linspace(-1, 1, 300), "largest", 3)
    assert found.residuals.max() > 1e-3
    assert all((torch.linspace(-1, 1, 300).double() - v).abs().min() <= r for v, r in zip(*found[::2], strict=True))
    assert (found.eigenvalues <= true + 1e-12).all()


def test_single_precision_reaches_its_own_accuracy():
    matrix = symmetric(SPECTRA["wide"])
    found = compute_top_eigenvalues(Quadratic(120, torch.float32), value, matrix.float(), None, 5, tol=1e-5)
    torch.testing.assert_close(found.eigenvalues, wanted(SPECTRA["wide"], "largest", 5), rtol=1e-5, atol=1e-3)


def test_lanczos_needs_fewer_products_than_power_iteration():
    matrix, calls = symmetric(torch.linspace(0, 1, 200)), []

    def multiply(v):
        calls.append(1)
        return matrix @ v

    pairs = find_eigenpairs(multiply, matrix[0], 200, 1, "largest", seeded(), basis_size=22, max_products=300, tol=1e-3)
    power = power_iteration_top_eigenvalue(Quadratic(200), value, matrix, None, n_iterations=len(calls), tol=0.0)
    assert abs(pairs.eigenvalues[0] - 1) < 1e-4 < abs(power - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"^k must be"),
        ({"which": "LA"}, r"^which must be one of 'largest', 'smallest', 'magnitude', got 'LA'\.$"),
        ({"tol": -1.0}, r"^tol must be >= 0"),
        ({"k": 5, "max_products": 4}, r"^max_products must be"),
        ({"k": 5, "basis_size": 5}, r"^basis_size must be"),
    ],
)
def test_bad_options_of_top_eigenvalues(options, message):
    with pytest.raises(ValueError, match=message):
        compute_top_eigenvalues(make_model(), cross_entropy, *make_batch(), **options)


# Trace ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace_is_unbiased_and_knows_its_error(method):
    """Over many generators the mean is the trace, and the errors are normal with the stated deviation."""
    matrix = symmetric(torch.logspace(-2, 1, 60))
    truth = float(torch.logspace(-2, 1, 60).double().sum())
    estimates = [
        compute_hessian_trace(Quadratic(60), value, matrix, None, 30, method=method, generator=seeded(seed))
        for seed in range(60)
    ]
    scores = torch.tensor([(e.value - truth) / e.standard_error for e in estimates])
    assert abs(float(scores.mean())) < 4 * float(scores.std()) / math.sqrt(60)
    assert 0.6 < float(scores.std()) < 1.6
    assert all(e.num_products <= 30 for e in estimates)


def test_hutch_plus_plus_has_the_smaller_variance_where_few_eigenvalues_dominate():
    matrix = symmetric([100.0, 50.0, 20.0] + [0.1] * 97)
    errors = {
        method: [
            compute_hessian_trace(Quadratic(100), value, matrix, None, 30, method=method, generator=seeded(s)).value
            - 179.7
            for s in range(20)
        ]
        for method in ("hutchinson", "hutch++")
    }
    deviations = {method: torch.tensor(values).square().mean().sqrt() for method, values in errors.items()}
    assert deviations["hutch++"] < deviations["hutchinson"] / 100


def test_trace_of_a_small_hessian_is_exact():
    model, batch = make_model(), make_batch()
    truth = compute_hessian(model, cross_entropy, *batch).trace()
    estimate = compute_hessian_trace(model, cross_entropy, *batch, 3 * 39)
    assert estimate.value == pytest.approx(float(truth), rel=1e-10)
    assert estimate.standard_error == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "xtrace"}, r"^method must be one of 'hutch\+\+', 'hutchinson', got 'xtrace'\.$"),
        ({"num_products": 5}, r"^num_products must be"),
        ({"num_products": 1, "method": "hutchinson"}, r"^num_products must be"),
    ],
)
def test_bad_options_of_the_trace(options, message):
    with pytest.raises(ValueError, match=message):
        compute_hessian_trace(make_model(), cross_entropy, *make_batch(), **options)


# Density --------------------------------------------------------------------------------------------------------------


def test_quadrature_is_exact_for_polynomials():
    matrix, start = symmetric(SPECTRA["even"]), torch.randn(101, generator=seeded()).double()
    nodes, weights = tridiagonalize(lambda v: matrix @ v, start, 6)
    unit = start / start.norm()
    for degree in range(12):
        expected = unit @ torch.linalg.matrix_power(matrix, degree) @ unit
        torch.testing.assert_close((weights * nodes**degree).sum(), expected, rtol=0, atol=1e-12)
    assert abs((weights * nodes**12).sum() - unit @ torch.linalg.matrix_power(matrix, 12) @ unit) > 1e-8


def test_density_integrates_to_one_and_gives_the_moments():
    model, batch = make_model(), make_batch()
    dense = compute_hessian(model, cross_entropy, *batch)
    density = compute_spectral_density(model, cross_entropy, *batch, num_runs=200, num_steps=12)
    points = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    assert float(torch.trapezoid(density.evaluate(points, 0.02), points)) == pytest.approx(1.0, abs=1e-6)
    for power in (1, 2):
        mean, error = density.mean(lambda x, power=power: x**power)
        truth = float(torch.linalg.matrix_power(dense, power).trace()) / 39
        assert abs(mean - truth) < 4 * error
        assert error < 0.2 * truth


def test_density_shows_two_clusters_and_their_shares():
    matrix = symmetric([0.0] * 90 + [5.0] * 10)
    density = compute_spectral_density(Quadratic(100), value, matrix, None, num_runs=60, num_steps=10)
    share, error = density.mean(lambda x: (x > 2.5).double())
    assert abs(share - 0.1) < 4 * error
    peaks = density.evaluate(torch.tensor([0.0, 2.5, 5.0]), 0.1)
    assert peaks[0] > peaks[2] > 1e-3 > peaks[1]
    assert density.num_products <= 60 * 3  # two eigenvalues: the Krylov space is exhausted


def test_density_of_the_same_generator_is_the_same():
    runs = [
        compute_spectral_density(
            make_model(), cross_entropy, *make_batch(), num_runs=1, num_steps=5, generator=seeded(seed)
        ).nodes
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_density_and_its_plot(tmp_path):
    density = compute_spectral_density(make_model(), cross_entropy, *make_batch())
    density.plot(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"^sigma must be > 0, got 0\.0\.$"):
        density.evaluate(torch.zeros(1), 0.0)


# The report -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_dense", [0, 1000])
def test_report_against_the_dense_hessian(max_dense):
    model, batch = make_model(), make_batch()
    values = torch.linalg.eigvalsh(compute_hessian(model, cross_entropy, *batch)).flip(0)
    report = compute_hessian_sharpness(
        model, cross_entropy, *batch, top_k=3, max_dense=max_dense, num_trace_products=2000
    )
    assert report["max_eigenvalue"] == pytest.approx(float(values[0]), rel=1e-5)
    assert report["top_k_eigenvalues"] == pytest.approx(values[:3].tolist(), rel=1e-4)
    assert report["min_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-4)
    if max_dense:
        assert report["trace"] == pytest.approx(float(values.sum()), rel=1e-10)
        assert report["trace_standard_error"] == 0.0
    else:
        assert abs(report["trace"] - float(values.sum())) < 4 * report["trace_standard_error"]
        assert 0 < report["trace_standard_error"] < 0.05 * float(values.sum())
    assert report["frobenius_norm"] == pytest.approx(float(values.norm()), rel=1e-10 if max_dense else 0.05)


def test_report_of_a_model_smaller_than_top_k():
    report = compute_hessian_sharpness(Quadratic(2), value, torch.diag(torch.tensor([2.0, -1.0])).double(), None)
    assert report["top_k_eigenvalues"] == pytest.approx([2.0, -1.0])
    assert report["min_eigenvalue"] == pytest.approx(-1.0)


def test_report_of_a_zero_hessian():
    report = compute_hessian_sharpness(Quadratic(3), value, torch.zeros(3, 3).double(), None)
    assert report.pop("top_k_eigenvalues") == [0.0, 0.0, 0.0]
    assert set(report.values()) == {0.0}


# Other libraries ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # its own import makes it
def test_curvlinops_agrees():
    import curvlinops

    model, (inputs, targets) = make_model(), make_batch()
    operator = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(inputs, targets)], check_deterministic=False
    )
    vector = torch.randn(39, generator=seeded()).double()
    ours = compute_hessian_vector_product(model, cross_entropy, inputs, targets, vector)
    torch.testing.assert_close(ours, operator @ vector, rtol=1e-10, atol=1e-12)


def test_hessian_eigenthings_agrees():
    import hessian_eigenthings as other

    model, (inputs, targets) = make_model(), make_batch()
    operator = other.HessianOperator(model, [(inputs, targets)], other.supervised_loss(cross_entropy))
    theirs = other.lanczos(operator, k=3, which="LA", seed=0, max_iter=39).eigenvalues
    ours = compute_top_eigenvalues(model, cross_entropy, inputs, targets, 3, tol=1e-8).eigenvalues
    torch.testing.assert_close(ours, theirs.to(ours).sort(descending=True).values, rtol=1e-5, atol=1e-8)
