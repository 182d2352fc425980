"""Images and texts: found, selected, decoded, preprocessed as the checkpoint says, and their labels aligned."""

from vitshrink.data.batches import BadSamples, Batch
from vitshrink.data.given import ReadyBatches, listed, samples_in_memory
from vitshrink.data.image_encoder import ImageEncoder
from vitshrink.data.images import ImageError, ImageSource, decode_image
from vitshrink.data.label_lists import align_label_lists
from vitshrink.data.labels import align_labels
from vitshrink.data.preprocessing import Preprocessor
from vitshrink.data.recipes import Kind, Recipe, load_recipe, recipe_defaults, recipe_names
from vitshrink.data.samples import Label, NothingLeftError, Sample, SampleSet, overlap
from vitshrink.data.sources import hub_source, open_samples
from vitshrink.data.text_encoder import TextEncoder

__all__ = [
    "BadSamples",
    "Batch",
    "ImageEncoder",
    "ImageError",
    "ImageSource",
    "Kind",
    "Label",
    "NothingLeftError",
    "Preprocessor",
    "ReadyBatches",
    "Recipe",
    "Sample",
    "SampleSet",
    "TextEncoder",
    "align_label_lists",
    "align_labels",
    "decode_image",
    "hub_source",
    "listed",
    "load_recipe",
    "open_samples",
    "overlap",
    "recipe_defaults",
    "recipe_names",
    "samples_in_memory",
]
