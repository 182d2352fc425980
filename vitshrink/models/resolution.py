"""What an image model looks at: at which resolution, and in how many tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import CheckpointError, UsageError
from vitshrink.models.checkpoint import replace_layers
from vitshrink.models.families import family_of, require_grid
from vitshrink.models.geometry import sides
from vitshrink.models.hf_quantizer import base_prefix
from vitshrink.models.structures import fill, structure_of
from vitshrink.models.structures.coded import CodedPositions
from vitshrink.models.structures.landmarks import Landmarks
from vitshrink.models.structures.merging import MergedTokens
from vitshrink.models.structures.tokens import SCORERS, MixedTokens

_NAMES = {MixedTokens: "mixed tokens", MergedTokens: "merged tokens", Landmarks: "landmarks"}


def _embeddings(model: PreTrainedModel, flag: str) -> Any:
    """With positions of its own, decoded where they were not."""
    family = family_of(model)
    if family.modality == "text":
        raise UsageError(
            f"{flag} is about the patches of an image, but {type(model).__name__} ({family.model_type}) reads text."
        )
    require_grid(model, flag)
    found = model.base_model.get_submodule("embeddings")
    if isinstance(found, CodedPositions):
        found = found.dense()
        model.base_model.set_submodule("embeddings", found)
    return found


@torch.no_grad()
def set_resolution(model: PreTrainedModel, size: int) -> None:
    """Make a model take images of ``size`` × ``size`` pixels: positions are interpolated, in place.

    Bicubic, as transformers does for ``interpolate_pos_encoding``. Raises UsageError.
    """
    embeddings = _embeddings(model, "--resolution")
    for spec in map(structure_of, model.modules()):
        if isinstance(spec, MixedTokens | MergedTokens | Landmarks):
            what = _NAMES[type(spec)]
            raise UsageError(
                f"--resolution {size}: the {what} of this model belong to {model.config.image_size} pixels. "
                "Compress the dense model again with --resolution."
            )
    height, width = sides(model.config.image_size)
    if height != width:
        raise UsageError(
            f"--resolution {size} is the side of square images, but this model takes {height} × {width} pixels."
        )
    patches = embeddings.patch_embeddings
    kernel = patches.projection.kernel_size
    if size < 1 or any(size % each for each in kernel):
        raise UsageError(f"--resolution {size}: give a multiple of the patch size, {kernel[0]} pixels.")
    native = [old // each for old, each in zip(patches.image_size, kernel, strict=True)]
    grid = [size // each for each in kernel]
    positions = embeddings.position_embeddings
    assert isinstance(positions, Tensor)
    special = positions.shape[1] - native[0] * native[1]
    plane = positions[:, special:].view(1, *native, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=grid, mode="bicubic", align_corners=False)
    own = torch.cat([positions[:, :special], plane.flatten(2).transpose(1, 2)], 1)
    embeddings.position_embeddings = nn.Parameter(own, requires_grad=positions.requires_grad)
    embeddings.image_size = patches.image_size = (size, size)
    patches.num_patches = grid[0] * grid[1]
    model.config.image_size = size


def mix_tokens(model: PreTrainedModel, tokens: MixedTokens) -> None:
    """Make a dense model read mixed-resolution tokens, in place. Raises UsageError where it cannot."""
    embeddings = _embeddings(model, "--tokens mixed")
    if tokens.scorer not in SCORERS:
        raise UsageError(f"--token-scorer {tokens.scorer}: unknown. Available: {', '.join(SCORERS)}.")
    for spec in map(structure_of, model.modules()):
        if isinstance(spec, Landmarks):
            raise UsageError(
                "--tokens mixed have no grid of patches, and the landmarks of this model need one: use one of them."
            )
        if isinstance(spec, MergedTokens):
            raise UsageError("--tokens mixed: this model already has other tokens than the dense one.")
    if not tokens.fits(embeddings):
        raise UsageError("--tokens mixed: this model already has other tokens than the dense one.")
    positions = embeddings.position_embeddings
    assert isinstance(positions, Tensor)
    try:
        built = tokens.build(embeddings)
    except CheckpointError as error:
        raise UsageError(f"--tokens mixed: {error}") from error
    fill(built, {"position_embeddings": positions.detach()[0]})
    replace_layers(model, {f"{base_prefix(model)}embeddings": built})
