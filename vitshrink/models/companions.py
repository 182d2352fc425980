"""The files beside the weights: which of them a result takes from its source directory, and why it leaves the others.

Processor, tokenizer, license and the whole folders of sentence-transformers' modules are taken. Code and pickles never
are: a module's plain state dict is written as safetensors in its place. No link is followed out of the directory.
"""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors.torch import save_file

from vitshrink.config.names import shown
from vitshrink.errors import CheckpointError
from vitshrink.models.files import check_inside, check_regular, read_json, refuse_code
from vitshrink.models.source import (
    CODE_SUFFIXES,
    CONFIG,
    MODULES,
    PICKLE_SUFFIXES,
    STATE_DICT,
    is_companion,
    is_module_file,
    modules_of,
)
from vitshrink.models.weights import read_tensors
from vitshrink.runtime.observer import Job

SAFETENSORS = "model.safetensors"
SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
"""What sentence-transformers asks beside the modules: prompts and similarity, and how texts become tokens."""

HIDDEN = "hidden: it belongs to a tool"
DESCRIBES = "it describes the source"
WEIGHTS = "weights of the source"
CONVERTED = f"its tensors are written as {SAFETENSORS}"
OF_COURSE = (HIDDEN, DESCRIBES, WEIGHTS, CONVERTED)
"""Reasons for which nobody misses a file."""

CODE = "code, which vitshrink does not run or copy"
PICKLE = "a pickle, which may hold code"
LINK = "a link to a folder, which is not followed"
TRAINING = "the state of a training"
UNKNOWN = "not known to belong to a model"

_REASONS = (
    (("README*", "report.*", "comparison.*", "recipe.yaml", "export.json", "SHA256SUMS"), DESCRIBES),
    (("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*", "trainer_state.json"), TRAINING),
    (("*_results.json", "checkpoint-*", "runs", "logs", "eval", "events.out.*"), TRAINING),
    (("pytorch_model*.bin*", "model*.safetensors*", "tf_model*", "flax_model*", "rust_model*", "model.pt2"), WEIGHTS),
    (("*.h5", "*.msgpack", "*.ot", "*.gguf", "*.onnx*", "*.tflite", "onnx", "openvino*", "coreml"), WEIGHTS),
    ((*(f"*{suffix}" for suffix in CODE_SUFFIXES), "__pycache__"), CODE),
    (tuple(f"*{suffix}" for suffix in PICKLE_SUFFIXES), PICKLE),
)


@dataclass(frozen=True)
class Companions:
    """What lies beside the weights of a checkpoint directory."""

    directory: Path
    files: tuple[Path, ...] = ()
    """Those that a result takes along, relative to the directory."""
    left: Mapping[str, str] = field(default_factory=dict)
    """Those that it does not, by name, and why; a folder stands for all that is in it."""

    def copy_to(self, target: Path) -> None:
        """Copy the files, the state dict of a module as safetensors. Raises OSError and CheckpointError."""
        for name in self.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name.name == STATE_DICT:
                tensors = {
                    key: tensor.clone().contiguous() for key, tensor in read_tensors(self.directory / name).items()
                }
                save_file(tensors, target / name.with_name(SAFETENSORS), metadata={"format": "pt"})
            else:
                shutil.copyfile(self.directory / name, target / name)

    @property
    def of_modules(self) -> "Companions":
        """Only what sentence-transformers needs beside model and tokenizer."""
        folders = _module_folders(self.directory)
        own = {Path(MODULES), *map(Path, SETTINGS)}
        kept = (name for name in self.files if name in own or folders & set(name.parents))
        return Companions(self.directory, tuple(kept) if Path(MODULES) in self.files else ())

    def tell(self, job: Job) -> None:
        """Warn, in a line, of what was left behind and may be missed."""
        missed: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            if reason not in OF_COURSE:
                missed.setdefault(reason, []).append(name)
        if missed:
            told = "; ".join(
                f"{', '.join(names[:6])}{' …' if names[6:] else ''} ({why})" for why, names in missed.items()
            )
            job.warn(f"not copied from {self.directory}: {told}.")


def companions_of(directory: Path, weights: Collection[Path] = ()) -> Companions:
    """The files beside the ``weights`` of a directory; those to be taken are checked as ``source.examine`` checks.

    Raises CheckpointError.
    """
    try:
        return _companions_of(directory, {CONFIG, *(file.name for file in weights)})
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or directory}: {error.strerror}.") from error


def _companions_of(directory: Path, read: Collection[str]) -> Companions:
    folders = _module_folders(directory)
    files: list[Path] = []
    left: dict[str, str] = {}
    for entry in sorted(directory.iterdir()):
        name = Path(entry.name)
        if any(folder.is_relative_to(name) for folder in folders) and entry.is_dir():
            check_inside(entry, directory)
            for inner, why in _module_files(entry, directory):
                if why in (None, CONVERTED):
                    files.append(inner)
                if why is not None:
                    left[shown(inner.as_posix())] = why
        elif is_companion(entry.name) and not entry.is_dir():
            check_regular(entry, directory)
            if entry.name.endswith("_config.json"):
                refuse_code(read_json(entry), entry)
            files.append(name)
        elif entry.name not in read:
            left[shown(f"{entry.name}/" if entry.is_dir() else entry.name)] = _why(entry.name)
    return Companions(directory, tuple(files), left)


def _module_folders(directory: Path) -> set[Path]:
    return {Path(module.folder) for module in modules_of(directory) if module.folder}


def _module_files(folder: Path, directory: Path) -> Iterator[tuple[Path, str | None]]:
    """All files of a module's folder, relative to the directory, and why one of them is left behind."""
    for place, inner, names in os.walk(folder):
        inner.sort()
        for name in inner:
            if Path(place, name).is_symlink():
                yield Path(place, name).relative_to(directory), LINK
        for name in sorted(names):
            file = Path(place, name)
            relative = file.relative_to(directory)
            if not is_module_file(relative.as_posix()):
                yield relative, _why(name)
            elif name == STATE_DICT and SAFETENSORS in names:
                yield relative, f"{SAFETENSORS} beside it has the same"
            else:
                check_regular(file, directory)
                if name == STATE_DICT:
                    read_tensors(file)  # a damaged one is met now, and not when all the work is done
                yield relative, CONVERTED if name == STATE_DICT else None


def _why(name: str) -> str:
    if name.startswith("."):
        return HIDDEN
    return next((why for patterns, why in _REASONS if any(fnmatchcase(name, each) for each in patterns)), UNKNOWN)
