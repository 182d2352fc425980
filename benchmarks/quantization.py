"""Integers on top of low rank: bytes, accuracy, divergence and latency of one model in every combination.

python benchmarks/quantization.py --model MODEL --calibration UNLABELED --eval LABELED --keep 0.8 0.7
python benchmarks/quantization.py --model MODEL --compressed SMALLER_MODEL --eval LABELED
"""

import argparse
import copy
from pathlib import Path

import torch
from tables import print_circumstances, print_head, print_row
from torch import nn
from transformers import PreTrainedModel

import vitshrink
from vitshrink.compression.quantization import quantized
from vitshrink.config.options import DataConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import open_data
from vitshrink.evaluation.measurement import measure_each
from vitshrink.evaluation.quality import Fidelity
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import load_dense
from vitshrink.models.structures.quantized import Activations
from vitshrink.models.tasks import task_of
from vitshrink.runtime.observer import Job, Silent


def torchao_peer(model: PreTrainedModel, activations: Activations = "dynamic") -> PreTrainedModel | None:
    """The linear layers by torchao, in int8 a channel; ``dynamic``: and activations a token. None if it is missing."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None
    peer = copy.deepcopy(model)
    quantize_(
        peer.base_model, Int8DynamicActivationInt8WeightConfig() if activations == "dynamic" else Int8WeightOnlyConfig()
    )
    return peer


def variants(dense: PreTrainedModel, small: dict[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """Every combination of integers with the dense model and the smaller ones, by its name."""
    models = {"fp32": dense, "fp16": copy.deepcopy(dense).half()}
    if (peer := torchao_peer(dense)) is not None:
        models["int8 dynamic, torchao"] = peer
    for name, model in {"": dense, **small}.items():
        if name:
            models[name] = model
            models[f"{name}, fp16"] = copy.deepcopy(model).half()
        prefix = f"{name}, " if name else ""
        models[f"{prefix}int8 weights"] = quantized(model, 8, "none")
        models[f"{prefix}int8 dynamic"] = quantized(model, 8, "dynamic")
        models[f"{prefix}int4 weights"] = quantized(model, 4, "none")
    return models


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model", required=True)
    known.add_argument("--calibration", help="for --keep")
    known.add_argument("--compressed", nargs="*", default=[], help="checkpoints that were made of the model before")
    known.add_argument("--eval", required=True)
    known.add_argument("--limit", type=int)
    known.add_argument("--samples", type=int, default=256)
    known.add_argument("--keep", type=float, nargs="*", default=[])
    known.add_argument("--repeats", type=int, default=15)
    known.add_argument("--length", type=int, default=32, help="tokens of the texts that are timed")
    given = known.parse_args(arguments)

    source = load_dense(given.model)
    dense = source.model
    preprocessor = Preprocessor.from_checkpoint(source.directory, source.family.modality)
    data = open_data(DataConfig(given.eval), source, offline=True)
    if given.limit is not None and given.limit < len(data):
        data = data.select(given.limit, 0)
    small = {}
    for keep in given.keep:
        small[f"keep {keep:g}"] = vitshrink.compress(dense, given.calibration, keep=keep, samples=given.samples).model
    for path in given.compressed:
        small[Path(path).name] = load_dense(path, allow_compressed=True).model
    models = variants(dense, small)
    # a weight of half precision is judged by its value; the sums are those of float32
    judged: list[nn.Module] = [copy.deepcopy(m).float() if m.dtype == torch.float16 else m for m in models.values()]
    found = measure_each(
        judged,
        data,
        preprocessor,
        Job(Silent()),
        task=task_of(dense),
        baseline=dense,
        device=torch.device("cpu"),
        batch_size=32,
    )
    timed = {}
    for batch in (1, 8):
        inputs = example_inputs(dense, batch)
        if source.family.modality == "text":
            inputs = {name: tensor[:, : given.length] for name, tensor in inputs.items()}
        timed[batch] = cost.latency(models, inputs, repeats=given.repeats)
    print_circumstances(
        "Quantization",
        model=Path(given.model).name + (f", calibrated on {given.samples} samples" if given.keep else ""),
        data=f"{len(data)} samples of {Path(given.eval).name}",
        latency=f"milliseconds at batch 1 and 8, median of {given.repeats}",
    )
    print_head(["", "MB", "of fp32", "score", "KL", "agreement", "ms, 1", "ms, 8"])
    whole = cost.memory_bytes(dense)
    for (name, model), each in zip(models.items(), found, strict=True):
        evaluation, nbytes = each.evaluation, cost.memory_bytes(model)
        fidelity = evaluation.fidelity or Fidelity()
        score, kl, agreement = (
            float("nan") if figure is None else figure for figure in (evaluation.score, fidelity.kl, fidelity.agreement)
        )
        print_row(
            [
                name,
                f"{nbytes / 1e6:.2f}" if "torchao" not in name else "",
                f"{nbytes / whole:.3f}" if "torchao" not in name else "",
                f"{score:.4f}",
                f"{kl:.4f}",
                f"{agreement:.4f}",
                *(f"{1000 * timed[batch][name].median:.1f}" for batch in (1, 8)),
            ]
        )


if __name__ == "__main__":
    main()
