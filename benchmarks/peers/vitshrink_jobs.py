"""Our own rows: rounding to nearest, low rank, and the mixture of everything, without and with recovery."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peers.registry import Built, Material, Row, peer
from vitshrink.config.options import CompressConfig, FinetuneConfig
from vitshrink.config.quantize import QuantizeJob
from vitshrink.jobs.compress import compress
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.models.loading import load_dense

OURS: dict[str, Any] = {"forms": "bits"}
"""What lets all forms compete for the bytes."""

RECOVERY_MINUTES = 5


@peer("nearest")
def nearest(_sizes: Sequence[str]) -> Iterator[Row]:
    for weights in ("int8", "int4"):
        name = f"round to nearest: {weights}"
        yield Row(name, f"vitshrink quantize --weights {weights}", partial(_rounded, weights), calibrated=False)


def _rounded(weights: str, material: Material, _seed: int, folder: Path) -> Built:
    output = folder / "out"
    quantize_checkpoint(
        QuantizeJob(material.model, str(output), rounding="nearest", weights=weights, activations="none", offline=True)
    )
    return _read(output)


@peer("low-rank")
def low_rank(sizes: Sequence[str]) -> Iterator[Row]:
    for size in sizes:
        yield _row("low rank", size, "factors in float16", forms="rank", dtype="float16")
    for size in sizes:
        yield _row("low rank + int8", size, "factors in int8", quantize="int8", activations="none")


@peer("ours")
def ours(sizes: Sequence[str]) -> Iterator[Row]:
    for size in sizes:
        yield _row("ours", size, "what the allocation chose", **OURS)


@peer("ours-recovered")
def ours_recovered(sizes: Sequence[str]) -> Iterator[Row]:
    for size in sizes:
        finetune = FinetuneConfig(objective="distill", minutes=RECOVERY_MINUTES)
        stored = f"what the allocation chose, distilled for {RECOVERY_MINUTES} minutes"
        yield _row("ours, recovered", size, stored, finetune=finetune, **OURS)


def _row(family: str, size: str, stored: str, **entries: Any) -> Row:
    return Row(f"{family}: {size}", stored, partial(_compressed, {"target_size": size, **entries}))


def _compressed(entries: dict[str, Any], material: Material, seed: int, folder: Path) -> Built:
    """As ``vitshrink compress --target-size`` publishes it."""
    output = folder / "out"
    config = CompressConfig(
        material.model,
        str(output),
        calibration=material.calibration,
        samples=material.samples,
        seed=seed,
        device="cpu",
        offline=True,
        **entries,
    )
    compress(config)
    return _read(output)


def _read(directory: Path) -> Built:
    loaded = load_dense(str(directory), allow_compressed=True, offline=True)
    return Built(loaded.model, loaded.source.nbytes)
