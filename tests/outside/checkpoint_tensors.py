"""Weights that are unusual: types, names, forms and values."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .checkpoint import Checkpoint, Tensors
from .oddity import oddity


def _renamed(checkpoint: Checkpoint, name: Callable[[str], str]) -> None:
    checkpoint.stored.append(lambda tensors: {name(old): tensor for old, tensor in tensors.items()})


def _matrix(model: PreTrainedModel) -> torch.nn.Parameter:
    """The weight of the last layer of the first block."""
    found = [parameter for name, parameter in model.named_parameters() if ".0." in name and parameter.ndim == 2]
    return found[-1]


@oddity(Checkpoint, slot="dtype", outcome="works")
def float16(checkpoint: Checkpoint) -> None:
    checkpoint.dtype = torch.float16


@oddity(Checkpoint, slot="dtype", outcome="works")
def bfloat16(checkpoint: Checkpoint) -> None:
    checkpoint.dtype = torch.bfloat16


@oddity(Checkpoint, slot="dtype")
def float64(checkpoint: Checkpoint) -> None:
    checkpoint.dtype = torch.float64


@oddity(Checkpoint, slot="dtype", outcome="works")
def several_types(checkpoint: Checkpoint) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {name: tensor if "norm" in name.lower() else tensor.bfloat16() for name, tensor in tensors.items()}

    checkpoint.stored.append(change)


@oddity(Checkpoint, slot="prefix", outcome="works")
def prefix_module(checkpoint: Checkpoint) -> None:
    _renamed(checkpoint, "module.{}".format)


@oddity(Checkpoint, slot="prefix", outcome="works")
def prefix_orig_mod(checkpoint: Checkpoint) -> None:
    _renamed(checkpoint, "_orig_mod.{}".format)


@oddity(Checkpoint, slot="prefix", outcome="works")
def prefix_model(checkpoint: Checkpoint) -> None:
    _renamed(checkpoint, "model.{}".format)


@oddity(Checkpoint, slot="prefix", outcome="works")
def prefix_of_peft(checkpoint: Checkpoint) -> None:
    _renamed(checkpoint, "base_model.model.{}".format)


@oddity(Checkpoint, slot="prefix", outcome="works")
def two_prefixes(checkpoint: Checkpoint) -> None:
    _renamed(checkpoint, "module._orig_mod.{}".format)


@oddity(Checkpoint, slot="prefix")
def prefix_of_some(checkpoint: Checkpoint) -> None:
    _renamed(checkpoint, lambda name: f"module.{name}" if "layer" in name else name)


@oddity(Checkpoint, slot="prefix", only=("Bert",), outcome="works")
def old_names_of_norms(checkpoint: Checkpoint) -> None:
    _renamed(
        checkpoint,
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    )


@oddity(Checkpoint, slot="form", outcome="works")
def pickled(checkpoint: Checkpoint) -> None:
    checkpoint.form = "bin"


@oddity(Checkpoint, slot="form", outcome="works")
def sharded(checkpoint: Checkpoint) -> None:
    checkpoint.form = "shards"


@oddity(Checkpoint, slot="form", outcome="works")
def pickled_shards(checkpoint: Checkpoint) -> None:
    checkpoint.form = "bin-shards"


@oddity(Checkpoint, slot="form", outcome="works")
def both_forms(checkpoint: Checkpoint) -> None:
    checkpoint.files.append(lambda directory: torch.save({"x": torch.zeros(1)}, directory / "pytorch_model.bin"))


@oddity(Checkpoint, slot="form", outcome="refused")
def half_a_file(checkpoint: Checkpoint) -> None:
    def change(directory: Path) -> None:
        for file in directory.glob("*model*.safetensors"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    checkpoint.form = "safetensors"
    checkpoint.files.append(change)


@oddity(Checkpoint, slot="form", outcome="refused")
def large_file_pointer(checkpoint: Checkpoint) -> None:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n"
        )

    checkpoint.files.append(change)


@oddity(Checkpoint, slot="more", outcome="works")
def buffers_of_old(checkpoint: Checkpoint) -> None:
    body = checkpoint.architecture.partition("For")[0].removesuffix("Model").lower()

    def change(tensors: Tensors) -> Tensors:
        prefix = f"{body}." if any(name.startswith(f"{body}.") for name in tensors) else ""
        return tensors | {f"{prefix}embeddings.position_ids": torch.arange(64)[None]}

    checkpoint.stored.insert(0, change)  # before names get a prefix


@oddity(Checkpoint, slot="more")
def tensors_of_nobody(checkpoint: Checkpoint) -> None:
    checkpoint.stored.append(lambda tensors: tensors | {"ema.decay": torch.zeros(1), "step": torch.tensor(3)})


@oddity(Checkpoint, slot="less", outcome="refused")
def tensor_missing(checkpoint: Checkpoint) -> None:
    def change(tensors: Tensors) -> Tensors:
        gone = next(name for name in tensors if "query" in name or "q_proj" in name)
        return {name: tensor for name, tensor in tensors.items() if name != gone}

    checkpoint.stored.append(change)


@oddity(Checkpoint, slot="less")
def head_missing(checkpoint: Checkpoint) -> None:
    checkpoint.stored.append(
        lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(("classifier", "cls."))}
    )


@oddity(Checkpoint, slot="less", outcome="refused")
def shape_of_another(checkpoint: Checkpoint) -> None:
    def change(tensors: Tensors) -> Tensors:
        name = next(name for name, tensor in tensors.items() if ".0." in name and tensor.ndim == 2)
        return tensors | {name: torch.zeros(5, 5)}

    checkpoint.stored.append(change)


@oddity(Checkpoint, slot="values", outcome="refused", commands=("compress", "eval", "inspect", "quantize"))
def not_a_number(checkpoint: Checkpoint) -> None:
    def change(model: PreTrainedModel) -> None:
        _matrix(model).data[0, 0] = torch.nan

    checkpoint.weights.append(change)


@oddity(Checkpoint, slot="values", outcome="works")
def layer_of_zeros(checkpoint: Checkpoint) -> None:
    def change(model: PreTrainedModel) -> None:
        _matrix(model).data.zero_()

    checkpoint.weights.append(change)


@oddity(Checkpoint, slot="values")
def all_zeros(checkpoint: Checkpoint) -> None:
    def change(model: PreTrainedModel) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()

    checkpoint.weights.append(change)


@oddity(Checkpoint, slot="values", outcome="works")
def layer_of_rank_one(checkpoint: Checkpoint) -> None:
    def change(model: PreTrainedModel) -> None:
        weight = _matrix(model).data
        weight.copy_(weight[:1] * torch.ones_like(weight[:, :1]))

    checkpoint.weights.append(change)


@oddity(Checkpoint, slot="values")
def huge_values(checkpoint: Checkpoint) -> None:
    def change(model: PreTrainedModel) -> None:
        _matrix(model).data.mul_(3e4 if checkpoint.dtype is torch.float16 else 1e20)

    checkpoint.weights.append(change)


@oddity(Checkpoint, slot="values")
def tiny_values(checkpoint: Checkpoint) -> None:
    def change(model: PreTrainedModel) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(1e-30)

    checkpoint.weights.append(change)


@oddity(Checkpoint, slot="values")
def a_few_large_ones(checkpoint: Checkpoint) -> None:
    def change(model: PreTrainedModel) -> None:
        _matrix(model).data[:, 0] = 1000.0

    checkpoint.weights.append(change)
