"""A foreign checkpoint directory, found and checked before transformers opens it.

transformers follows shard names and links out of the directory, takes code and file names from config.json
and fails on damaged files with messages that name none. So every file that will be read is looked at here
first: it must lie in the directory, hold what its name says, and bring no code.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vitshrink.errors import CheckpointError, OutputError, UsageError
from vitshrink.models import places
from vitshrink.models.files import AGAIN, check_regular, first_line, listing, read_json, refuse_code
from vitshrink.models.timm import as_wrapped
from vitshrink.models.weights import WEIGHTS, StoredTensor, read_tensors, read_weights
from vitshrink.runtime.storage import MARKER, Place, is_url, scratch

CONFIG = places.CONFIG
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
    "spm.model",
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
"""Files beside the weights that a compressed copy needs: image processor, tokenizer, sentence modules, license."""

WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile and FSDP put into names, before parts of the model as well; no model has a part of this name."""

WRAPPERS = ("module.", "base_model.model.", "model.", *WITHIN)
"""What the wrappers of a model put before the names of all its tensors: data parallelism, PEFT, training loops."""


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
            [f"a wrapper added {removed} to the tensor names of {self.directory}; they were read without it."]
            if self.wrappers
            else []
        )
        if self.nested:
            notes.append(f"{self.weights[0]} is a training checkpoint: only its state dict was read.")
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
    def runs_in(self) -> torch.dtype:
        """The type that the model is made for: of the files, or a wider one, where vitshrink has stored a narrower."""
        stored = self.config.get("quantization_config") or {}
        named = getattr(torch, str(self.config.get("dtype")), None)
        narrow = isinstance(stored, dict) and stored.get("stored_dtype") is not None
        return named if narrow and isinstance(named, torch.dtype) else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.weights)


def resolve(path_or_id: str | Path, *, offline: bool = False, revision: str | None = None) -> Path:
    """The local directory of a checkpoint: the folder itself, the snapshot of a Hub model, or a copy of a URL's.

    Only configuration, tokenizer and weight files are downloaded, never code.

    Raises:
        CheckpointError: there is no such folder or model, it is gated, or the Hub cannot be reached.
        UsageError: a revision was given for a local folder.
    """
    found = places.find(path_or_id, offline=offline, revision=revision)
    if is_url(path_or_id):
        if revision is not None:
            raise UsageError(f"{path_or_id} is a URL, and a revision ({revision!r}) works only with a Hub id.")
        return _fetched(str(path_or_id))
    return _download(str(path_or_id), revision=revision) if found is None else found


@cache
def _fetched(url: str) -> Path:
    """A copy of the files of a checkpoint, for as long as this process lives.

    Raises CheckpointError where there is none, and for what vitshrink has not, or not wholly, written there.
    """
    place = Place.of(url)
    target = scratch("model") / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        names = place.names()
        if MARKER in names:
            place.download(target)
        elif "report.json" in names:
            raise CheckpointError(
                f"{url} contains no complete model, because {MARKER} is missing. Another job still writes it, or "
                "a job was stopped."
            )
        elif CONFIG not in names:
            raise CheckpointError(f"{url} contains no checkpoint, because {CONFIG} is missing. Check the URL.")
        else:
            modules: tuple[Module, ...] = ()
            if MODULES in names:
                place.fetch(MODULES, target / MODULES)
                modules = modules_of(target)
            for name in _wanted(names, modules):
                place.fetch(name, target / name)
    except OutputError as error:
        raise CheckpointError(str(error)) from error
    return target


def _download(name: str, *, revision: str | None) -> Path:
    absent = places.absent(name)
    cached = try_to_load_from_cache(name, CONFIG, revision=revision)
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
            f"{absent} the Hub cannot be reached ({error.__class__.__name__}: {first_line(error)}). Check the "
            "network and the token, or "
            + ("use the copy in the local cache (offline)." if isinstance(cached, str) else "give a local folder.")
        ) from error


def _wanted(files: Iterable[str], modules: Iterable["Module"] = ()) -> Iterator[str]:
    """Of all files of a Hub model those to download: one form of the weights, and what belongs to it."""
    present = set(files)
    folders = tuple(f"{module.folder}/" for module in modules if module.folder)
    weights = next((name for name in WEIGHTS if name in present), "")
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
    weights, tensors, nested = read_weights(directory)
    if not any(tensor.dtype.is_floating_point for tensor in tensors.values()):
        raise CheckpointError(f"{weights[0]} contains no floating-point tensor: it is not a model checkpoint.")
    wrappers = _wrappers_of(tensors)
    named = {_unwrapped(name, wrappers): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise CheckpointError(
            f"{weights[0]} contains some tensors twice, with and without {' or '.join(wrappers)} in their names: "
            "save the state dict of one model."
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
        raise CheckpointError(f"{path} is not a list of modules. {AGAIN}")
    return tuple(_module(entry, path) for entry in entries)


def _module(entry: Any, path: Path) -> Module:
    folder, kind = (entry.get(key) if isinstance(entry, dict) else None for key in ("path", "type"))
    if not isinstance(folder, str) or not isinstance(kind, str):
        raise CheckpointError(f"{path} has an entry without path or type: {str(entry)[:100]}. {AGAIN}")
    parts = PurePosixPath(folder).parts
    if PurePosixPath(folder).is_absolute() or ".." in parts or re.search(r"[\\\0:]", folder):
        raise CheckpointError(
            f"{path} has a module in {folder!r}, which is not a folder of this directory: refused. Do not use "
            "this checkpoint unless you know why."
        )
    return Module("/".join(parts), kind)


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises CheckpointError where it is missing, damaged, or brings code."""
    path = directory / CONFIG
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(
            f"{directory} has no {CONFIG}: it is not a Hugging Face model directory. It contains "
            f"{listing(directory)}. Give the folder with {CONFIG} and the weights."
        )
    check_regular(path, directory)
    config = read_json(path)
    config = as_wrapped(config, path) if isinstance(config, dict) else config
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type: it is not a configuration of a transformers model.")
    refuse_code(config, path)
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} contains a PEFT adapter (adapter_config.json): merge it into its base model "
            "(merge_and_unload) and save the result."
        )
    return config
