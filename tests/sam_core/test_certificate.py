"""certify_risk against closed forms and exact arithmetic, its coverage by simulation, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math

import pytest
import torch
from scipy.optimize import brentq
from torch import nn
from torch.distributions import Binomial, Independent, Normal, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

from sam_cases import make_batch, make_model
from sam_core.bounds import (
    RiskCertificate,
    VacuousBoundWarning,
    binary_kl,
    binary_kl_inverse,
    certificate,
    certify_risk,
)

pytestmark = pytest.mark.filterwarnings("ignore::sam_core.bounds.VacuousBoundWarning")


def error(outputs, targets):
    return (outputs.argmax(-1) != targets).double()


class Thresholds(nn.Module):
    """One weight w; sample i is an error where w < x_i, so that under N(w, s²) its risk is Φ((x_i − w) / s)."""

    def __init__(self, w=0.0, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=dtype))

    def forward(self, x):
        return (self.w < x).float()


def value(outputs, targets):
    return outputs


THRESHOLDS = (torch.linspace(-3, 1, 50, dtype=torch.float64), torch.zeros(50))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_measured_risk_against_the_closed_form():
    expected = Normal(0, 1).cdf(THRESHOLDS[0] / 0.5).mean().item()
    result = certify_risk(Thresholds(), value, THRESHOLDS, sigmas=[0.5], num_draws=5000)
    assert result.empirical_risk == pytest.approx(expected, abs=7e-3)
    assert result.risk_at_weights == pytest.approx((THRESHOLDS[0] > 0).double().mean().item(), abs=1e-12)
    assert result.rise == result.empirical_risk - result.risk_at_weights
    assert (result.num_samples, result.num_params, result.num_draws, result.sigma) == (50, 1, 5000, 0.5)


def test_bound_is_put_together_as_stated():
    """Both inverses by another root finder, the KL by torch.distributions, the best prior by trying all."""
    model, priors = make_model(), [0.1, 0.3, 1.0]
    start = [torch.full_like(p, 0.1) for p in model.parameters()]
    settings = {"sigmas": [0.2], "prior_sigmas": priors, "delta": 0.1, "mc_delta": 0.02, "num_draws": 100}
    result = certify_risk(model, error, make_batch(), prior_mean=start, **settings)

    def inverse(q, c):
        return brentq(lambda p: binary_kl(q, p) - c, q, 1 - 1e-15, xtol=1e-15)

    flat, flat_start = (torch.cat([p.detach().flatten() for p in ps]) for ps in (model.parameters(), start))
    posterior = Independent(Normal(flat, 0.2), 1)
    kls = {p: kl_divergence(posterior, Independent(Normal(flat_start, p), 1)).item() for p in priors}
    assert result.kl == pytest.approx(min(kls.values()), rel=1e-12)
    assert result.prior_sigma == min(kls, key=kls.get)
    top = inverse(result.empirical_risk, math.log(1 / 0.02) / 100)
    assert result.empirical_risk_bound == pytest.approx(top, rel=1e-9)
    complexity = (result.kl + math.log(2 * math.sqrt(16) * 3 / 0.08)) / 16
    assert result.risk_bound == pytest.approx(inverse(top, complexity), rel=1e-9)
    assert (result.num_priors, result.confidence) == (3, 0.9)


def test_default_grids_are_described_and_not_printed():
    assert len(str(inspect.signature(certify_risk))) < 600  # help() shows it
    result = certify_risk(Thresholds(), value, THRESHOLDS, num_draws=10)
    sigmas, priors = [2.0 ** (k / 4) for k in range(-48, 5)], [2.0 ** (k / 8) for k in range(-96, 25)]
    assert certify_risk(Thresholds(), value, THRESHOLDS, sigmas=sigmas, prior_sigmas=priors, num_draws=10) == result


def test_width_is_the_largest_that_flatness_allows():
    """Rise of the risk at width s: the mean of Φ(x_i / s), as no x_i is above w = 0; about 0, 0, 0.1 and 0.48."""
    sigmas, data = [0.01, 0.1, 1.0, 30.0], (torch.linspace(-3, -0.5, 50, dtype=torch.float64), None)
    kls = []
    for limit, expected in ((0.01, 0.1), (0.3, 1.0), (0.9, 30.0)):
        result = certify_risk(Thresholds(), value, data, sigmas=sigmas, max_rise=limit, num_draws=10)
        assert result.sigma == expected
        kls.append(certify_risk(Thresholds(), value, data, sigmas=sigmas, prior_sigmas=[30.0], max_rise=limit).kl)
    assert kls == sorted(kls, reverse=True)
    # Where none is flat enough it is the smallest: here every width loses half of the time.
    at_the_edge = Thresholds(1.0), value, (torch.ones(8, dtype=torch.float64), None)
    assert certify_risk(*at_the_edge, sigmas=[0.5, 0.1], max_rise=0.0, num_draws=10).sigma == 0.1


def test_draws_are_counted_by_batch():
    """m = samples of all passes / largest batch; the mean weighs samples equally, however they are cut."""
    x = THRESHOLDS[0]
    batches = [(x[:20], x[:20]), (x[20:40], x[20:40]), (x[40:], x[40:])]
    result = certify_risk(Thresholds(), value, batches, sigmas=[0.5], num_draws=4001)
    assert result.num_draws == 4002  # 1601 passes of 50 / 20 draws, rounded down
    assert result.num_samples == 50
    assert result.empirical_risk == pytest.approx(Normal(0, 1).cdf(x / 0.5).mean().item(), abs=0.02)


def test_batch_list_and_loader_agree():
    model, (inputs, targets) = make_model(), make_batch()
    one = certify_risk(model, error, (inputs, targets), sigmas=[0.1], num_draws=5)
    same = certify_risk(model, error, [(inputs, targets)], sigmas=[0.1], num_draws=5)
    assert one == same
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16)
    assert certify_risk(model, error, loader, sigmas=[0.1], num_draws=5) == one
    shuffled = DataLoader(TensorDataset(inputs, targets), batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    assert certify_risk(model, error, shuffled, sigmas=[0.1], num_draws=5).num_samples == 16
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_generator_alone():
    results = []
    for seed, noise in ((1, 1), (1, 2), (2, 1)):
        torch.manual_seed(noise)
        results.append(certify_risk(Thresholds(), value, THRESHOLDS, sigmas=[0.5], generator=seeded(seed)))
    assert results[0] == results[1] != results[2]
    assert certify_risk(Thresholds(), value, THRESHOLDS) == certify_risk(Thresholds(), value, THRESHOLDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_are_drawn_in_float32(dtype):
    """In bfloat16 the noise itself, and not only the weight, would have 8 bits."""
    drawn = certificate._draw({"w": torch.ones(1000, dtype=dtype)}, 0.5, seeded(0))["w"]
    assert drawn.dtype == dtype
    noise = torch.randn(1000, generator=seeded(0))
    torch.testing.assert_close(drawn, (1 + 0.5 * noise).to(dtype), rtol=0, atol=0)


class Restless(nn.Module):
    """Batch statistics, dropout, a frozen part, a counting buffer, and random numbers in eval mode too."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4).double()
        self.norm = nn.BatchNorm1d(4).double()
        self.drop = nn.Dropout(0.5)
        self.b = nn.Linear(4, 3).double().requires_grad_(False)
        self.register_buffer("num_calls", torch.tensor(0))

    def forward(self, x):
        self.num_calls += 1
        assert not self.training
        return self.b(self.drop(self.norm(self.a(x)))) + 0.01 * torch.randn(3)


def test_model_is_left_exactly_as_found():
    model = Restless()
    model.drop.eval()
    for number, param in enumerate(model.parameters()):
        param.grad = torch.full_like(param, 7.0) if number % 2 else None

    def everything():
        return (
            [module.training for module in model.modules()],
            [p.data_ptr() for p in model.parameters()],
            [p.detach().clone() for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
            [p.grad.clone() for p in model.parameters() if p.grad is not None],
            [buffer.clone() for buffer in model.buffers()],
            [torch.get_rng_state()],
            torch.is_grad_enabled(),
        )

    before = everything()
    result = certify_risk(model, error, make_batch(), num_draws=5)
    assert result.num_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        certify_risk(model, lambda outputs, targets: 1 / 0, make_batch())
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)


def test_only_given_parameters_are_random():
    model = make_model()
    chosen = [model[2].bias, model[2].weight]  # in an order of their own, which that of the prior follows
    settings = {"params": chosen, "prior_mean": [p.detach() for p in chosen], "num_draws": 5}
    result = certify_risk(model, error, make_batch(), sigmas=[0.25], **settings)
    assert result.num_params == 15
    assert (result.kl, result.prior_sigma) == (0.0, 0.25)


def test_tied_weights_are_drawn_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            assert self.a.weight is self.b.weight
            return self.b(self.a(x))

    assert certify_risk(Tied(), error, (torch.randn(8, 3), torch.zeros(8)), num_draws=3).num_params == 9


def test_tuple_inputs():
    model = nn.Bilinear(2, 3, 2)
    data = (torch.randn(8, 2), torch.randn(8, 3)), torch.zeros(8)
    assert certify_risk(model, error, data, num_draws=3).num_samples == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_draws_are_those_of_the_cpu():
    model, batch = make_model(), make_batch()
    on_cpu = certify_risk(model, error, batch, num_draws=50)
    state = torch.cuda.get_rng_state()
    assert certify_risk(model.cuda(), error, batch, num_draws=50) == on_cpu
    own = torch.Generator("cuda").manual_seed(0)
    assert certify_risk(model, error, batch, num_draws=50, generator=own).num_draws == 50
    assert torch.equal(torch.cuda.get_rng_state(), state)


# Coverage: linear classifiers of Gaussian points with label noise, whose true risk is a matter of angles.

NUM_RUNS, DELTA, FLIPS = 150, 0.1, 0.1
MOST = NUM_RUNS * DELTA + 3 * Binomial(NUM_RUNS, torch.tensor(DELTA)).stddev.item()


def sign_error(outputs, targets):
    return (outputs[:, 0] * targets <= 0).double()


def num_failures(num_samples, dim, *, is_trained, prior_of_same_samples=False):
    """How often of NUM_RUNS the true risk, by the angle between drawn and true weights, exceeds the bound."""
    generator, failures = seeded(0), 0
    noise = torch.randn(2000, dim, generator=generator, dtype=torch.float64)
    for _ in range(NUM_RUNS):
        x = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64)
        flips = torch.rand(num_samples, generator=generator) < FLIPS
        y = torch.where(x[:, 0] > 0, 1.0, -1.0).double() * torch.where(flips, -1.0, 1.0)
        model = nn.Linear(dim, 1, bias=False).double()
        weight = torch.linalg.lstsq(x, y[:, None]).solution[:, 0] if is_trained else torch.ones(dim).double()
        model.weight.data = weight[None]
        prior_mean = None if is_trained and not prior_of_same_samples else [model.weight.data]
        settings = {"sigmas": [0.05], "prior_sigmas": [0.05, 0.5], "delta": DELTA, "num_draws": 50}
        result = certify_risk(model, sign_error, (x, y), prior_mean=prior_mean, generator=generator, **settings)
        drawn = weight + 0.05 * noise
        angles = torch.arccos(drawn[:, 0] / drawn.norm(dim=1))
        true_risk = FLIPS + (1 - 2 * FLIPS) * angles.mean().item() / math.pi
        failures += true_risk > result.risk_bound
    return failures


@pytest.mark.parametrize("is_trained", [True, False])
def test_bound_fails_at_most_delta_of_the_time(is_trained):
    assert num_failures(40, 5, is_trained=is_trained) <= MOST


def test_simulation_catches_a_bound_without_its_confidence(monkeypatch):
    """Neither ln(2 sqrt(n) / delta) nor that of the draws."""
    monkeypatch.setattr(certificate, "seeger_bound", lambda q, kl, n, delta: binary_kl_inverse(q, kl / n))
    monkeypatch.setattr(certificate, "binary_kl_inverse", lambda q, c: q)
    assert num_failures(40, 5, is_trained=False) > MOST


def test_simulation_catches_a_prior_that_has_seen_the_samples():
    assert num_failures(100, 80, is_trained=True, prior_of_same_samples=True) > MOST


def test_confidence_of_the_draws():
    """The measured risk is below the true posterior's half of the time, its bound at most mc_delta of the time."""
    expected = Normal(0, 1).cdf(torch.tensor([-1.0, 0.5]).double()).mean().item()
    data = (torch.tensor([[-1.0], [0.5]]).double(), None)
    batches = [(data[0][0], None), (data[0][1], None)]
    below = {"mean": 0, "bound": 0}
    for seed in range(NUM_RUNS):
        settings = {"mc_delta": DELTA, "delta": 0.2, "sigmas": [1.0], "max_rise": 1.0, "num_draws": 40}
        result = certify_risk(Thresholds(), value, batches, generator=seeded(seed), **settings)
        below["mean"] += result.empirical_risk < expected
        below["bound"] += result.empirical_risk_bound < expected
    assert below["bound"] <= MOST < below["mean"]


def test_vacuous_certificates_say_so():
    with pytest.warns(VacuousBoundWarning, match=r"^The risk bound is 1: vacuous, for no risk exceeds 1\.$"):
        result = certify_risk(make_model(), error, make_batch(), prior_sigmas=[1e-3], num_draws=5)
    assert result.is_vacuous
    assert "This is vacuous: no risk exceeds 1." in str(result)
    assert "| 1.000 (vacuous) |" in result.to_markdown()


CERTIFICATE = RiskCertificate(
    risk_bound=0.12301,
    empirical_risk=0.05,
    empirical_risk_bound=0.06,
    risk_at_weights=0.04,
    kl=20.0,
    sigma=0.1,
    prior_sigma=0.5,
    num_samples=1000,
    num_params=650,
    num_draws=5000,
    num_priors=121,
    delta=0.05,
    mc_delta=0.01,
)


def test_certificate_in_words():
    """Bounds are rounded up; everything that the statement rests on is there."""
    assert "With probability 0.95" in str(CERTIFICATE)
    assert "a true risk of at most 0.124." in str(CERTIFICATE)
    lines = CERTIFICATE.to_markdown().splitlines()
    assert lines[:3] == ["| certificate | |", "| --- | --- |", "| true risk of drawn weights, at most | 0.124 |"]
    assert lines[-1] == "| samples, weights, draws | 1000, 650, 5000 |"
    assert not CERTIFICATE.is_vacuous and "vacuous" not in str(CERTIFICATE)
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"^cannot assign to field 'kl'$"):
        CERTIFICATE.kl = 0.0


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("max_rise", -0.1, r"max_rise must be >= 0, got -0\.1"),
        ("delta", 1.0, r"delta must be in \(0, 1\), got 1\.0"),
        ("mc_delta", 0.0, r"mc_delta must be in \(0, 1\), got 0\.0"),
        ("mc_delta", 0.05, r"mc_delta must be < delta = 0\.05, got 0\.05"),
        ("num_draws", 0, "num_draws must be an integer >= 1, got 0"),
        ("sigmas", [], r"sigmas must hold one value at least, got \[\]"),
        ("sigmas", [0.1, 0.0], r"sigmas must be > 0, got 0\.0"),
        ("prior_sigmas", [math.nan], "prior_sigmas must be finite, got nan"),
        ("prior_mean", [], r"prior_mean must hold tensors of shapes \[\[4, 5\], \[4\], \[3, 4\], \[3\]\], got \[\]"),
        ("params", [torch.ones(2)], r"params must be the model's, got 1 that are not"),
        ("params", [], "params must be one at least, by default those that require a gradient, got none"),
    ],
)
def test_errors_of_options(option, given, message):
    with pytest.raises(ValueError, match=rf"^{message}\.$"):
        certify_risk(make_model(), error, make_batch(), **{option: given})


@pytest.mark.parametrize(("loss", "shown"), [(-0.1, r"-0\.1\d*"), (1.5, r"1\.5"), (math.nan, "nan"), (math.inf, "inf")])
def test_losses_outside_the_unit_interval_are_refused(loss, shown):
    def loss_fn(outputs, targets):
        return torch.cat([torch.zeros(15), torch.tensor([loss])])

    with pytest.raises(ValueError, match=rf"^loss_fn must return losses in \[0, 1\], got one of {shown}\.$"):
        certify_risk(make_model(), loss_fn, make_batch())


def test_errors_of_data():
    model, (inputs, targets) = make_model(), make_batch()
    with pytest.raises(ValueError, match=r"^loss_fn must return one loss a sample, \[B\], got shape \[\]\.$"):
        certify_risk(model, nn.functional.cross_entropy, (inputs, targets))
    with pytest.raises(ValueError, match=r"^data must show at least one sample, got 0\.$"):
        certify_risk(model, error, [])
    with pytest.raises(ValueError, match=r"^data must show 16 samples in every pass, got 0\.$"):
        certify_risk(model, error, iter([(inputs, targets)]))
    for data, kind in (([inputs, targets], "Tensor"), ([(inputs,)], "tuple"), ({"inputs": inputs}, "str")):
        message = rf"^data must be a tuple \(inputs, targets\), or give such batches, got a {kind} as one\.$"
        with pytest.raises(ValueError, match=message):
            certify_risk(model, error, data)
    sizes = itertools.count(3)

    class Growing:
        def __iter__(self):
            return iter([(inputs[: next(sizes)], targets[:1])])

    with pytest.raises(ValueError, match=r"^data must show 3 samples in every pass, got 4\.$"):
        certify_risk(model, error, Growing())
