"""The figures of an inspection: SVG files, the numbers behind them, and a page that explains them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitshrink.config.names import shown_data
from vitshrink.errors import DependencyError, OutputError
from vitshrink.jobs.inspection import figures
from vitshrink.jobs.inspection.activations import Activations
from vitshrink.jobs.inspection.layers import LayerInspection
from vitshrink.jobs.inspection.spectra import LayerSpectrum
from vitshrink.models.targets import Target
from vitshrink.report import drawing, render_figures
from vitshrink.statistics.stats import LinearStats

CAPTIONS = {
    "explained-variance": (
        "Explained variance by rank",
        "Fraction of the squared spectrum that a rank keeps. Left: of the weights. Right: of the weights times "
        "the scales of their inputs. If both sides look alike, the scaling changes little.",
    ),
    "output-loss": (
        "Output energy lost by rank",
        "Fraction of the energy of a layer's outputs that is lost on the sampled tokens, as the mean over the "
        "blocks. The measure is the same for every method. If the plain and scaled curves are equal, scaling by "
        "activations does not help. This happens after a normalization that makes the channels equal.",
    ),
    "attention-inputs": (
        "Scales of the attention inputs",
        "Standard deviation of each channel that query, key and value read, as a density over the channels. A "
        "narrow peak means equal scales; activation-scaled SVD is then plain SVD. A long tail means that "
        "scaling can help.",
    ),
    "pre-activations": (
        "Magnitudes before the activation function",
        "Density of |W x + b| of the first layer of each MLP. A GELU is close to x / 2 near zero and flat far "
        "below zero. An MLP that works mostly near zero behaves like one linear map.",
    ),
    "effective-rank": (
        "Effective rank",
        "exp of the entropy of the spectrum, divided by the full rank. If the outputs on real data need fewer "
        "directions than the weights have, methods that use data can help.",
    ),
    "predicted-loss": (
        "Predicted loss by layer",
        "Every layer is compressed to half of its numbers with the method curvature. The figure shows the "
        "fraction of each layer in the loss at the model's output, to second order. Layers with a large "
        "fraction should keep more parameters.",
    ),
}


def check_available() -> None:
    """Raises DependencyError, before any work, where matplotlib cannot be imported."""
    if not drawing.available():
        raise DependencyError("--figures needs matplotlib, which cannot be imported: pip install matplotlib.")


def write_figures(
    directory: Path,
    title: str,
    facts: Mapping[str, Any],
    *,
    targets: Sequence[Target],
    plain: Sequence[LayerInspection],
    weighted: Sequence[LayerInspection],
    stats: Mapping[str, LinearStats],
    activations: Activations,
    spectra: Sequence[LayerSpectrum],
) -> Path:
    """Write an SVG a figure, ``inspection.json`` and ``inspection.html``, and return the path of the last.

    Raises:
        OutputError: the directory cannot be written.
    """
    drawn = {
        "explained-variance": figures.explained_variance(spectra),
        "output-loss": figures.output_loss(spectra),
        "attention-inputs": figures.attention_inputs(targets, stats),
        "pre-activations": figures.pre_activations(activations),
        "effective-rank": figures.effective_rank(targets, plain, weighted),
        "predicted-loss": figures.predicted_loss(spectra),
    }
    shown = [(*CAPTIONS[name], picture) for name, picture in drawn.items() if picture is not None]
    page = directory / "inspection.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, picture in drawn.items():
            if picture is not None:
                (directory / f"{name}.svg").write_text(picture, encoding="utf-8")
        numbers = [_numbers(one, other, each) for one, other, each in zip(plain, weighted, spectra, strict=True)]
        (directory / "inspection.json").write_text(
            json.dumps({**shown_data(facts), "layers": numbers}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        page.write_text(render_figures(title, facts, shown), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the figures to {directory}: {error.strerror or error}.") from error
    return page


def _numbers(plain: LayerInspection, weighted: LayerInspection, spectrum: LayerSpectrum) -> dict[str, Any]:
    """The curves at 33 ranks: what the figures show, for those who draw their own."""
    steps = sorted({round(i * min(plain.shape) / 32) for i in range(33)})

    def curve(values: Any) -> dict[str, float]:
        return {str(rank): round(float(values[rank]), 6) for rank in steps}

    return {
        "name": plain.name,
        "block": spectrum.block,
        "role": spectrum.role,
        "shape": list(plain.shape),
        "effective_rank": plain.effective_rank,
        "effective_rank_of_outputs": weighted.effective_rank,
        "explained": {method: curve(values) for method, values in spectrum.explained.items()},
        "output_loss": {method: curve(values) for method, values in spectrum.lost.items()},
        "predicted_loss": spectrum.predicted_loss,
    }
