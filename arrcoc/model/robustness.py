"""Robustness of relevance: how much it moves when the tokens are perturbed, and the temperature that follows.

Axes: B batch, N tokens, D embedding width.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from arrcoc.tokens import VisualTokens, fuse
from sam_core._checks import check_nonnegative

Tokens = TypeVar("Tokens", Tensor, VisualTokens)


class ComputesRelevance(Protocol):
    """Anything that scores tokens for a text."""

    def compute_relevance(self, visual_tokens: Tensor | VisualTokens, text_embedding: Tensor, /) -> Tensor: ...


@overload
def perturb_tokens(tokens: Tensor, rho: float, generator: torch.Generator | None = None) -> Tensor: ...
@overload
def perturb_tokens(tokens: VisualTokens, rho: float, generator: torch.Generator | None = None) -> VisualTokens: ...
def perturb_tokens(
    tokens: Tensor | VisualTokens, rho: float, generator: torch.Generator | None = None
) -> Tensor | VisualTokens:
    """Gaussian noise on the tokens, t + rho * RMS(t) * n with n ~ N(0, I); RMS over all tokens of an image.

    The noise is relative, so that one rho means the same for every backbone.

    Args:
        tokens: tokens [B, N, D], or VisualTokens; of several scales each gets its own noise, and they are averaged
            anew. Pooled embeddings stay.
        rho: standard deviation of the noise, >= 0, relative to the RMS.
        generator: source of the noise, torch's own if None. One on the CPU gives every device the same noise.

    Raises:
        ValueError: if rho is negative or not finite.
    """
    check_nonnegative("rho", rho)
    if isinstance(tokens, VisualTokens):
        if tokens.levels:
            return fuse(tuple(perturb_tokens(level, rho, generator) for level in tokens.levels))
        return tokens.with_patches(perturb_tokens(tokens.patches, rho, generator))
    dtype = torch.promote_types(tokens.dtype, torch.float32)  # squares overflow half precision
    source = tokens.device if generator is None else generator.device
    noise = torch.randn(tokens.shape, generator=generator, dtype=dtype, device=source).to(tokens.device)
    rms = tokens.to(dtype).square().mean((-2, -1), keepdim=True).sqrt()
    return (tokens + rho * rms * noise).to(tokens.dtype)


def relevance_change(relevance: Tensor, perturbed: Tensor) -> Tensor:
    """Mean absolute change of relevance, the robustness penalty of the source (section 9.2)."""
    return (relevance - perturbed).abs().mean()


class RelevanceRobustness(nn.Module):
    """Penalises relevance that is sharp: that changes when the tokens change a little.

    Args:
        rho: standard deviation of the token noise, >= 0, relative to the tokens' root mean square.
    """

    def __init__(self, rho: float = 0.1) -> None:
        super().__init__()
        check_nonnegative("rho", rho)
        self.rho = rho

    def compute_robust_relevance(
        self,
        model: ComputesRelevance,
        visual_tokens: Tensor | VisualTokens,
        text_embedding: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Relevance, and the mean absolute change of it under one draw of token noise.

        Args:
            model: anything with ``compute_relevance(tokens, text)``.
            visual_tokens: tokens [B, N, D], or VisualTokens.
            text_embedding: unit-norm text embeddings [B, D].
            generator: source of the noise; torch's own if None.

        Returns:
            (relevance [B, N], robustness_penalty []), both differentiable.
        """
        relevance_BN = model.compute_relevance(visual_tokens, text_embedding)
        perturbed_BN = model.compute_relevance(perturb_tokens(visual_tokens, self.rho, generator), text_embedding)
        return relevance_BN, relevance_change(relevance_BN, perturbed_BN)

    @overload
    def temperature_from_sharpness(self, sharpness: float, base_temperature: float = 1.0) -> float: ...
    @overload
    def temperature_from_sharpness(self, sharpness: Tensor, base_temperature: float = 1.0) -> Tensor: ...
    def temperature_from_sharpness(self, sharpness: float | Tensor, base_temperature: float = 1.0) -> float | Tensor:
        """Softmax temperature base_temperature * (1 + sharpness): the sharper, the softer the distribution.

        Args:
            sharpness: >= 0, a number or a tensor.
            base_temperature: > 0.
        """
        if not base_temperature > 0:
            raise ValueError(f"base_temperature must be > 0, got {base_temperature!r}.")
        if bool(torch.as_tensor(sharpness).lt(0).any()):
            raise ValueError(f"sharpness must be >= 0, got {sharpness!r}.")
        return base_temperature * (1 + sharpness)
