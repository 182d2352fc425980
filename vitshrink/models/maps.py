"""Attention maps of low rank, as an option of inference: the weights stay as they are."""

import torch
from torch import nn
from transformers import PreTrainedModel

from vitshrink.errors import UsageError
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.families import family_of, require_grid
from vitshrink.models.geometry import grid_of
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.landmarks import FORMS, Landmarks
from vitshrink.models.structures.merging import MergedTokens
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.models.targets import blocks_of


def landmarks_of(model: PreTrainedModel, landmarks: int, form: str) -> Landmarks:
    """What a model's attentions shall become. Raises UsageError where they cannot."""
    family = family_of(model)
    if family.modality == "text":
        raise UsageError(
            f"--landmarks are means over a grid of patches, but {type(model).__name__} ({family.model_type}) "
            "reads text, and the means would contain padding."
        )
    require_grid(model, "--landmarks")
    if form not in FORMS:
        raise UsageError(f"--landmark-form {form}: unknown. Available: {', '.join(FORMS)}.")
    embeddings = model.base_model.get_submodule("embeddings")
    if isinstance(getattr(embeddings, "spec", None), MixedTokens):
        raise UsageError("--landmarks need a grid of patches, and mixed tokens have no grid: use one of them.")
    if any(isinstance(structure_of(block), MergedTokens) for block in blocks_of(model)):
        raise UsageError("--landmarks need a grid of patches, and merged tokens have no grid: use one of them.")
    found = Landmarks(landmarks, 2 if hasattr(embeddings, "distillation_token") else 1, form)
    try:
        found.window(grid_of(model.config))
    except ValueError as error:
        raise UsageError(f"--landmarks: {error}") from error
    for name, attention in _attentions(model).items():
        if not found.fits(attention):
            raise UsageError(f"--landmarks: {name} is a {type(attention).__name__}, not the dense model's attention.")
    return found


@torch.no_grad()
def approximate_maps(model: PreTrainedModel, landmarks: Landmarks) -> None:
    """Put landmarks into every attention of a model, in place; its layers may be of low rank already."""
    attentions = _attentions(model)
    for attention in attentions.values():
        weights = {name: parameter.detach().clone() for name, parameter in attention.named_parameters()}
        for name, parameter in landmarks.build(attention).named_parameters():
            parameter.copy_(weights[name].view_as(parameter))
    replace_layers(model, attentions)


def _attentions(model: PreTrainedModel) -> dict[str, nn.Module]:
    path = family_of(model).modules["query"].rpartition(".")[0]
    names = {module: name for name, module in model.named_modules()}
    found = [block.get_submodule(path) for block in blocks_of(model)]
    return {names[module]: module for module in found}
