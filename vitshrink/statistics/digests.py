"""Digests of what statistics follow from: a model, and the data it reads."""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.models.readings import embedding_read
from vitshrink.statistics.calibration import CalibrationBatch


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the weights in memory, the configuration and what is made of the outputs; not of where they came
    from."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    embedding = embedding_read(model)
    read = "" if embedding is None else embedding.digest
    return _digest(model.state_dict(), json.dumps(config, sort_keys=True, default=str) + read)


def data_digest(batches: Iterable[CalibrationBatch]) -> str:
    """SHA-256 of what enters the model: samples, their order, preprocessing and batch size all show in it."""
    parts = [_digest(_tensors(batch)) for batch in batches]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _tensors(batch: CalibrationBatch) -> dict[str, Tensor]:
    others = {"mask": batch.mask, "places": getattr(batch, "places", None)}
    return {**batch.inputs, **{name: tensor for name, tensor in others.items() if tensor is not None}}


def _digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        digest.update(f"\x00{name} {tensor.dtype} {list(tensor.shape)}\x00".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
