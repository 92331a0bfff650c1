"""Description length: how many bits the weights need, where the loss is flat few (Hinton & van Camp 1993).

Laplace form. Let the prior be N(w0, p² I), w the minimum of n L + ||w − w0||² / (2 p²), where L is the mean loss in
nats, and λ_i the eigenvalues of the Hessian of L there. To second order the evidence of n samples is a Gaussian
integral (MacKay 1992, "A Practical Bayesian Framework for Backpropagation Networks"; MacKay 2003, chapter 28), and the
code that attains it has the length

    −ln p(data)  =  n L  +  ||w − w0||² / (2 p²)  +  1/2 sum_i ln(1 + n p² λ_i).

The first term is the data given w, the others are the weights. A direction with n p² λ_i << 1 is free; each other costs
ln(prior width p / posterior width (n λ_i + 1/p²)^(-1/2)), the digits that the data can tell apart. The same number is
KL(Laplace posterior || prior) + what the data lose in expectation under that posterior ("bits back").

Measured form. Round the weights of each tensor to 2^b even levels over its range, and take the smallest b at which the
mean loss rises by at most a tolerance: no second order, no prior, and a code that can be written down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_finite, check_nonnegative, check_positive
from sam_core.bounds._losses import Data, LossFn, Weights, named_weights, sample_losses

_RANGE_BITS = 64  # two float32 numbers a tensor: the ends of its range


def description_length_bits(
    hessian_eigenvalues: Sequence[float] | Tensor,
    n_samples: int,
    *,
    train_loss: float = 0.0,
    distance_squared: float = 0.0,
    prior_variance: float = 1.0,
) -> float:
    """Laplace form: [n L + ||w − w0||²/(2p²) + 1/2 sum_i ln(1 + n p² λ_i)] / ln 2,  in bits.

    Eigenvalues that are left out count as flat, so that the top few give a lower end. Of a trace T over d weights
    alone, d times T/d gives an upper end, for the logarithm is concave. At a minimum of the loss and the prior together
    it is exact to second order. Eigenvalues that are negative, by estimation noise say, are for the caller to set to 0.

    Args:
        hessian_eigenvalues: λ_i >= 0 of the Hessian of the mean loss, in nats per squared parameter unit.
        n_samples: n, >= 1.
        train_loss: L, mean loss in nats a sample, such as the cross-entropy; 0 counts the bits of the weights alone.
        distance_squared: ||w − w0||², >= 0.
        prior_variance: p², > 0.

    Returns:
        Bits.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> flat, sharp = [0.001, 0.001], [1.0, 1.0]
        >>> [round(description_length_bits(values, n_samples=1000), 2) for values in (flat, sharp)]
        [1.0, 9.97]
    """
    eigenvalues = torch.as_tensor(hessian_eigenvalues, dtype=torch.float64).detach().flatten()
    if not bool(((eigenvalues >= 0) & eigenvalues.isfinite()).all()):
        raise ValueError(f"hessian_eigenvalues must be finite and >= 0, got {eigenvalues.tolist()!r}.")
    check_count("n_samples", n_samples, at_least=1)
    check_finite("train_loss", train_loss)
    check_nonnegative("distance_squared", distance_squared)
    check_positive("prior_variance", prior_variance)
    occam = float(torch.log1p(n_samples * prior_variance * eigenvalues).sum())
    return (n_samples * train_loss + (distance_squared / prior_variance + occam) / 2) / math.log(2)


@dataclass(frozen=True, kw_only=True)
class MeasuredDescriptionLength:
    """What :func:`measure_description_length` found.

    Args:
        bits_per_weight: b, the fewest that do.
        total_bits: b for every weight and the two ends of the range, in float32, for every tensor.
        loss: mean loss at the weights.
        rounded_loss: mean loss at the rounded weights.

    Example:
        >>> MeasuredDescriptionLength(bits_per_weight=3, total_bits=364, loss=0.1, rounded_loss=0.11).bits_per_weight
        3
    """

    bits_per_weight: int
    total_bits: int
    loss: float
    rounded_loss: float


def measure_description_length(
    model: nn.Module,
    loss_fn: LossFn,
    data: Data,
    tolerance: float,
    *,
    params: Sequence[Tensor] | None = None,
    max_bits: int = 24,
) -> MeasuredDescriptionLength:
    """Measured form: the fewest bits a weight at which rounding raises the mean loss by at most the tolerance.

    With b bits the weights of a tensor with range [low, high] become low + k (high − low) / (2^b − 1), k = 0 … 2^b − 1,
    the nearest; with 0 bits the middle of the range. Every b from 0 on is tried, for the loss need not fall at each.
    The model is measured in eval mode and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to the losses [B] of B samples, of any range.
        data: a tuple (inputs, targets), or an iterable of such batches that can be read again and again.
        tolerance: rise of the mean loss that is allowed, in its units, >= 0.
        params: the parameters that are rounded, all with the same b; None: those that require a gradient.
        max_bits: most bits tried, in [0, 52].

    Returns:
        Bits a weight, bits of all, and both losses.

    Raises:
        ValueError: for a bad option, or if max_bits are too few.

    Example:
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> model.weight.data = torch.tensor([[0.0, 1.0, 2.0, 3.0]])  # four even levels: 2 bits
        >>> squares = lambda outputs, targets: (outputs[:, 0] - targets).square()
        >>> measured = measure_description_length(model, squares, (torch.eye(4), torch.arange(4.0)), tolerance=0.01)
        >>> measured.bits_per_weight, measured.total_bits
        (2, 72)
    """
    check_nonnegative("tolerance", tolerance)
    check_count("max_bits", max_bits)
    if max_bits > 52:
        raise ValueError(f"max_bits must be <= 52, got {max_bits!r}.")
    weights = named_weights(model, params)
    device = next(iter(weights.values())).device
    with sample_losses(model, loss_fn, data, device) as one_pass:

        def mean_loss(values: Weights) -> float:
            losses = torch.cat(list(one_pass(lambda: values)))
            return float(losses.mean())

        loss = mean_loss(weights)
        check_finite("the mean loss", loss)
        for bits in range(max_bits + 1):
            rounded_loss = mean_loss({name: _round(weight, bits) for name, weight in weights.items()})
            if rounded_loss - loss <= tolerance:
                total = sum(bits * weight.numel() + _RANGE_BITS for weight in weights.values())
                return MeasuredDescriptionLength(
                    bits_per_weight=bits, total_bits=total, loss=loss, rounded_loss=rounded_loss
                )
    raise ValueError(
        f"max_bits must be enough for a rise of at most tolerance = {tolerance!r}, got {max_bits!r}, with which the "
        f"loss rises by {rounded_loss - loss:.3g}."
    )


def _round(weight: Tensor, bits: int) -> Tensor:
    """To the nearest of 2^bits even levels over the tensor's range; levels are computed in float64."""
    if weight.numel() == 0:
        return weight
    values = weight.cpu().double()  # some devices have no float64
    low, high = values.aminmax()
    if bits == 0:
        return torch.full_like(weight, float(low + high) / 2)
    step = (high - low) / (2**bits - 1)
    if step == 0:
        return weight
    rounded: Tensor = low + ((values - low) / step).round() * step
    return rounded.to(weight)
