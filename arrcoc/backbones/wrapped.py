"""A library's model behind the protocol: what its tower, its scalars and its statistics say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, cast

from torch import Tensor, nn

from arrcoc.backbones.base import Backbone
from arrcoc.backbones.towers import Tower


class WrappedModel(Backbone):
    """The part of a backbone that is the same for all libraries; a subclass finds the tower and encodes texts.

    Args:
        model, tokenizer: as in the subclass.
        tower: the reading of the model's image tower.
        spec: name stored in checkpoints.
        mean, std: channel statistics, three numbers each.
        origin: where the statistics come from, for the message if they are wrong; "{name}" stands for mean or std.
        tokens_per_side: None for ``native``.
        native: tokens along a picture's longest side in training.

    Raises:
        ValueError: if the tokenizer does not fit, or a number is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any],
        tower: Tower,
        *,
        spec: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        origin: str,
        tokens_per_side: int | None,
        native: int,
    ) -> None:
        super().__init__()
        if tokens_per_side is not None and tokens_per_side < 1:
            raise ValueError(f"tokens_per_side must be >= 1, got {tokens_per_side!r}.")
        if not callable(tokenizer):
            raise ValueError(f"tokenizer must be callable, got {type(tokenizer).__name__}.")
        scale, bias = cast(Tensor, model.logit_scale), cast("Tensor | None", getattr(model, "logit_bias", None))

        self.model, self.tokenizer, self.tower = model, tokenizer, tower
        self.spec, self.mode = spec, tower.mode
        self.stride, self.orientation = tower.stride, tower.orientation
        self.normalize_patches = tower.normalize_patches
        self.tokens_per_side = tokens_per_side or native
        self.logit_scale = scale.detach().exp().item()
        self.logit_bias = None if bias is None else bias.detach().item()
        self.mean = _three_numbers("mean", mean, origin)
        self.std = _three_numbers("std", std, origin, above=0.0)
        try:
            self.embed_dim = self._encode_texts(["a"]).shape[-1]
        except (RuntimeError, IndexError) as error:  # wrong context length, numbers beyond the vocabulary
            raise ValueError(f"tokenizer must be the model's own, but its numbers do not fit: {error}") from error


def check_eval(model: nn.Module) -> None:
    """Refuse a model any part of which is in training mode.

    Raises:
        ValueError: if one is; the message names the first.
    """
    if training := [name or "model" for name, module in model.named_modules() if module.training]:
        raise ValueError(f"model must be in eval mode, got training mode in {training[0]!r}; call model.eval().")


def _three_numbers(
    name: str, value: Sequence[float] | None, origin: str, above: float | None = None
) -> tuple[float, float, float]:
    try:
        numbers = [float(number) for number in (() if value is None else value)]
    except (TypeError, ValueError):  # no sequence, or not of numbers
        numbers = []
    if len(numbers) != 3 or any(not isfinite(n) or (above is not None and n <= above) for n in numbers):
        rule = "three numbers" if above is None else f"three numbers > {above:g}"
        raise ValueError(f"{name} must be {rule}, {origin.format(name=name)}, got {value!r}.")
    return (numbers[0], numbers[1], numbers[2])
