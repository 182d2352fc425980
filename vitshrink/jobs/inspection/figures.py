"""The pictures that tell when scaling by activations helps and when it does not."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitshrink.jobs.inspection.activations import Activations
from vitshrink.jobs.inspection.layers import LayerInspection
from vitshrink.jobs.inspection.spectra import METHODS, LayerSpectrum
from vitshrink.models.targets import Target
from vitshrink.report.drawing import COLORS, INK, canvas, svg
from vitshrink.statistics.stats import LinearStats

METHOD_NAMES = {"svd": "plain SVD", "asvd": "activation-scaled SVD", "whitened": "whitened (least loss)"}
VALUES = 20_000
"""A density is estimated from so many values at most."""


def explained_variance(spectra: Sequence[LayerSpectrum]) -> str:
    """Share of the squared spectrum over the rank, plain beside scaled, a line a block."""
    roles, blocks = _roles(spectra), sorted({each.block for each in spectra})
    figure, axes = canvas(8.6, 1.9 * len(roles) + 0.8, len(roles), 2, sharex=True, sharey=True, squeeze=False)
    color = _depth(blocks)
    for row, role in enumerate(roles):
        for column, method in enumerate(("svd", "asvd")):
            panel = axes[row, column]
            for each in (each for each in spectra if each.role == role):
                panel.plot(_fractions(each.explained[method]), each.explained[method], color=color(each.block), lw=1.1)
            panel.grid(alpha=0.2, color=INK)
            if row == 0:
                panel.set_title(METHOD_NAMES[method], fontsize=11)
        axes[row, 0].set_ylabel(role)
    for panel in axes[-1]:
        panel.set_xlabel("rank / full rank")
    _depth_bar(figure, axes, blocks)
    return svg(figure)


def output_loss(spectra: Sequence[LayerSpectrum]) -> str:
    """Share of the output energy that a rank loses, the mean over the blocks, a line a method."""
    roles = _roles(spectra)
    columns = min(3, len(roles))
    rows = -(-len(roles) // columns)
    figure, axes = canvas(3.1 * columns + 0.6, 2.5 * rows + 0.7, rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in axes.flat[len(roles) :]:
        panel.set_visible(False)
    for panel, role in zip(axes.flat, roles, strict=False):
        members = [each for each in spectra if each.role == role]
        for method, color in zip(METHODS, COLORS, strict=False):
            shortest = min(len(each.lost[method]) for each in members)
            mean = torch.stack([each.lost[method][:shortest] for each in members]).mean(0)
            panel.plot(_fractions(mean), mean.clamp_min(1e-5), color=color, lw=1.5, label=METHOD_NAMES[method])
        panel.set_title(role, fontsize=10)
        panel.set_yscale("log")
        panel.set_ylim(1e-4, 1.1)
        panel.grid(alpha=0.2, color=INK)
    for panel in axes[-1]:
        panel.set_xlabel("rank / full rank")
    for panel in axes[:, 0]:
        panel.set_ylabel("output energy lost")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3, fontsize=9
    )
    return svg(figure)


def pre_activations(activations: Activations) -> str | None:
    """Density of the magnitude of what enters the activation function, a line a block."""
    if not activations.pre_activations:
        return None
    samples = {block: values.flatten() for block, values in activations.pre_activations.items()}
    edge = max(float(values.abs().double().quantile(0.995)) for values in map(_thinned, samples.values()))
    grid = np.linspace(0, edge, 240)

    def folded(values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(density(values, grid) + density(values, -grid))

    return _densities(
        grid, {block: folded(_thinned(values).numpy()) for block, values in samples.items()}, "|pre-activation|"
    )


def attention_inputs(targets: Sequence[Target], stats: Mapping[str, LinearStats]) -> str | None:
    """Density over the channels of the standard deviation of what attention reads, a line a block."""
    deviations = {}
    for target in targets:
        statistics = stats[target.name]
        if target.role == "query" and statistics.gram is not None:
            variance = statistics.gram.diagonal() - statistics.mean.square()
            deviations[target.block] = variance.clamp_min(0).sqrt().cpu().numpy()
    if not deviations:
        return None
    edge = max(float(np.quantile(values, 0.99)) for values in deviations.values())
    grid = np.linspace(0, 1.2 * edge, 240)
    drawn = {block: density(values, grid) for block, values in deviations.items()}
    return _densities(grid, drawn, "standard deviation of a channel of the attention input")


def effective_rank(
    targets: Sequence[Target], plain: Sequence[LayerInspection], weighted: Sequence[LayerInspection]
) -> str:
    """Effective rank as a fraction of the full rank over the blocks: of the weights, and of their outputs."""
    figure, axes = canvas(9.2, 3.6, 1, 2, sharey=True)
    titles = ("of the weights", "of the outputs, on the data")
    for panel, layers, title in zip(axes, (plain, weighted), titles, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for target, each in zip(targets, layers, strict=True):
            lines.setdefault(target.role, []).append((target.block, each.effective_rank / min(each.shape)))
        for (role, line), color in zip(lines.items(), COLORS, strict=False):
            panel.plot(*zip(*sorted(line), strict=True), color=color, marker="o", markersize=4, label=role)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("block")
        panel.set_ylim(0, 1)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.2, color=INK)
    axes[0].set_ylabel("effective rank / full rank")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def predicted_loss(spectra: Sequence[LayerSpectrum]) -> str | None:
    """Each layer's share of the loss that is predicted where every layer is compressed to half of its numbers."""
    known = [each for each in spectra if each.predicted_loss is not None]
    total = sum(each.predicted_loss or 0.0 for each in known)
    if not known or total <= 0:
        return None
    import matplotlib

    blocks, roles = sorted({each.block for each in known}), _roles(known)
    shares = np.full((len(roles), len(blocks)), np.nan)
    for each in known:
        shares[roles.index(each.role), blocks.index(each.block)] = 100 * (each.predicted_loss or 0.0) / total
    figure, axes = canvas(max(5.0, 0.62 * len(blocks) + 2.4), 0.42 * len(roles) + 1.5)
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            light = sum(matplotlib.colormaps["viridis"](share / np.nanmax(shares))[:3]) > 1.5
            axes.text(
                column,
                row,
                f"{share:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="#1a1a1a" if light else "#ffffff",
            )
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(roles)), roles)
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=axes, pad=0.02, aspect=12).set_label("% of the predicted loss")
    return svg(figure)


def _densities(grid: NDArray[Any], densities: Mapping[int, NDArray[Any]], label: str) -> str:
    blocks = sorted(densities)
    figure, axes = canvas(8.6, 3.8)
    color = _depth(blocks)
    for block in blocks:
        axes.plot(grid, densities[block], color=color(block), lw=1.4)
    axes.set_xlabel(label)
    axes.set_ylabel("density")
    axes.set_xlim(grid[0], grid[-1])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2, color=INK)
    _depth_bar(figure, axes, blocks)
    return svg(figure)


def density(values: NDArray[Any], grid: NDArray[Any]) -> NDArray[Any]:
    """At each point of ``grid``: Gaussian kernels, Scott's bandwidth; values that are all alike get a narrow peak."""
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())):
        values = values + np.linspace(-1e-3, 1e-3, len(values)) * max(1.0, float(np.abs(values).max()))
    width = float(values.std(ddof=1)) * len(values) ** -0.2
    scale = width * math.sqrt(2 * math.pi)
    return np.array([np.exp(-0.5 * np.square((point - values) / width)).mean() / scale for point in grid])


def _thinned(values: Tensor) -> Tensor:
    return values[:: -(-len(values) // VALUES)]


def _roles(spectra: Sequence[LayerSpectrum]) -> list[str]:
    return list(dict.fromkeys(each.role for each in spectra))


def _fractions(curve: Tensor) -> Tensor:
    return torch.linspace(0, 1, len(curve))


def _depth(blocks: Sequence[int]) -> Any:
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    return lambda block: colors(0.05 + 0.85 * blocks.index(block) / max(1, len(blocks) - 1))


def _depth_bar(figure: Any, axes: Any, blocks: Sequence[int]) -> None:
    import matplotlib

    kept = matplotlib.colors.ListedColormap([_depth(blocks)(block) for block in blocks])
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-0.5, len(blocks) - 0.5), kept)
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=30, shrink=0.7)
    shown = range(0, len(blocks), max(1, len(blocks) // 6))
    bar.set_ticks(list(shown), labels=[str(blocks[i]) for i in shown])
    bar.set_label("block")
    bar.outline.set_visible(False)
