"""Perturb some layers only: SAM on normalisation layers (Mueller et al. 2023), on the head, on what one chooses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sam_core._checks import check_in, check_nonnegative

#: Says of a parameter, by its full name, the module that owns it and itself, whether it is meant.
Choice = Callable[[str, nn.Module, Tensor], bool]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAMED_NORM = re.compile(r"norm(?!al(?!i))", re.IGNORECASE)  # LlamaRMSNorm, LayerNormalization; not NormalHead


class _Place(NamedTuple):
    """Where a parameter stands in the model; a tied one stands in several places."""

    name: str
    module: nn.Module


def group_by_perturbation(
    model: nn.Module,
    perturb: str | Iterable[str] | Choice = "norms",
    *,
    rho: float | Callable[[str, nn.Module, Tensor], float] | None = None,
    decay_norms_and_biases: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of sam_core that moves a part S of the parameters in its first pass.

        e = rho g_S / ||g_S||  on S,    0 elsewhere

    All are stepped. To perturb the normalisation layers alone, typically 0.1 % of the parameters, can be better than to
    perturb all (Mueller et al. 2023, "Normalization Layers Are All That Sharpness-Aware Minimization Needs"). The
    passes cost the same; the copy of the weights shrinks to S.

    Every trainable parameter is in one group, once, with its name; frozen ones are left out. A tied parameter is
    meant if it is in any of its places.

    Args:
        model: any module.
        perturb: what S is.
            "norms": normalisation layers, those of torch and those whose class has "norm" in its name and parameters
            of its own with one dimension at most, e.g. LlamaRMSNorm.
            "head": the last module, in order of definition, with trainable parameters of its own.
            "all": all of them.
            A list of names of modules or parameters, or ``choice(name, module, parameter) -> bool``.
        rho: radius of the perturbed groups, parameter units, >= 0: a number, or a function of the same arguments for
            radii that differ, which make one group each; None: the optimizer's.
        decay_norms_and_biases: False gives normalisation layers and biases ``weight_decay`` 0.

    Returns:
        Groups ``{"params": [(name, parameter), ...], "perturb": bool, ...}``, the perturbed ones first.

    Raises:
        ValueError: if nothing matches, or for a bad option.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> groups = group_by_perturbation(model, "norms", rho=0.5)
        >>> [(group["perturb"], [name for name, _ in group["params"]]) for group in groups]
        [(True, ['1.weight', '1.bias']), (False, ['0.weight', '0.bias', '2.weight', '2.bias'])]
        >>> optimizer = SAM(groups, torch.optim.SGD, lr=0.1)
    """
    check_in("decay_norms_and_biases", decay_norms_and_biases, (True, False))
    if rho is not None and not callable(rho):
        check_nonnegative("rho", rho)
    places: dict[Tensor, list[_Place]] = {}
    for name, module, param in _trainable(model):
        places.setdefault(param, []).append(_Place(name, module))
    if not places:
        raise ValueError("model must have a trainable parameter, got none.")
    chosen = _choice(model, perturb)

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for param, found in places.items():
        name, module = found[0]
        options: dict[str, Any] = {"perturb": any(chosen(place.name, place.module, param) for place in found)}
        if rho is not None and options["perturb"]:
            options["rho"] = rho(name, module, param) if callable(rho) else rho
            check_nonnegative(f"rho of {name}", options["rho"])
        if not decay_norms_and_biases and any(_undecayed(place) for place in found):
            options["weight_decay"] = 0.0
        group = groups.setdefault(tuple(options.items()), {"params": [], **options})
        group["params"].append((name, param))
    if not any(group["perturb"] for group in groups.values()):
        raise ValueError(f"perturb must match a trainable parameter of the model, got {perturb!r}.")
    return sorted(groups.values(), key=lambda group: not group["perturb"])


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: by its class, or by its name and parameters.

    Args:
        module: any module.

    Example:
        >>> is_norm(torch.nn.GroupNorm(2, 4)), is_norm(torch.nn.Linear(2, 4))
        (True, False)
    """
    if isinstance(module, _NORMS):
        return True
    named = _NAMED_NORM.search(type(module).__name__) is not None
    return named and all(param.dim() <= 1 for param in module.parameters(recurse=False))


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(full name, owner, parameter) of every place of every trainable parameter."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if param.requires_grad:
                yield name, module, param


def _choice(model: nn.Module, perturb: str | Iterable[str] | Choice) -> Choice:
    if callable(perturb):
        return perturb
    if isinstance(perturb, str):
        if perturb == "head":
            *_, (_, head, _) = _trainable(model)
            return lambda name, module, param: module is head
        if perturb not in ("norms", "all"):
            raise ValueError(f"perturb must be 'norms', 'head', 'all', a list of names or a function, got {perturb!r}.")
        return (lambda name, module, param: is_norm(module)) if perturb == "norms" else (lambda *_: True)

    wanted = list(perturb)
    names = [name for name, _, _ in _trainable(model)]
    for entry in wanted:
        if not any(_within(name, entry) for name in names):
            raise ValueError(f"perturb must name modules or parameters that are trained, got {entry!r}.")
    return lambda name, module, param: any(_within(name, entry) for entry in wanted)


def _within(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def _undecayed(place: _Place) -> bool:
    return is_norm(place.module) or place.name.endswith("bias")
