"""Every method against its formulas, written down in sam_references.py; and what ASAM promises about rescaling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_cases import BASES, DEFAULTS, METHODS, make_closure, make_model
from sam_core import ASAM, SAM
from sam_references import Reference


def make_tied():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)]
    layers[4].weight = layers[0].weight
    layers[2].requires_grad_(False)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", ["plain", "clipped", "loop", "fused", "frozen and tied", "scheduled"])
def test_steps_follow_the_formulas(method, base, case):
    make = make_tied if case == "frozen and tied" else make_model
    model, plain = make(), make()
    clip = {"max_grad_norm": 0.05} if case == "clipped" else {}
    foreach = {"loop": {"foreach": False}, "fused": {"foreach": True}}.get(case, {})
    optimizer = METHODS[method](model.parameters(), BASES[base][0], **BASES[base][1], **clip, **foreach)
    reference = Reference(
        plain, BASES[base][0](plain.parameters(), **BASES[base][1]), **clip, **{"rho_min": 0.0, **DEFAULTS[method]}
    )
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (optimizer, reference.base)]
    for _ in range(5):
        loss = optimizer.step(make_closure(model, method=method))
        torch.testing.assert_close(loss.detach(), reference.step(method), rtol=1e-10, atol=0)
        if case == "scheduled":
            for schedule in schedules:
                schedule.step()
    with optimizer.at_weights():
        for actual, true in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(actual, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gsam", {"alpha": 0.0, "rho_min": None}),
        ("wsam_coupled", {"gamma": 0.5}),
        ("friendlysam", {"sigma": 0.0}),
        ("looksam", {"k": 1}),
        ("efficientsam", {"perturbation_ratio": 1.0, "sample_ratio": 1.0}),
        ("momentumsam", {"perturbation_momentum": 0.0}),
        ("asam", {"adaptive": False}),
    ],
)
def test_special_cases_are_sam(method, options):
    model, plain = make_model(), make_model()
    groups = [{"params": model.parameters(), **({"adaptive": False} if "adaptive" in options else {})}]
    options = {name: value for name, value in options.items() if name != "adaptive"}
    optimizer = METHODS[method](groups, torch.optim.SGD, **{"rho": 0.1, **options}, lr=0.1, momentum=0.9)
    reference = SAM(plain.parameters(), torch.optim.SGD, rho=optimizer.param_groups[0]["rho"], lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.step(make_closure(model, method=method))
        reference.step(make_closure(plain))
    for actual, true in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["sam", "gsam", "wsam", "friendlysam", "looksam", "efficientsam", "momentumsam"])
def test_the_perturbation_has_length_rho(method):
    """Regressions: peers' defects 9 and 13, and momentum directions scaled by another vector's norm."""
    model = make_model()
    optimizer = METHODS[method](model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    optimizer.step(make_closure(model, method=method))
    optimizer.step(make_closure(model, method=method))
    before = [p.detach().clone() for p in model.parameters()]
    if method == "looksam":
        optimizer.step(make_closure(model))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.k = 1
    optimizer.zero_grad()
    make_closure(model)()
    optimizer.first_step()
    length = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    torch.testing.assert_close(length.item(), 0.05, rtol=1e-9, atol=0)


# Rescaling ------------------------------------------------------------------------------------------------------------


def rescaled(model: nn.Sequential, factor: float) -> nn.Sequential:
    """The same function: a ReLU layer scaled up, the next one down."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.mul_(factor)
        model[2].weight.div_(factor)
    return model


def perturbed_loss(optimizer, model: nn.Module) -> float:
    make_closure(model)()
    optimizer.first_step(zero_grad=True)
    loss = make_closure(model)()
    optimizer.restore()
    return loss.item()


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_asam_does_not_see_a_rescaled_layer_and_sam_does(factor):
    torch.manual_seed(0)
    layers = nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)
    model = nn.Sequential(*layers).double()
    other = rescaled(model, factor)
    clean = [make_closure(net)().item() for net in (model, other)]
    torch.testing.assert_close(*clean, rtol=1e-12, atol=0)
    model.zero_grad()
    other.zero_grad()

    def losses(method, rho):
        return [
            perturbed_loss(method(net.parameters(), torch.optim.SGD, rho=rho, lr=0.1), net) for net in (model, other)
        ]

    torch.testing.assert_close(*losses(ASAM, 0.5), rtol=1e-12, atol=0)
    first, second = losses(SAM, 0.5)
    assert abs(first - second) > 0.01 * first
    assert first > clean[0]


def test_asam_weights_only_scales_by_name_norms_included():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = ASAM(model.named_parameters(), torch.optim.SGD, rho=0.5, eta=0.1, weights_only=True, lr=0.1)
    make_closure(model)()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.first_step()
    t = {name: w.abs() + 0.1 if name.endswith("weight") else torch.ones_like(w) for name, w in before.items()}
    length = sum(((t[name] * g) ** 2).sum() for name, g in grads.items()).sqrt()
    for name, param in model.named_parameters():
        expected = before[name] + 0.5 * t[name] ** 2 * grads[name] / length
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-14)


def test_asam_weights_only_needs_names():
    with pytest.raises(ValueError, match=r"^weights_only needs names: pass model\.named_parameters\(\), got "):
        ASAM(make_model().parameters(), torch.optim.SGD, weights_only=True, lr=0.1)
    with pytest.raises(ValueError, match=r"^weights_only must be one of True, False, got 2\.$"):
        ASAM(make_model().parameters(), torch.optim.SGD, weights_only=2, lr=0.1)
