"""What one step takes, method by method: copies of the parameters, forward and backward passes, numbers agreed on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sam_core._checks import check_count, check_finite, check_in

HALF_TYPES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF_TYPES)
SHARDINGS = ("none", "ddp", "fsdp")


class Copies(NamedTuple):
    """Tensors the size of all parameters, by what they become where the parameters are of a half type."""

    same: int | float = 0  # of the parameters' own type
    wide: int = 0  # float32 then
    extra: int = 0  # float32 then, and none else

    def num_bytes(self, num_params: float, dtype: torch.dtype) -> float:
        half = dtype in HALF_TYPES
        wide = 4 if half else dtype.itemsize
        return num_params * (self.same * dtype.itemsize + (self.wide + (self.extra if half else 0)) * wide)


_NONE = Copies()


@dataclass(frozen=True, kw_only=True)
class MethodCosts:
    """What a step of a method takes beside the parameters, one set of gradients and the base optimizer's state.

    Args:
        state: copies kept between steps.
        closure: copies kept while the second closure runs, beside the state.
        ascent: copies alive at most while the weights move to the perturbed point, beside the state.
        update: copies alive at most when the step's gradient is formed, beside the state.
        held: copies alive while the base optimizer steps, beside the state.
        keeps_gradient: one of the copies is the gradient at w.
        passes: forward and backward passes a step, in units of a whole one.
        second_passes: share of the steps that take a second pass.
        second_pass: what that costs, in units of a whole one.
        local_ascent: the first pass may stay on its rank, and then only one is synchronised.
        always_local: under DDP it does so in any case.
        choosing_forwards: forwards without a graph a step, part of ``passes``.
        norms: norms and products over all parameters a step, each one number to agree on where they are sharded.
    """

    state: Copies = _NONE
    closure: Copies = _NONE
    ascent: Copies = _NONE
    update: Copies = _NONE
    held: Copies = _NONE
    keeps_gradient: bool = False
    passes: float = 2.0
    second_passes: float = 1.0
    second_pass: float = 1.0
    local_ascent: bool = False
    always_local: bool = False
    choosing_forwards: int = 0
    norms: float = 2.0


_BACKUP = Copies(same=1)
_BACKUP_AND_GRADIENT = Copies(same=2)
_SAM = MethodCosts(closure=_BACKUP, ascent=_BACKUP, local_ascent=True)
_METHODS = {
    "base": MethodCosts(passes=1.0, second_passes=0.0, norms=0.0),
    "sam": _SAM,
    "asam": replace(_SAM, ascent=Copies(wide=3), norms=3.0),  # |w|, T g and T^2 g; then T^2 g and the backup
    "gsam": MethodCosts(
        closure=_BACKUP_AND_GRADIENT,
        ascent=_BACKUP_AND_GRADIENT,
        update=Copies(same=1, extra=2),
        held=Copies(same=1),
        keeps_gradient=True,
        norms=4.0,
    ),
    "wsam": MethodCosts(  # g and g_s - g while the base optimizer steps
        closure=_BACKUP_AND_GRADIENT, ascent=_BACKUP_AND_GRADIENT, held=Copies(same=2), keeps_gradient=True
    ),
    "friendlysam": MethodCosts(state=Copies(wide=1), closure=_BACKUP, ascent=Copies(same=1, wide=1), norms=3.0),
    "momentumsam": MethodCosts(state=Copies(wide=1), closure=_BACKUP, ascent=_BACKUP, norms=3.0),
    "msam": MethodCosts(state=_BACKUP, passes=1.0, second_passes=0.0),
    "memoryefficientsam": replace(
        _SAM, passes=8 / 3, second_pass=4 / 3
    ),  # a forward, a third of a pass, once more in each
}

#: State that a base optimizer keeps, and what torch's fused lists ("foreach") of its step make for a moment, in copies
#: of the parameters: measured with weight decay. Adafactor keeps one number a row and one a column, taken as none.
BASE_OPTIMIZERS = {
    "sgd": (0, 1),
    "sgd_momentum": (1, 1),
    "adam": (2, 1),
    "adamw": (2, 1),
    "adamw_amsgrad": (3, 1),
    "adagrad": (1, 2),
    "rmsprop": (1, 2),
    "adafactor": (0, 1),
}

#: Names that :func:`method_costs` knows: those of :data:`sam_core.METHODS`, and "base" for the base optimizer alone.
METHOD_NAMES = (*_METHODS, "looksam", "efficientsam")


def method_costs(method: str, *, k: int = 5, perturbation_ratio: float = 0.5, sample_ratio: float = 0.5) -> MethodCosts:
    """What a step of a method takes, with the method's options as they are by default.

    Args:
        method: a name of :data:`METHOD_NAMES`.
        k: LookSAM's; the costs are then means over k steps, the copies those of the step that holds most.
        perturbation_ratio: EfficientSAM's, taken as the share of the parameters; by number of tensors it is exact.
        sample_ratio: EfficientSAM's; under FSDP2 its first backward is a whole one, which ``passes`` does not know.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> method_costs("looksam", k=10).passes
        1.1
    """
    check_in("method", method, METHOD_NAMES)
    check_count("k", k, at_least=1)
    for name, ratio in (("perturbation_ratio", perturbation_ratio), ("sample_ratio", sample_ratio)):
        check_finite(name, ratio)
        if not 0 < ratio <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {ratio!r}.")
    if method == "looksam":
        kept = Copies(same=1) if k > 1 else _NONE  # g_v
        more = Copies(same=2 - kept.same)  # a SAM step finds no g_v, and makes it in the memory of the gradient at w
        held = Copies(same=1 - kept.same)
        return MethodCosts(
            state=kept,
            closure=more,
            ascent=more,
            update=held._replace(extra=2),
            held=held,
            keeps_gradient=True,
            passes=1 + 1 / k,
            second_passes=1 / k,
            norms=(5 + 2 * (k - 1)) / k,
        )
    if method == "efficientsam":
        share = Copies(same=perturbation_ratio)
        forwards = 0 if sample_ratio == 1 else 1
        passes = (2 + perturbation_ratio + forwards + 3 * sample_ratio) / 3
        return replace(
            _SAM,
            closure=share,
            ascent=share,
            passes=passes,
            second_pass=sample_ratio,
            always_local=True,
            choosing_forwards=forwards,
            norms=3.0,
        )
    return _METHODS[method]
