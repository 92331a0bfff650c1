"""Average-case sharpness: how far the loss rises under random noise of the weights (Neyshabur et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_in, check_nonnegative
from sam_core.sharpness._loss import check_finite_loss, parameter_loss
from sam_core.sharpness.lanczos import draw_vector
from sam_core.sharpness.trace import Estimate, mean_and_error


def compute_average_sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    sigma: float = 0.01,
    *,
    adaptive: bool = False,
    num_draws: int = 20,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The mean rise E L(w + e) - L(w) for normal e, of standard deviation sigma, or sigma |w| if adaptive.

    For small sigma it is sigma^2 tr H / 2, or sigma^2 sum_i w_i^2 H_ii / 2.
    Draws come in pairs e, -e: what is odd in e cancels, and with it most of the variance. The model is measured in eval
    mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        sigma: standard deviation, >= 0; in parameter units, relative to the weights if adaptive.
        adaptive: scale the noise of each entry by its |w|.
        num_draws: pairs, >= 2.
        generator: of the noise, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        ``value`` in units of the loss, ``standard_error``, and ``num_products``, here evaluations of the loss.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss at the weights is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)  # loss w^2: E (w + e)^2 - w^2 = sigma^2
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> rise = compute_average_sharpness(model, loss_fn, torch.ones(1, 1), torch.zeros(1, 1), sigma=0.1)
        >>> abs(rise.value - 0.01) < 3 * rise.standard_error
        True
    """
    check_nonnegative("sigma", sigma)
    check_in("adaptive", adaptive, (True, False))
    check_count("num_draws", num_draws, at_least=2)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    with parameter_loss(model, loss_fn, inputs, targets) as loss:
        at_w, rises = loss.value(loss.params), []
        check_finite_loss(at_w)
        for _ in range(num_draws):
            noise = loss.unflatten(sigma * draw_vector(loss.num_entries, loss.like, generator))
            if adaptive:
                noise = {name: move * loss.params[name].abs() for name, move in noise.items()}
            ends = [loss.value({n: p.add(noise[n], alpha=sign) for n, p in loss.params.items()}) for sign in (1, -1)]
            rises.append(sum(ends) / 2 - at_w)
    return Estimate(*mean_and_error(torch.tensor(rises, dtype=torch.float64)), 2 * num_draws + 1)
