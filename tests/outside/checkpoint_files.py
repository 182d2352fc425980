"""What else lies in the directory of a checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .oddity import oddity


def _adding(checkpoint: Checkpoint, *names: str, content: bytes = b"not read by anybody") -> None:
    def add(directory: Path) -> None:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)

    checkpoint.files.append(add)


def _json(directory: Path, name: str, content: Any) -> None:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(content))


@oddity(Checkpoint, outcome="works")
def files_of_a_trainer(checkpoint: Checkpoint) -> None:
    _adding(checkpoint, "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@oddity(Checkpoint, outcome="works")
def files_of_a_repository(checkpoint: Checkpoint) -> None:
    _adding(checkpoint, "README.md", ".gitattributes", ".gitignore", "LICENSE", "runs/events.out", ".git/HEAD")


@oddity(Checkpoint, outcome="works")
def files_for_other_programs(checkpoint: Checkpoint) -> None:
    _adding(checkpoint, "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack", "coreml/a/b", "model.ckpt.index")


@oddity(Checkpoint, outcome="works")
def files_of_odd_names(checkpoint: Checkpoint) -> None:
    def add(directory: Path) -> None:
        for name in (b"caf\xe9.txt", b"a\nb", b"[red]x", b" ", b"-rf"):
            Path(os.fsdecode(os.fsencode(directory) + b"/" + name)).write_bytes(b"")

    checkpoint.files.append(add)


@oddity(Checkpoint, outcome="works")
def links_and_cycles(checkpoint: Checkpoint) -> None:
    def add(directory: Path) -> None:
        (directory / "up").symlink_to(directory)
        (directory / "nowhere").symlink_to("/does/not/exist")
        (directory / "out").symlink_to("/usr")

    checkpoint.files.append(add)


@oddity(Checkpoint)
def linked_weights(checkpoint: Checkpoint) -> None:
    def change(directory: Path) -> None:
        (directory / "blobs").mkdir()
        for file in [*directory.glob("*.safetensors"), *directory.glob("*.bin")]:
            file.rename(directory / "blobs" / file.name)
            file.symlink_to(Path("blobs") / file.name)

    checkpoint.files.append(change)


@oddity(Checkpoint, outcome="works")
def pipe_in_the_directory(checkpoint: Checkpoint) -> None:
    checkpoint.files.append(lambda directory: os.mkfifo(directory / "tokenizer_pipe"))


@oddity(Checkpoint, outcome="refused")
def pipe_in_place_of_the_config(checkpoint: Checkpoint) -> None:
    def change(directory: Path) -> None:
        (directory / "config.json").unlink()
        os.mkfifo(directory / "config.json")

    checkpoint.files.append(change)


@oddity(Checkpoint)
def generation_config(checkpoint: Checkpoint) -> None:
    checkpoint.files.append(lambda directory: _json(directory, "generation_config.json", {"max_length": 20}))


@oddity(Checkpoint, outcome="refused")
def adapter(checkpoint: Checkpoint) -> None:
    checkpoint.files.append(lambda directory: _json(directory, "adapter_config.json", {"peft_type": "LORA"}))


@oddity(Checkpoint, only=("BertModel",))
def sentence_transformers(checkpoint: Checkpoint) -> None:
    checkpoint.files.append(lambda directory: _sentence_modules(directory, "cls", dense=False))


@oddity(Checkpoint, only=("BertModel",))
def sentence_transformers_with_a_dense_layer(checkpoint: Checkpoint) -> None:
    checkpoint.files.append(lambda directory: _sentence_modules(directory, "mean", dense=True))


def _sentence_modules(directory: Path, pooling: str, *, dense: bool) -> None:
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "",
         "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]  # fmt: skip
    _json(directory, "modules.json", modules)
    poolings = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    _json(directory, "1_Pooling/config.json", {"word_embedding_dimension": 32} | poolings)
    _json(directory, "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    if dense:
        activation = "torch.nn.modules.activation.Tanh"
        entries = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": activation}
        _json(directory, "2_Dense/config.json", entries)
        torch.save({"linear.weight": torch.ones(8, 32), "linear.bias": torch.ones(8)}, directory / "2_Dense" / "pytorch_model.bin")  # fmt: skip  # noqa: E501
    (directory / f"{len(kinds) - 1}_Normalize").mkdir()
