"""Compressed checkpoints on disk: saved in the source's form, loaded strictly, verified after writing."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import CheckpointError, NumericsError, OutputError
from vitshrink.models import cost
from vitshrink.models.duals import read_together
from vitshrink.models.families import require_dtype
from vitshrink.models.hf_quantizer import list_structures
from vitshrink.models.loading import LoadedModel, load_source, moved, quiet_transformers
from vitshrink.models.source import examine, resolve
from vitshrink.models.structures import connect, structure_of
from vitshrink.models.views import computed

HEADER_BYTES = 200
"""Room for the entry of one tensor in the header of a safetensors file; real ones take about 130 bytes."""


def compressed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that are not the dense model's, by name in memory."""
    return {name: module for name, module in model.named_modules() if structure_of(module) is not None}


def replace_layers(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
    """Put structures in the place of the modules of these names, in their mode, and say so in the model's config."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(model.get_submodule(name).training), strict=True)
    connect(model.base_model)
    list_structures(model)


def save(
    model: PreTrainedModel,
    directory: Path,
    *,
    source: LoadedModel | None = None,
    dtype: torch.dtype | None = None,
    runs_in: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    in_place: bool = False,
) -> PreTrainedModel:
    """Write the model as a checkpoint directory that ``from_pretrained`` loads once vitshrink is imported.

    The weights are cast to ``dtype`` (the source's, or else the model's, if none is given). The config names
    ``runs_in`` (``dtype``, if none is given), the type that ``from_pretrained`` loads them in. Tensors are named as in
    the source's files, and its companions are copied: processor, tokenizer, sentence modules, license. ``metadata``
    (JSON) goes into the config, ``extra_files`` (by names relative to the directory) beside the weights. The model
    itself is not changed, unless ``in_place`` spares the copy. Writing is not atomic: give a staging directory, see
    ``publication.publish``.

    Returns:
        The model as it was saved: on the CPU, in the type that it was saved in.

    Raises:
        NumericsError: a value does not fit the type it is saved in.
        OutputError: the directory cannot be written.
    """
    as_it_is = dtype is None and source is None
    dtype = dtype or (source.source_dtype if source is not None else model.dtype)
    runs_in = runs_in or dtype
    saved = cast(model, dtype, in_place=in_place)
    list_structures(saved, metadata, stored=... if as_it_is else None if runs_in is dtype else dtype)
    try:
        with quiet_transformers():
            saved.save_pretrained(directory)
        if runs_in is not dtype:
            _name_type(directory / "config.json", runs_in)
        if source is not None:
            source.companions.copy_to(directory)
        for name, content in (extra_files or {}).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write the checkpoint to {directory}: {error}. Check free space and permissions."
        ) from error
    return saved


def _name_type(config: Path, dtype: torch.dtype) -> None:
    """Write into a config.json the type that the model runs in, in place of that of its files."""
    written = json.loads(config.read_text(encoding="utf-8"))
    written["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")  # as transformers does


def cast(model: PreTrainedModel, dtype: torch.dtype, *, in_place: bool = False) -> PreTrainedModel:
    """A copy of the model, or the model itself, on the CPU and in ``dtype``.

    Raises NumericsError, before anything is changed, where a value is not finite, and CheckpointError for a model that
    does not run in ``dtype``.
    """
    require_dtype(model, dtype)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or torch.isfinite(tensor.to(dtype)).all():
            continue
        largest = tensor.abs().max().item()
        if not math.isfinite(largest):
            raise NumericsError(f"{name} has values that are NaN or infinite, so the model is not saved.")
        raise NumericsError(
            f"{name} cannot be saved as {str(dtype).removeprefix('torch.')}: its largest value is {largest:.3g}, "
            f"but the type ends at {torch.finfo(dtype).max:.3g}. Choose bfloat16 or float32."
        )
    if not in_place:
        model = copy.deepcopy(model)
    else:  # aligned, and no parts of other tensors: as a copy has them, and what is loaded
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return moved(model, "cpu", dtype)


def load(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    offline: bool = False,
    revision: str | None = None,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Load a compressed (or dense) checkpoint strictly, in evaluation mode.

    Unlike ``from_pretrained``, this raises an error for every weight that is missing, unused, of another shape or not
    finite. ``dtype`` is by default the type that ``from_pretrained`` takes: that of the files, or a wider one that
    the config names beside it.

    Raises:
        CheckpointError: a checkpoint that cannot be read, or that does not match its config.
    """
    source = examine(resolve(path_or_id, offline=offline, revision=revision))
    model = load_source(source, dtype=dtype or source.runs_in, attention=attention).model
    read_together(model)
    return moved(model, device or "cpu")


@torch.no_grad()
def verify(
    directory: Path, model: PreTrainedModel, sample_inputs: Mapping[str, Tensor], *, attention: str = "sdpa"
) -> LoadedModel:
    """Load what was saved, and compare it with the model in memory, in the type that it was saved in.

    Tensors, their number and bytes, and the outputs for ``sample_inputs`` must agree exactly. A model that ``save`` has
    returned is compared as it is, any other is cast first.

    Returns:
        What was loaded, in the type that it is stored in.

    Raises:
        OutputError: naming what differs.
    """
    try:
        source = examine(directory)
        loaded = load_source(source, dtype=source.dtype, attention=attention)
    except CheckpointError as error:
        raise OutputError(f"the checkpoint just written does not load: {error}") from error
    reloaded = loaded.model
    expected = model if _is_as_stored(model, source.dtype) else cast(model, source.dtype).eval()

    there, here = expected.state_dict(), reloaded.state_dict()
    different = sorted(there.keys() ^ here.keys()) or [
        name for name in there if not torch.equal(there[name], here[name])
    ]
    if different:
        raise OutputError(f"{directory} does not contain the weights in memory: {', '.join(different[:6])} differ.")
    nbytes = cost.stored_bytes(expected)
    stored = sum(tensor.nbytes for tensor in source.tensors.values())
    if nbytes != stored:
        raise OutputError(f"{directory} contains {stored} bytes of tensors, but the model has {nbytes}.")

    inputs = {
        name: tensor.to("cpu", source.dtype if tensor.is_floating_point() else None)
        for name, tensor in sample_inputs.items()
    }
    for own, made in zip(computed(expected), computed(reloaded), strict=True):
        own[0][own[1]] = made[2]  # no file holds them, and where they are made they may be rounded otherwise
    before, after = (outputs(**inputs)[0] for outputs in (expected, reloaded))
    if not torch.isfinite(after).all():
        raise OutputError(f"{directory}: the outputs of the reloaded model are not finite.")
    if not torch.equal(before, after):
        difference = (before - after).abs().max().item()
        raise OutputError(f"{directory}: the outputs of the reloaded model differ by up to {difference:.3g}.")
    return loaded


def _is_as_stored(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return not model.training and all(tensor.dtype == dtype and tensor.is_cpu for tensor in tensors)
