"""Settings refuse what cannot work, when they are made."""

from __future__ import annotations

import re

import pytest
import torch

from arrcoc import HeadConfig, TrainConfig
from arrcoc.config import HeadShape
from arrcoc.training.run_config import LoaderConfig, RunConfig
from sam_core.optimizers import METHODS

NAMES = re.escape(", ".join(map(repr, (*METHODS, "none"))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"warm_up": 1.0}, "warm_up must be in \\[0, 1\\), got 1.0"),
        ({"schedule": "step"}, "schedule must be one of 'cosine', 'linear', 'constant', got 'step'"),
        ({"lr": 0.1, "min_lr": 0.2}, "min_lr must be at most lr = 0.1, got 0.2"),
        ({"weight_decay": -1}, "weight_decay must be >= 0, got -1"),
        ({"rho": -1.0}, "rho must be >= 0, got -1.0"),
        ({"optimizer": "adam"}, f"optimizer must be one of {NAMES}, got 'adam'"),
        ({"optimizer_options": {"etta": 1}}, "optimizer_options and base_options must be arguments of sam and AdamW, "),
        ({"optimizer_options": {"eta": -1.0}}, "eta must be >= 0, got -1.0"),
        ({"optimizer_options": {"rho": 1.0}}, "optimizer_options must not hold rho, which has a setting of its own"),
        ({"base_optimizer": "Magic"}, "base_optimizer must name a class of torch.optim, got 'Magic'"),
        ({"base_optimizer": "LBFGS", "weight_decay": 0.0}, "base_optimizer must step without a closure, got LBFGS"),
        ({"base_optimizer": "Rprop"}, "weight_decay must be 0 for Rprop, which has none"),
        ({"base_optimizer": "SGD", "base_options": {"momentum": -1}}, "Invalid momentum value: -1"),
        ({"base_options": {"lr": 1.0}}, "base_options must not hold lr, which has a setting of its own"),
        ({"loss": "hinge"}, "loss must be one of 'bce', 'mse', 'listwise', 'smooth_ap', got 'hinge'"),
        ({"precision": "float8"}, "precision must be one of 'float32', 'bfloat16', 'float16', got 'float8'"),
        ({"accumulation_steps": 0}, "accumulation_steps must be an integer >= 1, got 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0, got 0.0"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'raise', 'skip', got 'ignore'"),
        ({"ema_decay": 1.0}, "ema_decay must be in \\[0, 1\\), got 1.0"),
        ({"patience": 0}, "patience must be an integer >= 1, got 0"),
        ({"min_delta": -0.1}, "min_delta must be >= 0, got -0.1"),
        ({"train_blocks": -1}, "train_blocks must be an integer >= 0, got -1"),
        ({"backbone_lr_factor": 0}, "backbone_lr_factor must be > 0, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_train_config(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"num_queries": 0}, "num_queries must be an integer >= 1, got 0"),
        ({"workers": -1}, "workers must be an integer >= 0, got -1"),
        ({"augment_options": {"flip": 0.0}}, "augment must be true for augment_options"),
        ({"augment": True, "augment_options": {"flop": 1}}, "augment_options must be arguments of RelevanceAugment"),
        ({"augment": True, "augment_options": {"flip": 2.0}}, "flip must be"),
    ],
)
def test_bad_loader_config(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**options)


def test_bad_shapes_and_runs() -> None:
    with pytest.raises(ValueError, match="text_rank must be an integer >= 0, got -1"):
        HeadShape(text_rank=-1)
    with pytest.raises(ValueError, match="embed_dim must be an integer >= 1, got 0"):
        HeadConfig(embed_dim=0)
    with pytest.raises(ValueError, match="overlays must be an integer >= 0, got -1"):
        RunConfig(overlays=-1)


@pytest.mark.parametrize("name", [*METHODS, "none"])
def test_every_method_is_made_by_its_name(name: str) -> None:
    config = TrainConfig(optimizer=name, lr=0.1, base_optimizer="SGD", base_options={"momentum": 0.5}, rho=0.2)
    optimizer = config.make_optimizer([torch.nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, METHODS["sam" if name == "none" else name])
    assert isinstance(optimizer.base_optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["rho"]) == (0.1, 0.5, 0.0 if name == "none" else 0.2)


@pytest.mark.parametrize("base", [name for name in vars(torch.optim) if name[0].isupper() and name != "Optimizer"])
def test_torch_optimizers_step_or_are_refused(base: str) -> None:
    weight_decay = 0.0 if base == "Rprop" else 0.01
    # These ask for a closure, for matrices alone and for gradients that are sparse.
    refused = {"LBFGS": "without a closure", "Muon": "2D", "SparseAdam": "step with a dense gradient"}
    if base in refused:
        with pytest.raises(ValueError, match=refused[base]):
            TrainConfig(base_optimizer=base, weight_decay=0.0)
        return
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = TrainConfig(base_optimizer=base, weight_decay=weight_decay).make_optimizer([parameter])
    assert type(optimizer.base_optimizer).__name__ == base


def test_options_reach_the_augmentation_and_the_queries(tmp_path: object) -> None:
    loader = LoaderConfig(augment=True, augment_options={"flip": 0.0, "crop": [0.5, 1.0]}, templates=True)
    augmentation, variants = loader.augmentation(), loader.query_variants(None)
    assert augmentation is not None and (augmentation.flip, augmentation.crop) == (0.0, (0.5, 1.0))
    assert variants is not None and "a photo of a cup" in variants.variants("cup")
    assert LoaderConfig().augmentation() is None and LoaderConfig().query_variants(None) is None
