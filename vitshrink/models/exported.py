"""Files that ``vitshrink export`` wrote, or others made of them, as models that are evaluated like checkpoints."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vitshrink.errors import CheckpointError
from vitshrink.models import onnx_model, openvino_model
from vitshrink.models.companions import companions_of
from vitshrink.models.families import family_named
from vitshrink.models.loading import LoadedModel, embedding_of
from vitshrink.models.onnx_model import OnnxFile, OnnxModel
from vitshrink.models.publication import EXPORT
from vitshrink.models.source import CONFIG, Source, read_config
from vitshrink.runtime.extras import require


@dataclass(frozen=True)
class Kind:
    """How files of a suffix are opened, and what they hold."""

    extra: str
    open: Callable[[Path], OnnxFile]
    numbers: Callable[[Path], int]
    files: Callable[[Path], tuple[Path, ...]]


KINDS = {
    onnx_model.SUFFIX: Kind("onnx", OnnxFile.open, onnx_model.onnx_numbers, onnx_model.onnx_files),
    openvino_model.SUFFIX: Kind("openvino", openvino_model.open_ir, openvino_model.ir_numbers, openvino_model.ir_files),
}


def exported_file(name: str) -> Path | None:
    """The file that is meant: it itself, or that of a directory that ``vitshrink export`` wrote; None for others."""
    path = Path(name).expanduser()
    if path.suffix in KINDS and not path.is_dir():
        return path
    try:
        record = json.loads((path / EXPORT).read_text(encoding="utf-8"))
        file = path / str(record["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return file if file.suffix in KINDS else None


def numbers_of(path: Path) -> int:
    """How many numbers a file stores."""
    return KINDS[path.suffix].numbers(path)


def load_exported(path: Path) -> LoadedModel:
    """A file that ``vitshrink export`` wrote, with the configuration and processor files beside it.

    Raises:
        DependencyError: what runs it is missing.
        CheckpointError: the file is damaged, or stands alone.
    """
    kind = KINDS[path.suffix]
    require(kind.extra, path.name)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if not (path.parent / CONFIG).is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG} beside it, which describes its outputs: keep the files that `vitshrink "
            "export` wrote together, or copy the files of the checkpoint there."
        )
    entries = read_config(path.parent)
    architecture = str((entries.get("architectures") or ["none"])[0])
    family = family_named(entries["model_type"], architecture, str(path.parent / CONFIG))
    try:
        config = CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
    except Exception as error:
        raise CheckpointError(f"{path.parent / CONFIG} cannot be read by transformers: {error}") from error
    session = kind.open(path)
    needed = "pixel_values" if family.modality == "image" else "input_ids"
    if needed not in session.inputs or not {"logits", "start_logits", "last_hidden_state"} & set(session.outputs):
        raise CheckpointError(
            f"{path} has the inputs {', '.join(session.inputs)} and the outputs {', '.join(session.outputs)}: "
            "`vitshrink export` did not write it for this architecture."
        )
    model: Any = OnnxModel(session, config, architecture).eval()
    source = Source(path.parent, entries, kind.files(path), tensors={})
    companions = companions_of(path.parent, list(kind.files(path)))
    return LoadedModel(model, source, torch.float32, family, companions, embedding_of(path.parent, model))
