"""A tiny checkpoint as somebody else might have saved it."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

Tensors = dict[str, torch.Tensor]


@dataclass
class Checkpoint:
    """Built from ``entries``, changed, saved, and changed once more on the disk."""

    architecture: str
    entries: dict[str, Any] = field(default_factory=dict)
    """Of the config; shapes follow from them."""
    said: dict[str, Any] = field(default_factory=dict)
    """Entries that config.json gets afterwards; None removes one."""
    processor: dict[str, Any] = field(default_factory=dict)
    """Likewise of the image processor."""
    dtype: torch.dtype = torch.float32
    weights: list[Callable[[PreTrainedModel], None]] = field(default_factory=list)
    """What is done to the model before it is saved."""
    stored: list[Callable[[Tensors], Tensors]] = field(default_factory=list)
    """What is done to the tensors of the file."""
    form: Literal["safetensors", "bin", "shards", "bin-shards"] = "safetensors"
    files: list[Callable[[Path], None]] = field(default_factory=list)
    """What is done to the directory at last."""

    @property
    def reads(self) -> Literal["image", "text"]:
        return "text" if self.architecture in tiny.TEXT_MODELS else "image"

    @property
    def classifies(self) -> bool:
        return "Classification" in self.architecture

    def write(self, directory: Path) -> "Reference":
        directory.mkdir(parents=True)
        model = tiny.build(self.architecture, **self.entries)
        if self.classifies:  # the answers of a random head are all the same
            for name, parameter in model.named_parameters():
                if "classifier" in name:
                    parameter.data *= 8
        model.to(self.dtype)
        for change in self.weights:
            change(model)
        model.save_pretrained(directory)
        (tiny.write_tokenizer if self.reads == "text" else tiny.write_processor)(directory)
        _merge(directory / "config.json", self.said)
        if self.reads == "image":
            _merge(directory / "preprocessor_config.json", self.processor)
        reference = Reference(model.float(), directory)
        self._store(directory)
        for change_files in self.files:
            change_files(directory)
        return reference

    def _store(self, directory: Path) -> None:
        if not self.stored and self.form == "safetensors":
            return
        file = directory / "model.safetensors"
        tensors = load_file(file)
        for change in self.stored:
            tensors = change(tensors)
        file.unlink()
        stem, suffix = ("pytorch_model", "bin") if self.form.startswith("bin") else ("model", "safetensors")
        if not self.form.endswith("shards"):
            _save(tensors, directory / f"{stem}.{suffix}")
            return
        names = list(tensors)
        weight_map = {}
        for part in range(3):
            shard = f"{stem}-{part + 1:05}-of-00003.{suffix}"
            _save({name: tensors[name] for name in names[part::3]}, directory / shard)
            weight_map |= dict.fromkeys(names[part::3], shard)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _save(tensors: Tensors, file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def _merge(file: Path, entries: dict[str, Any]) -> None:
    if entries:
        document = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


class Reference:
    """The model as transformers runs it: what it answers is what the labels of the data are made of."""

    def __init__(self, model: PreTrainedModel, directory: Path) -> None:
        self.model = model.eval()
        self.reader: Any = None
        with suppress(Exception):  # some oddities leave it without one
            kind = AutoTokenizer if (directory / "tokenizer.json").exists() else AutoImageProcessor
            self.reader = kind.from_pretrained(directory)

    @property
    def classes(self) -> list[str]:
        return [str(name) for _, name in sorted(self.model.config.id2label.items())]

    @torch.inference_mode()
    def answers(self, samples: list[Any]) -> list[int] | None:
        """The class of each text, pair of texts or image; None where plain transformers gives none."""
        with suppress(Exception):
            if isinstance(samples[0], Image.Image):
                read = self.reader([image.convert("RGB") for image in samples], return_tensors="pt")
            else:
                read = self.reader(samples, padding=True, truncation=True, return_tensors="pt")
            logits = self.model(**read).logits
            if logits.ndim == 2 and logits.isfinite().all():
                return [int(index) for index in logits.argmax(-1)]
        return None
