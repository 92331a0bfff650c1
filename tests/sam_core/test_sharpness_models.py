"""Models, losses and loaders that the measures of sharpness take, and how they leave them."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sam_cases import make_batch, make_model
from sam_core import MSAM
from sam_core.sharpness import (
    compute_average_sharpness,
    compute_hessian,
    compute_hessian_sharpness,
    compute_hessian_trace,
    compute_hessian_vector_product,
    compute_loss_landscape,
    compute_m_sharpness,
    compute_sam_sharpness,
    compute_top_eigenvalues,
    compute_worst_case_sharpness,
    hessian_operator,
    power_iteration_top_eigenvalue,
)

cross_entropy = nn.functional.cross_entropy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_are_measured_in_single_precision(dtype):
    """In their own, w + e would round back to w."""
    model, (inputs, targets) = make_model(dtype), make_batch(dtype=dtype)
    model.register_buffer("half_buffer", torch.ones(2, dtype=dtype))
    model[0].bias.requires_grad_(False)
    single = copy.deepcopy(model).float()
    kept = copy.deepcopy(model.state_dict())
    for measure in (compute_hessian, compute_sam_sharpness, compute_worst_case_sharpness):
        actual = measure(model, cross_entropy, inputs, targets)
        torch.testing.assert_close(actual, measure(single, cross_entropy, inputs.float(), targets))
    report = compute_hessian_sharpness(model, cross_entropy, inputs, targets, max_dense=0)
    assert report["max_eigenvalue"] == pytest.approx(
        float(torch.linalg.eigvalsh(compute_hessian(single, cross_entropy, inputs.float(), targets))[-1]), rel=1e-3
    )
    torch.testing.assert_close(dict(model.state_dict()), dict(kept), rtol=0, atol=0)


def test_vectors_are_of_the_widest_type_and_keep_a_wider_one_of_their_own():
    model, batch = make_model(torch.float32), make_batch(dtype=torch.float32)
    ones = torch.ones(39)
    expected = compute_hessian_vector_product(model, cross_entropy, *batch, ones)
    for dtype, result in (
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        actual = compute_hessian_vector_product(model, cross_entropy, *batch, ones.to(dtype))
        assert actual.dtype == result
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0)
    mixed = nn.Sequential(nn.Linear(5, 4), _Double(), nn.Linear(4, 3).double())
    dense = compute_hessian(mixed, cross_entropy, *batch)
    product = compute_hessian_vector_product(mixed, cross_entropy, *batch, torch.ones(39, dtype=torch.float64))
    assert dense.dtype == product.dtype == torch.float64
    torch.testing.assert_close(product, dense.sum(dim=1), rtol=1e-5, atol=1e-6)


class _Double(nn.Module):
    def forward(self, x):
        return x.double()


def test_complex_parameters_are_refused():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(
        ValueError, match=r"^model must have real parameters, whole on each rank, got a complex 'weight'"
    ):
        compute_sam_sharpness(model, lambda out, t: out.abs().sum(), torch.ones(1, 2, dtype=torch.complex64), None)


# Losses ---------------------------------------------------------------------------------------------------------------


def test_a_penalty_on_the_parameters_is_part_of_the_loss():
    model, (inputs, targets) = make_model(), make_batch()

    def penalised(outputs, targets):
        return cross_entropy(outputs, targets) + 0.5 * sum(p.square().sum() for p in model.parameters())

    plain, actual = (compute_hessian(model, f, inputs, targets) for f in (cross_entropy, penalised))
    torch.testing.assert_close(actual, plain + torch.eye(39).double())
    ones = torch.ones(39).double()
    torch.testing.assert_close(
        compute_hessian_vector_product(model, penalised, inputs, targets, ones), plain.sum(dim=1) + 1
    )
    rises = [compute_sam_sharpness(model, f, inputs, targets, rho=0.5) for f in (cross_entropy, penalised)]
    assert rises[1] > rises[0] + 0.01


def test_a_loss_that_is_linear_in_some_parameters_or_has_none():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.curved, self.straight, self.unused = (nn.Parameter(torch.ones(2).double()) for _ in range(3))

        def forward(self, x):
            return (x * self.curved**2).sum() + (x * self.straight).sum()

    inputs = torch.tensor([1.0, 3.0], dtype=torch.float64)
    expected = torch.diag(torch.tensor([2.0, 6.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    for value in (lambda out, t: out, lambda out, t: out.detach() + 0.0):
        with hessian_operator(Partly(), value, inputs) as hessian:
            torch.testing.assert_close(hessian @ torch.eye(6).double(), expected)
            torch.testing.assert_close(hessian.dense(), expected)
        expected = torch.zeros_like(expected)


def _nan(outputs, targets):
    return cross_entropy(outputs, targets) * math.nan


@pytest.mark.parametrize("loader", [False, True])
def test_a_loss_that_is_not_finite_is_reported(loader):
    model, batch = make_model(), make_batch()
    data = ([batch], None) if loader else batch
    for measure in (
        compute_sam_sharpness,
        compute_m_sharpness,
        compute_worst_case_sharpness,
        compute_average_sharpness,
        compute_loss_landscape,
    ):
        with pytest.raises(FloatingPointError, match=r"^the loss at the weights must be finite, got nan\.$"):
            measure(model, _nan, *data)
    for measure in (
        compute_hessian,
        compute_hessian_sharpness,
        compute_hessian_trace,
        compute_top_eigenvalues,
        power_iteration_top_eigenvalue,
    ):
        with pytest.raises(FloatingPointError, match=r"^products with the Hessian must be finite, got NaN or infinity"):
            measure(model, _nan, *data)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_where_the_loss_overflows_nearby_the_rise_is_infinite(norm):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)

    def walled(outputs, targets):  # w up to 2, NaN beyond
        return outputs.mean() + 0 * torch.sqrt(2 - outputs.mean())

    data = torch.ones(1, 1).double(), None
    assert compute_worst_case_sharpness(model, walled, *data, 0.5, norm=norm) == pytest.approx(0.5)
    assert compute_worst_case_sharpness(model, walled, *data, 3.0, norm=norm) == math.inf
    assert compute_sam_sharpness(model, walled, *data, 3.0) == math.inf


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda out, t: 1.0, r"^loss_fn must return a scalar tensor, got float\.$"),
        (
            lambda out, t: out.sum().to(torch.complex128),
            r"^loss_fn must return a real scalar, got dtype torch.complex128",
        ),
        (lambda out, t: out, r"^loss_fn must return a scalar, got shape \[16, 3\]\.$"),
    ],
)
def test_what_a_loss_must_return(loss_fn, message):
    for measure in (compute_sam_sharpness, compute_hessian):
        with pytest.raises(ValueError, match=message):
            measure(make_model(), loss_fn, *make_batch())


# Models ---------------------------------------------------------------------------------------------------------------


class Rewriter(nn.Module):
    """Writes to its inputs and to its activations."""

    def __init__(self):
        super().__init__()
        self.layers = make_model()

    def forward(self, x):
        x.mul_(2.0)
        return self.layers[2](self.layers[0](x).mul_(0.5).tanh_())


def test_a_model_that_writes_to_its_inputs_finds_them_unchanged():
    (inputs, targets), model = make_batch(), Rewriter()
    kept = inputs.clone()
    dense = compute_hessian(model, cross_entropy, inputs, targets)
    assert torch.equal(inputs, kept)
    vector = torch.randn(39, generator=seeded()).double()
    with hessian_operator(model, cross_entropy, inputs, targets) as hessian:
        torch.testing.assert_close(hessian @ vector, dense @ vector, rtol=1e-10, atol=1e-12)
    assert compute_worst_case_sharpness(model, cross_entropy, inputs, targets, 0.0) == 0.0
    assert torch.equal(inputs, kept)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_radius_nothing_rises(dtype):
    """Not even by the rounding of the kernels that torch takes where no gradient is asked for."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3)).to(dtype)
    inputs, targets = torch.randn(12, 5, 8, generator=seeded(), dtype=dtype), torch.arange(12) % 3
    loader = [(inputs[i : i + 5], targets[i : i + 5]) for i in range(0, 12, 5)]
    fast = torch.backends.mha.get_fastpath_enabled()
    for data in ((inputs, targets), (loader, None)):
        assert compute_sam_sharpness(model, cross_entropy, *data, 0.0) == 0.0
        assert compute_worst_case_sharpness(model, cross_entropy, *data, 0.0, num_restarts=1) == 0.0
        assert compute_average_sharpness(model, cross_entropy, *data, 0.0, num_draws=2)[:2] == (0.0, 0.0)
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.recurrent, self.out = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_models(kind):
    """The fused kernel of the LSTM has no batching rule; torch would warn of it."""
    inputs, targets = torch.randn(6, 5, 4, generator=seeded()), torch.arange(6) % 3
    single = Recurrent(kind)
    double = copy.deepcopy(single).double()
    dense = compute_hessian(double, cross_entropy, inputs.double(), targets)
    torch.testing.assert_close(
        compute_hessian(single, cross_entropy, inputs, targets).double(), dense, atol=1e-6, rtol=0
    )
    ones = torch.ones(len(dense))
    product = compute_hessian_vector_product(single, cross_entropy, inputs, targets, ones)
    torch.testing.assert_close(product.double(), dense.sum(dim=1), atol=1e-5, rtol=0)


def test_wrappers_are_measured_without_them():
    model, batch = make_model(), make_batch()
    expected = compute_hessian(model, cross_entropy, *batch)
    wrapped = nn.DataParallel(model)
    torch.testing.assert_close(compute_hessian(wrapped, cross_entropy, *batch), expected)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compute_hessian(compiled, cross_entropy, *batch), expected)
    assert compute_worst_case_sharpness(compiled, cross_entropy, *batch) == compute_worst_case_sharpness(
        model, cross_entropy, *batch
    )


def test_an_msam_model_is_measured_where_it_stands():
    model, (inputs, targets) = make_model(), make_batch()
    optimizer = MSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    with optimizer.at_weights():
        clean = copy.deepcopy(model)
        inside = compute_sam_sharpness(model, cross_entropy, inputs, targets)
        trace = compute_hessian_trace(model, cross_entropy, inputs, targets).value
    assert inside == compute_sam_sharpness(clean, cross_entropy, inputs, targets)
    assert trace == compute_hessian_trace(clean, cross_entropy, inputs, targets).value
    outside = compute_sam_sharpness(model, cross_entropy, inputs, targets)
    assert outside == compute_sam_sharpness(copy.deepcopy(model), cross_entropy, inputs, targets) != inside


# Data -----------------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Keyword inputs, as in transformers, and the loss among its outputs."""

    def __init__(self):
        super().__init__()
        self.layers = make_model()

    def forward(self, *, pixels, extra, labels=None):
        logits = self.layers(pixels + extra["shift"])
        return {"logits": logits, "loss": None if labels is None else cross_entropy(logits, labels)}


def test_mappings_are_keyword_arguments():
    inputs, targets = make_batch()
    expected = compute_hessian(make_model(), cross_entropy, inputs + 1, targets)
    named = {"pixels": inputs, "extra": {"shift": torch.ones_like(inputs)}}

    def of_logits(outputs, targets):
        return cross_entropy(outputs["logits"], targets)

    def own(outputs, targets):
        return outputs["loss"]

    labelled = {**named, "labels": targets}
    parts = [
        {
            "pixels": inputs[i : i + 6],
            "extra": {"shift": torch.ones(len(targets[i : i + 6]), 5)},
            "labels": targets[i : i + 6],
        }
        for i in range(0, 16, 6)
    ]
    torch.testing.assert_close(compute_hessian(Named(), of_logits, named, targets), expected)
    torch.testing.assert_close(compute_hessian(Named(), own, labelled), expected)
    torch.testing.assert_close(compute_hessian(Named(), own, parts), expected)
    rises = [compute_m_sharpness(Named(), own, data, m=6) for data in (labelled, parts)]
    assert rises[0] == pytest.approx(rises[1], rel=1e-12)


class Masked(nn.Module):
    """A second input that belongs to no sample."""

    def __init__(self):
        super().__init__()
        self.layers = make_model()

    def forward(self, x, mask):
        return self.layers(x * mask)


def test_parts_of_a_batch_share_what_belongs_to_no_sample():
    inputs, targets = make_batch()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    actual = compute_m_sharpness(Masked(), cross_entropy, (inputs, mask), targets, m=4)
    expected = compute_m_sharpness(make_model(), cross_entropy, inputs * mask, targets, m=4)
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batch", [make_batch()[0], (1, 2, 3), "ab"])
def test_what_a_loader_must_give(batch):
    with pytest.raises(ValueError, match=r"^inputs must give batches \(inputs, targets\), or mappings, got a "):
        compute_sam_sharpness(make_model(), cross_entropy, [batch])


class Augmented(Dataset):
    """Noise on the samples from every source there is."""

    def __init__(self):
        self.inputs, self.targets = make_batch()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return self.inputs[index] + 0.3 * noise, self.targets[index]


@pytest.mark.parametrize(
    "options", [{}, {"generator": True}, {"num_workers": 1}, {"num_workers": 1, "generator": True}], ids=str
)
def test_a_loader_that_draws_gives_the_same_batches_in_each_pass(options):
    """Shuffled, without its last batch, augmented: without its random state each product were with another Hessian."""
    generator = seeded(7) if "generator" in options else None
    loader = DataLoader(Augmented(), 5, shuffle=True, drop_last=True, **{**options, "generator": generator})

    def states():
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
        return [torch.get_rng_state(), random.getstate(), numpy_state, generator and generator.get_state()]

    model = make_model()
    before = states()
    with hessian_operator(model, cross_entropy, loader) as hessian:
        columns = torch.stack([hessian @ unit for unit in torch.eye(39).double()[:3]])
        dense = hessian.dense()
    torch.testing.assert_close(columns, dense[:3], rtol=1e-10, atol=1e-12)
    assert compute_worst_case_sharpness(model, cross_entropy, loader, rho=0.0) == 0.0
    for state, kept in zip(states(), before, strict=True):
        assert torch.equal(state, kept) if isinstance(state, torch.Tensor) else state == kept
