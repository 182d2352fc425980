"""What the linear layers of a model look like to a low-rank method: in numbers, and in figures."""

from vitshrink.jobs.inspection.activations import Activations, sample_activations
from vitshrink.jobs.inspection.layers import LayerInspection, inspect_layers, rank_at
from vitshrink.jobs.inspection.page import check_available, write_figures
from vitshrink.jobs.inspection.spectra import LayerSpectrum, layer_spectra

__all__ = [
    "Activations",
    "LayerInspection",
    "LayerSpectrum",
    "check_available",
    "inspect_layers",
    "layer_spectra",
    "rank_at",
    "sample_activations",
    "write_figures",
]
