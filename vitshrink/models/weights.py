"""Weight files, sharded or not, safetensors or pickled: checked, and what they say of their tensors."""

import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vitshrink.errors import CheckpointError
from vitshrink.models.files import AGAIN, check_regular, first_line, listing, read_json

# In the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

NESTED = ("state_dict", "model_state_dict", "model")
"""Entries of a training checkpoint under which the state dict lies."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """What a weight file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def read_weights(directory: Path) -> tuple[tuple[Path, ...], dict[str, StoredTensor], bool]:
    """The weight files, their tensors, and whether these are nested in a training checkpoint."""
    entry = next((directory / name for name in WEIGHTS if (directory / name).exists()), None)
    if entry is None:
        raise CheckpointError(
            f"{directory} has no readable weights: expected {', '.join(WEIGHTS[:3])}. It contains "
            f"{listing(directory)}. Convert the weights to safetensors, or download them as well."
        )
    check_regular(entry, directory)
    if entry.suffix != ".json":
        return (entry,), *_stored_tensors(entry)
    weight_map = _read_index(entry)
    shards = tuple(directory / name for name in sorted(set(weight_map.values())))
    tensors: dict[str, StoredTensor] = {}
    holder: dict[str, Path] = {}
    nested = False
    for shard in shards:
        if not shard.exists():
            raise CheckpointError(f"{shard} is missing, but {entry.name} lists it: download or copy it.")
        check_regular(shard, directory)
        stored, part_of_more = _stored_tensors(shard)
        nested |= part_of_more
        for name, tensor in stored.items():
            if name in tensors:
                raise CheckpointError(
                    f"{directory}: the tensor {name!r} is in two shards, {holder[name].name} and {shard.name}. {AGAIN}"
                )
            tensors[name], holder[name] = tensor, shard
    for name, shard_name in weight_map.items():
        if name not in tensors or holder[name].name != shard_name:
            raise CheckpointError(f"{entry} says that {name!r} is in {shard_name}, but it is not. {AGAIN}")
    return shards, tensors, nested


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: it is not the index of a sharded checkpoint. {AGAIN}")
    suffix = ".safetensors" if ".safetensors" in path.name else ".bin"
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(suffix) or re.search(r"[/\\\0]", shard):
            raise CheckpointError(
                f"{path} places {tensor!r} in {shard!r}, which is not a *{suffix} file of this directory: "
                "refused. Do not use this checkpoint unless you know why."
            )
    return weight_map


def _stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], bool]:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty. {AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' in its repository.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path} is a web page, not weights: the server sent a login or error page instead of the file."
        )
    if path.suffix == ".safetensors":
        return _safetensors_header(path), False
    state, nested = _state_of(_unpickled(path, "meta"), path)
    return {name: StoredTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}, nested


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of the state dict in a pickled one. Raises CheckpointError; runs no code."""
    _stored_tensors(path)
    return load_file(path) if path.suffix == ".safetensors" else _state_of(_unpickled(path, "cpu"), path)[0]


def _safetensors_header(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, safe_open is no mapping
                entry = file.get_slice(name)
                dtype = entry.get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: the tensor {name!r} has type {dtype}, which quantized checkpoints use. Start "
                        "from the float32, float16 or bfloat16 checkpoint."
                    )
                tensors[name] = StoredTensor(_DTYPES[dtype], tuple(entry.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({first_line(error)}). {AGAIN}") from error
    return tensors


def _unpickled(path: Path, device: str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        # The message of torch is left out: it advises to switch the protection off.
        raise CheckpointError(
            f"{path} contains more than tensors (a whole pickled module, or code): refused, nothing was run. Ask "
            "the publisher for a safetensors file or a plain state dict."
        ) from error
    except Exception as error:  # a damaged archive fails in many ways, depending on where
        raise CheckpointError(f"{path} is not a readable PyTorch file ({first_line(error)}). {AGAIN}") from error


def _state_of(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The state dict that a file holds, and whether it is an entry of something larger."""
    if _is_state(content):
        return content, False
    found = [content[name] for name in NESTED if name in content] if isinstance(content, dict) else []
    if len(found) != 1 or not _is_state(found[0]):
        raise CheckpointError(
            f"{path} is not a state dict (tensors by name), and does not have one as its only entry of "
            f"{', '.join(NESTED)}: save model.state_dict() alone."
        )
    return found[0], True


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items())
    )
