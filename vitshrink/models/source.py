"""A foreign checkpoint directory, found and checked before transformers opens it.

transformers follows shard names and links out of the directory, takes code and file names from config.json
and fails on damaged files with messages that name none. So every file that will be read is looked at here
first: it must lie in the directory, hold what its name says, and bring no code.
"""

import json
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vitshrink.config.names import is_portable, unportable
from vitshrink.errors import CheckpointError, UsageError

CONFIG = "config.json"
MODULES = "modules.json"
STATE_DICT = "pytorch_model.bin"
CODE_SUFFIXES = (".py", ".pyc", ".so", ".ipynb", ".sh")
PICKLE_SUFFIXES = (".bin", ".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab*.txt",
    "vocab*.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    MODULES,
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
)
"""Files beside the weights that a compressed copy needs: image processor, tokenizer, sentence modules, licence."""

# In the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile and FSDP put into names, before parts of the model as well; no model has a part of this name."""

WRAPPERS = ("module.", "base_model.model.", "model.", *WITHIN)
"""What the wrappers of a model put before the names of all its tensors: data parallelism, PEFT, training loops."""

NESTED = ("state_dict", "model_state_dict", "model")
"""Entries of a training checkpoint under which the state dict lies."""

_CODE_KEYS = ("auto_map", "custom_pipelines", "transformers_weights", "fusion_config", "kernel_config")
_MAX_JSON_BYTES = 64 * 2**20
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
_AGAIN = "The file is damaged or incomplete: download or copy it again."


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


@dataclass(frozen=True)
class Source:
    """A checkpoint directory whose files were checked; no weight has been read yet."""

    directory: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    """Tensors of the weight files, by the names that the model gives them."""
    wrappers: tuple[str, ...] = ()
    """What the names on disk have before those of the model: ``module.``, say. Some of ``WRAPPERS``."""
    nested: bool = False
    """Whether the tensors lie under an entry of a training checkpoint, beside what else that holds."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the files were read."""
        removed = ", ".join(repr(wrapper) for wrapper in self.wrappers)
        notes = (
            [f"the names of the tensors of {self.directory} were read without {removed}, which a wrapper put there."]
            if self.wrappers
            else []
        )
        if self.nested:
            notes.append(
                f"{self.weights[0]} is a training checkpoint: its state dict was read, and nothing else of it."
            )
        return tuple(notes)

    def read_tensors(self) -> dict[str, torch.Tensor]:
        """The weights, for a checkpoint that transformers cannot read itself: one with ``wrappers``, or ``nested``."""
        found: dict[str, torch.Tensor] = {}
        for path in self.weights:
            found |= read_tensors(path)
        return {_unwrapped(name, self.wrappers): tensor for name, tensor in found.items()}

    @property
    def safetensors(self) -> bool:
        return self.weights[0].suffix == ".safetensors"

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that holds most of the weights."""
        numbers: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype.is_floating_point:
                numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel
        return max(numbers, key=lambda dtype: numbers[dtype])

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.weights)


def resolve(path_or_id: str | Path, *, offline: bool = False, revision: str | None = None) -> Path:
    """The local directory of a checkpoint: the folder itself, or the snapshot of a Hub model.

    Only configuration, tokenizer and weight files are downloaded, never code.

    Raises:
        CheckpointError: there is no such folder or model, it is gated, or the Hub cannot be reached.
        UsageError: a revision was given for a local folder.
    """
    path = Path(path_or_id).expanduser()
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    if is_directory:
        if not is_portable(path):
            raise CheckpointError(unportable(path))
        if revision is not None:
            raise UsageError(f"{path} is a local folder: a revision ({revision!r}) only makes sense for a Hub id.")
        return path
    if is_file:
        raise CheckpointError(f"{path} is a file: give the directory that holds it and its {CONFIG}.")
    name = str(path_or_id)
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1 or not name.strip():
        raise CheckpointError(f"no such folder: {name!r}. Check the path.")
    return _download(name, offline=offline or constants.HF_HUB_OFFLINE, revision=revision)


def _download(name: str, *, offline: bool, revision: str | None) -> Path:
    absent = f"no such folder: {name!r}, and"
    try:
        cached = try_to_load_from_cache(name, CONFIG, revision=revision)
    except HFValidationError as error:
        raise CheckpointError(f"{absent} it is not the id of a Hub model either. Check the path.") from error
    if offline:
        if isinstance(cached, str):
            return Path(cached).parent
        raise CheckpointError(
            f"{absent} no such model in the local Hub cache, and offline mode is on. "
            "Give a local folder, or run once with a network connection."
        )
    try:
        files = HfApi().list_repo_files(name, revision=revision)
        modules: tuple[Module, ...] = ()
        if MODULES in files:
            modules = modules_of(Path(snapshot_download(name, revision=revision, allow_patterns=[MODULES])))
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_wanted(files, modules))))
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"the Hub model {name!r} is gated: accept its terms at https://huggingface.co/{name} and log in "
            "with 'hf auth login', or give a local folder."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"the Hub model {name!r} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{absent} no such model on the Hub. Check the spelling; for a private model log in with 'hf auth login'."
        ) from error
    except Exception as error:  # the errors of whichever HTTP library huggingface_hub is built on
        raise CheckpointError(
            f"{absent} the Hub could not be asked for it ({error.__class__.__name__}: {_first_line(error)}). "
            "Check the network and the token, or "
            + ("use the copy in the local cache (offline)." if isinstance(cached, str) else "give a local folder.")
        ) from error


def _wanted(files: Iterable[str], modules: Iterable["Module"] = ()) -> Iterator[str]:
    """Of all files of a Hub model those to download: one form of the weights, and what belongs to it."""
    present = set(files)
    folders = tuple(f"{module.folder}/" for module in modules if module.folder)
    weights = next((name for name in _WEIGHTS if name in present), "")
    if weights.endswith(".index.json"):
        stem, suffix = weights.removesuffix(".index.json").split(".")
        shard = re.compile(rf"{stem}-\d+-of-\d+\.{suffix}")
        yield from (name for name in present if shard.fullmatch(name))
    for name in present:
        if name in (weights, CONFIG) or is_companion(name) or (name.startswith(folders) and is_module_file(name)):
            yield name


def is_companion(name: str) -> bool:
    """Whether a file of this name, relative to the directory, is one of COMPANIONS."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in COMPANIONS)


def is_module_file(name: str) -> bool:
    """Whether a file of a module's folder may be taken along: neither code nor a pickle, but its state dict."""
    file = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__pycache__" for part in file.parts)
    return not hidden and (file.name == STATE_DICT or file.suffix not in (*CODE_SUFFIXES, *PICKLE_SUFFIXES))


def examine(directory: Path) -> Source:
    """Check all files of a checkpoint directory that will be read.

    Raises:
        CheckpointError: a file is missing, damaged, of unknown kind, outside the directory, or brings code.
    """
    try:
        return _examine(directory)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or directory}: {error.strerror}.") from error


def _examine(directory: Path) -> Source:
    config = read_config(directory)
    weights, tensors, nested = _read_weights(directory)
    if not any(tensor.dtype.is_floating_point for tensor in tensors.values()):
        raise CheckpointError(f"{weights[0]} holds no floating-point tensor: it is no checkpoint of a model.")
    wrappers = _wrappers_of(tensors)
    named = {_unwrapped(name, wrappers): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise CheckpointError(
            f"{weights[0]} holds some tensors twice, with and without {' or '.join(wrappers)} in their names: save the "
            "state dict of one model."
        )
    return Source(directory, config, weights, named, wrappers, nested)


def _wrappers_of(names: Iterable[str]) -> tuple[str, ...]:
    """The wrappers whose names stand before those of the model, from the outermost on.

    Only those that all tensors have are taken off: where some lack one it may be part of the model.
    """
    found: list[str] = []
    left = set(names)
    while wrapper := next((each for each in WRAPPERS if left and all(name.startswith(each) for name in left)), None):
        found.append(wrapper)
        left = {name.removeprefix(wrapper) for name in left}
    within = (each for each in WITHIN if any(f".{each}" in f".{name}" for name in left))
    return tuple(dict.fromkeys((*found, *within)))


def _unwrapped(name: str, wrappers: Sequence[str]) -> str:
    for wrapper in wrappers:
        name = name.replace(wrapper, "") if wrapper in WITHIN else name.removeprefix(wrapper)
    return name


class Module(NamedTuple):
    """A step of a sentence encoder, as modules.json has it."""

    folder: str
    """Where its files are, relative to the directory; empty for the transformer, whose files lie there itself."""
    type: str
    """The dotted name of its class."""


def modules_of(directory: Path) -> tuple[Module, ...]:
    """The modules that sentence-transformers runs one after another; none where there is no modules.json.

    Raises CheckpointError where the file is damaged, or places a module outside the directory.
    """
    path = directory / MODULES
    if not path.exists() and not path.is_symlink():
        return ()
    check_regular(path, directory)
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise CheckpointError(f"{path} is no list of modules. {_AGAIN}")
    return tuple(_module(entry, path) for entry in entries)


def _module(entry: Any, path: Path) -> Module:
    folder, kind = (entry.get(key) if isinstance(entry, dict) else None for key in ("path", "type"))
    if not isinstance(folder, str) or not isinstance(kind, str):
        raise CheckpointError(f"{path} has an entry without path or type: {str(entry)[:100]}. {_AGAIN}")
    parts = PurePosixPath(folder).parts
    if PurePosixPath(folder).is_absolute() or ".." in parts or re.search(r"[\\\0:]", folder):
        raise CheckpointError(
            f"{path} places a module in {folder!r}, which is no folder of this directory: refused. "
            "Do not use this checkpoint unless you know why it says so."
        )
    return Module("/".join(parts), kind)


def read_json(path: Path) -> Any:
    """A JSON file. Raises CheckpointError naming the file when it is unreadable, too large or not JSON."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES // 2**20} MB: this is no configuration.")
        return json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path} is not valid JSON ({_first_line(error)}). {_AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return entries


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises CheckpointError where it is missing, damaged, or brings code."""
    path = directory / CONFIG
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(
            f"{directory} has no {CONFIG}: it is no Hugging Face model directory. "
            f"It holds {_listing(directory)}. Give the folder with {CONFIG} and the weights."
        )
    check_regular(path, directory)
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type: it is no configuration of a transformers model.")
    refuse_code(config, path)
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} holds a PEFT adapter (adapter_config.json): merge it into its base model first "
            "(merge_and_unload) and save the result."
        )
    return config


def refuse_code(config: Any, path: Path) -> None:
    """Raises CheckpointError where a configuration makes transformers run code of the checkpoint."""
    if isinstance(config, dict):
        for key in _CODE_KEYS:
            if config.get(key):
                raise CheckpointError(
                    f"{path} has an entry {key!r}, which makes transformers run code or open files of the "
                    "checkpoint's choice; vitshrink never does. If the weights are those of a standard "
                    "architecture, remove the entry in a copy."
                )


def _read_weights(directory: Path) -> tuple[tuple[Path, ...], dict[str, StoredTensor], bool]:
    """The weight files, their tensors, and whether these are nested in a training checkpoint."""
    entry = next((directory / name for name in _WEIGHTS if (directory / name).exists()), None)
    if entry is None:
        raise CheckpointError(
            f"{directory} has no weights that can be read: expected {', '.join(_WEIGHTS[:3])}. "
            f"It holds {_listing(directory)}. Convert the weights to safetensors, or download them as well."
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
            raise CheckpointError(f"{shard} is missing, but {entry.name} lists it: download or copy it as well.")
        check_regular(shard, directory)
        stored, part_of_more = _stored_tensors(shard)
        nested |= part_of_more
        for name, tensor in stored.items():
            if name in tensors:
                raise CheckpointError(
                    f"{directory}: the tensor {name!r} is in two shards, {holder[name].name} and {shard.name}. {_AGAIN}"
                )
            tensors[name], holder[name] = tensor, shard
    for name, shard_name in weight_map.items():
        if name not in tensors or holder[name].name != shard_name:
            raise CheckpointError(f"{entry} says that {name!r} is in {shard_name}, but it is not. {_AGAIN}")
    return shards, tensors, nested


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: it is no index of a sharded checkpoint. {_AGAIN}")
    suffix = ".safetensors" if ".safetensors" in path.name else ".bin"
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(suffix) or re.search(r"[/\\\0]", shard):
            raise CheckpointError(
                f"{path} places {tensor!r} in {shard!r}, which is no *{suffix} file of this directory: "
                "refused. Do not use this checkpoint unless you know why it says so."
            )
    return weight_map


def check_regular(path: Path, directory: Path) -> None:
    """A file of the directory or a link within it. Raises CheckpointError for anything else."""
    target = check_inside(path, directory)
    if not target.is_file():
        raise CheckpointError(f"{path} is not a file{' (a dangling link)' if path.is_symlink() else ''}.")


def check_inside(path: Path, directory: Path) -> Path:
    """Where a file or folder of the directory really is; the Hub cache links snapshots to the blobs beside them.

    Raises CheckpointError for a link that leads out of it.
    """
    root = directory.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link that leads nowhere ({_first_line(error)}).") from error
    if not target.is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link that leads out of the checkpoint, to {target}: refused. "
            f"If this is meant, put a copy of the {'folder' if target.is_dir() else 'file'} in its place."
        )
    return target


def _stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], bool]:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty. {_AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' in its repository.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: the download was answered by a login or error page.")
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
                        f"{path}: the tensor {name!r} is of type {dtype}, as quantised checkpoints have. "
                        "Start from the float32, float16 or bfloat16 checkpoint."
                    )
                tensors[name] = StoredTensor(_DTYPES[dtype], tuple(entry.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({_first_line(error)}). {_AGAIN}") from error
    return tensors


def _unpickled(path: Path, device: str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        # The message of torch is left out: it advises to switch the protection off.
        raise CheckpointError(
            f"{path} holds more than tensors (a whole pickled module, or code): refused, nothing was run. "
            "Ask the publisher for a safetensors file or a plain state dict."
        ) from error
    except Exception as error:  # a damaged archive fails in many ways, depending on where
        raise CheckpointError(f"{path} is not a readable PyTorch file ({_first_line(error)}). {_AGAIN}") from error


def _state_of(content: Any, path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The state dict that a file holds, and whether it is an entry of something larger."""
    if _is_state(content):
        return content, False
    found = [content[name] for name in NESTED if name in content] if isinstance(content, dict) else []
    if len(found) != 1 or not _is_state(found[0]):
        raise CheckpointError(
            f"{path} is not a state dict (tensors by name), and has none as its only entry of "
            f"{', '.join(NESTED)}: save model.state_dict() alone."
        )
    return found[0], True


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items())
    )


def _listing(directory: Path, most: int = 8) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), error.__class__.__name__)
