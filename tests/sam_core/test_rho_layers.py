"""Groups that are perturbed and groups that are not: each parameter once, and e = rho g_S / ||g_S|| on S alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sam_cases import METHODS, assert_bitwise, method_class
from sam_core import SAM
from sam_core.tuning import group_by_perturbation, is_norm


class RootMeanSquareNorm(nn.Module):
    """A normalisation layer of another library."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class PreNorm(nn.Module):
    """A wrapper whose name says norm and that has a matrix of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Parameter(torch.ones(width, width))


class NormalHead(nn.Module):
    """Normal is not norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.ones(3))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    return nn.Sequential(*layers).double()


def make_loss(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return nn.functional.cross_entropy(model(inputs), torch.randint(3, (16,), generator=generator))


def names(groups, perturbed=True):
    return [name for group in groups if group["perturb"] is perturbed for name, _ in group["params"]]


NORMS = ["1.weight", "1.bias", "4.weight", "4.bias"]
LINEAR = ["0.weight", "0.bias", "3.weight", "3.bias", "5.weight", "5.bias"]
ALL = [name for name, _ in make_model().named_parameters()]
CHOICES = {
    "norms": ("norms", NORMS),
    "head": ("head", ["5.weight", "5.bias"]),
    "all": ("all", ALL),
    "names": (["3", "0.bias"], ["0.bias", "3.weight", "3.bias"]),
    "function": (lambda name, module, param: isinstance(module, nn.Linear) and param.dim() == 2, LINEAR[::2]),
}


@pytest.fixture(params=CHOICES)
def choice(request):
    return CHOICES[request.param]


def test_every_parameter_is_in_one_group_by_its_name(choice):
    model = make_model()
    perturb, expected = choice
    groups = group_by_perturbation(model, perturb)
    assert names(groups) == expected
    assert sorted(names(groups) + names(groups, perturbed=False)) == sorted(ALL)
    params = dict(model.named_parameters())
    assert all(param is params[name] for group in groups for name, param in group["params"])
    assert [group["perturb"] for group in groups] == [True, False][: len(groups)]
    assert all(set(group) == {"params", "perturb"} for group in groups)


def test_the_perturbation_is_that_of_the_part_alone(choice):
    """e = rho g_S / ||g_S|| on S and 0 elsewhere, by hand in float64."""
    model = make_model()
    perturb, expected = choice
    optimizer = SAM(group_by_perturbation(model, perturb), torch.optim.SGD, rho=0.3, lr=0.1)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    make_loss(model).backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    optimizer.first_step()
    length = math.sqrt(sum(float((grads[name] ** 2).sum()) for name in expected))
    for name, param in model.named_parameters():
        move = 0.3 * grads[name] / length if name in expected else torch.zeros_like(param)
        torch.testing.assert_close(param.detach(), before[name] + move, rtol=0, atol=1e-14)
    optimizer.restore()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_part_alone_and_steps_all(method):
    model = make_model()
    groups = group_by_perturbation(model, "norms", rho=0.2)
    optimizer = METHODS[method](groups, torch.optim.SGD, lr=0.1, momentum=0.9)
    seen = []

    def closure(indices=None):
        seen.append({name: param.detach().clone() for name, param in model.named_parameters()})
        if method_class(method).takes_sample_losses:
            generator = torch.Generator().manual_seed(1)
            inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64)
            targets = torch.randint(3, (16,), generator=generator)
            chosen = slice(None) if indices is None else indices
            return nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen], reduction="none")
        loss = make_loss(model)
        loss.backward()
        return loss

    clean = []
    for _ in range(2):
        with optimizer.at_weights():
            clean.append({name: param.detach().clone() for name, param in model.named_parameters()})
        seen.clear()
        optimizer.step(closure)
    for moved in seen:
        assert_bitwise([moved[name] for name in LINEAR], [clean[1][name] for name in LINEAR])
    if method not in ("looksam", "asam"):  # the second step of one takes no look, the other's length is relative
        away = torch.cat([seen[-1][name] - clean[1][name] for name in NORMS]).norm()
        assert away.item() == pytest.approx(0.2, rel=1e-9)
    with optimizer.at_weights():
        assert all(
            not torch.equal(param, clean[1][name]) for name, param in model.named_parameters() if name != "3.bias"
        )


def test_radii_may_differ_by_parameter():
    def radius(name, module, param):
        return 0.5 if name.startswith("1.") else 0.1

    groups = group_by_perturbation(make_model(), "norms", rho=radius)
    assert [(group.get("rho"), [name for name, _ in group["params"]]) for group in groups] == [
        (0.5, NORMS[:2]),
        (0.1, NORMS[2:]),
        (None, LINEAR),
    ]
    optimizer = SAM(groups, torch.optim.SGD, lr=0.1)
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.1, 0.05]


def test_weight_decay_is_left_out_where_it_is_asked():
    groups = group_by_perturbation(make_model(), "head", decay_norms_and_biases=False)
    described = [(g["perturb"], g.get("weight_decay"), [name for name, _ in g["params"]]) for g in groups]
    assert described == [
        (True, None, ["5.weight"]),
        (True, 0.0, ["5.bias"]),
        (False, None, ["0.weight", "3.weight"]),
        (False, 0.0, ["0.bias", "1.weight", "1.bias", "3.bias", "4.weight", "4.bias"]),
    ]
    optimizer = SAM(groups, torch.optim.AdamW, lr=0.1, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3, 0.0]


def test_frozen_parameters_are_left_out():
    model = make_model()
    for name, param in model.named_parameters():
        param.requires_grad_(name in ("1.weight", "3.weight", "3.bias"))
    groups = group_by_perturbation(model, "norms")
    assert (names(groups), names(groups, perturbed=False)) == (["1.weight"], ["3.weight", "3.bias"])
    assert names(group_by_perturbation(model, "head")) == ["3.weight", "3.bias"]


@pytest.mark.parametrize("perturb", ["head", ["embedding"], ["head.weight"]])
def test_tied_parameters_are_in_one_group_and_meant_in_any_place(perturb):
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embedding"].weight
    groups = group_by_perturbation(model, perturb)
    expected = ["embedding.weight", "head.bias"] if perturb == "head" else ["embedding.weight"]
    assert names(groups) == expected
    assert len(names(groups) + names(groups, perturbed=False)) == len(list(model.parameters()))


def test_a_shared_module_is_found_by_its_second_name():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": layer, "again": layer, "other": nn.Linear(3, 3)})
    assert names(group_by_perturbation(model, ["again"])) == ["first.weight", "first.bias"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        (nn.InstanceNorm1d(3, affine=True), True),
        (nn.LayerNorm((2, 3)), True),  # its weight has two dimensions
        (nn.GroupNorm(1, 3), True),
        (nn.RMSNorm(3), True),
        (type("LlamaRMSNorm", (RootMeanSquareNorm,), {})(3), True),
        (type("LayerNormalization", (RootMeanSquareNorm,), {})(3), True),
        (PreNorm(3), False),
        (NormalHead(), False),
        (nn.Linear(3, 3), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_are_found_by_class_or_by_name(layer, expected):
    assert is_norm(layer) is expected


def test_the_norm_within_a_wrapper_is_found():
    model = nn.ModuleDict({"block": PreNorm(3), "head": nn.Linear(3, 2)})
    assert names(group_by_perturbation(model, "norms")) == ["block.norm.weight", "block.norm.bias"]


def test_real_models():
    from torchvision.models import resnet18, vit_b_16
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        convolutional, transformer = resnet18(), vit_b_16()
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        )
        language = LlamaForCausalLM(config)
    for model, num_norms in ((convolutional, 20 * 2), (transformer, 25 * 2), (language, 5)):
        assert len(names(group_by_perturbation(model, "norms"))) == num_norms
    assert names(group_by_perturbation(convolutional, "head")) == ["fc.weight", "fc.bias"]
    assert names(group_by_perturbation(transformer, "head")) == ["heads.head.weight", "heads.head.bias"]
    assert names(group_by_perturbation(language, "head")) == ["lm_head.weight"]


def test_refusals():
    model, plain = make_model(), nn.Linear(2, 2)
    for perturb, message in {
        "layer4": r"perturb must be 'norms', 'head', 'all', a list of names or a function, got 'layer4'\.",
        ("3", "layer4"): r"perturb must name modules or parameters that are trained, got 'layer4'\.",
        (): r"perturb must match a trainable parameter of the model, got \(\)\.",
    }.items():
        with pytest.raises(ValueError, match=message):
            group_by_perturbation(model, perturb)
    with pytest.raises(ValueError, match=r"perturb must match a trainable parameter of the model, got 'norms'\."):
        group_by_perturbation(plain, "norms")
    with pytest.raises(ValueError, match=r"model must have a trainable parameter, got none\."):
        group_by_perturbation(plain.requires_grad_(False), "all")
    with pytest.raises(ValueError, match=r"rho must be >= 0, got -1\.0\."):
        group_by_perturbation(model, rho=-1.0)
    with pytest.raises(ValueError, match=r"rho of 1\.weight must be a real number, got None\."):
        group_by_perturbation(model, rho=lambda name, module, param: None)
    with pytest.raises(ValueError, match=r"decay_norms_and_biases must be one of True, False, got 0\.1\."):
        group_by_perturbation(model, decay_norms_and_biases=0.1)
