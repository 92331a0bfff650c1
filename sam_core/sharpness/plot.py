"""Pictures of loss landscapes and spectral densities; matplotlib is imported when one is drawn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sam_core.sharpness.density import SpectralDensity
    from sam_core.sharpness.landscape import LossLandscape

_BLUE, _GREY = "#1f5fa8", "#8a8a8a"


def plot_landscape(landscape: LossLandscape, path: str | os.PathLike[str]) -> None:
    """Draw a curve for one direction, contour lines with w in the middle for two."""
    figure, axes = _figure()
    steps, losses = landscape.coordinates.numpy(), landscape.losses.numpy()
    if landscape.losses.ndim == 1:
        axes.plot(steps, losses, color=_BLUE)
        axes.axvline(0, color=_GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="step", ylabel="loss")
    else:
        axes.contourf(steps, steps, losses.T, levels=24, cmap="Blues")
        lines = axes.contour(steps, steps, losses.T, levels=12, colors=_BLUE, linewidths=0.7)
        axes.clabel(lines, fontsize=7)
        axes.plot(0, 0, "+", color="black", markersize=9)
        axes.set(xlabel="first direction", ylabel="second direction", title="loss", aspect="equal")
        axes.locator_params(nbins=5)
    _save(figure, path)


def plot_density(density: SpectralDensity, path: str | os.PathLike[str], sigma: float | None = None) -> None:
    """Draw the density on a logarithmic axis, over a hundredth of the spectrum's width unless sigma is given."""
    used = density.nodes[density.weights > 0]
    low, high = float(used.min()), float(used.max())
    width = sigma if sigma is not None else max((high - low) / 100, abs(high) / 1000, 1e-12)
    points = torch.linspace(low - 4 * width, high + 4 * width, 1000, dtype=torch.float64)
    values = density.evaluate(points, width)
    figure, axes = _figure()
    axes.semilogy(points.numpy(), values.numpy(), color=_BLUE)
    axes.set(xlabel="eigenvalue", ylabel="density", ylim=(float(values.max()) * 1e-7, float(values.max()) * 2))
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Whole or not at all."""
    file = Path(path)
    temporary = file.with_stem(f".{file.stem}.partial")
    try:
        figure.savefig(temporary, dpi=110)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
