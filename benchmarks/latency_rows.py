"""The variants of the table of time against quality: dense, int8 by the runtimes' own tools, and ours."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import bytes as byte_table
import torch
from peers import nncf_openvino, onnx_runtime
from peers.registry import Material
from speed import with_narrower_layers, with_random_factors
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.compression.merging import Trials, kept_within, measured_curves
from vitshrink.compression.repairs.merging import shift_merged
from vitshrink.compression.static_layers import as_fast_as_integers
from vitshrink.config.options import CompressConfig, FinetuneConfig, FinetuneJob
from vitshrink.config.quantize import QuantizeJob
from vitshrink.jobs.compress import compress
from vitshrink.jobs.export import export
from vitshrink.jobs.finetune import finetune_checkpoint
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.models.families import passes_of
from vitshrink.models.merged import merge_tokens
from vitshrink.models.openvino_model import IR_FILE, convert
from vitshrink.models.runtimes import Program, find_runtime
from vitshrink.models.views import own, view_of
from vitshrink.runtime.observer import Job, Silent
from vitshrink.statistics.reference import DenseOutputs

BASELINE = "PyTorch: float32"
ONNX_FILE = "model.onnx"


@dataclass
class Bench:
    """A model, its calibration, and the samples that judge; of a random model there are none."""

    material: Material
    table: byte_table.Bench | None
    fractions: Sequence[float]
    random: bool
    latencies: Sequence[float] = ()
    batch: int = 8
    """Samples in a batch for which a latency is asked for."""
    recover: FinetuneConfig | None = None
    """Distillation that merged tokens get beside."""

    @property
    def dense(self) -> PreTrainedModel:
        return self.material.source.model


@dataclass(frozen=True)
class Row:
    """One variant: what makes its file, or what runs it where it has none, and its precision."""

    name: str
    build: Callable[[Bench, Path], Path] | None = None
    run: Callable[[PreTrainedModel], nn.Module] | None = None


def rows_of(bench: Bench) -> Iterator[Row]:
    """Dense models first, then int8 by the runtimes' own tools, then ours."""
    yield Row(BASELINE, run=lambda model: model)
    yield Row("torch.compile: float32", run=lambda model: find_runtime("torch-compile").compile(Program.of(model)))
    yield Row("onnxruntime: float32", partial(_exported, lambda bench: bench.dense, False))
    yield Row("OpenVINO: float32", partial(_exported, lambda bench: bench.dense, True))
    yield Row("onnxruntime: int8, dynamic", partial(_dynamic, lambda bench: bench.dense))
    yield Row("onnxruntime: int8, static", _static)
    yield Row("OpenVINO: int8, NNCF", partial(_nncf, lambda bench: bench.dense))
    for made, fraction, make in _ours(bench):
        yield Row(f"{made} in onnxruntime: {fraction:g}", partial(_exported, make, False))
        yield Row(f"{made} in OpenVINO: {fraction:g}", partial(_exported, make, True))
        yield Row(f"{made}, NNCF int8, in OpenVINO: {fraction:g}", partial(_nncf, make))
    for made, fraction, make in (("ours", 1.0, lambda given: given.dense), *_ours(bench)) if bench.random else ():
        rounded = partial(_integers, make)
        yield Row(f"{made}, static int8, in onnxruntime: {fraction:g}", partial(_exported, rounded, False))
        yield Row(f"{made}, static int8, in OpenVINO: {fraction:g}", partial(_exported, rounded, True))
    image = bench.dense.main_input_name == "pixel_values"
    for fraction in () if bench.random else (1.0, *(bench.fractions if image else ())):
        for runtime, form in (("onnxruntime", "onnx"), ("OpenVINO", "openvino")):
            yield Row(f"ours, static int8, in {runtime}: {fraction:g}", partial(_rounded, fraction, form, None))
            if bench.recover and fraction < 1:
                made = partial(_rounded, fraction, form, bench.recover)
                yield Row(f"ours, {bench.recover.epochs:g} epochs, static int8, in {runtime}: {fraction:g}", made)
    for share in () if bench.random else bench.latencies:
        for runtime, form in (("onnxruntime", "onnx"), ("OpenVINO", "openvino")):
            yield Row(f"ours, --target-latency {share:g}, in {runtime}", partial(_in_time, share, form, image))


def _ours(bench: Bench) -> Iterator[tuple[str, float, Callable[[Bench], PreTrainedModel]]]:
    """Merged tokens, for fractions of the operations; of random weights half, as two factors or in narrower layers."""
    if bench.dense.main_input_name == "pixel_values":
        curves: list[Sequence[Tensor]] = []
        for fraction in bench.fractions:
            yield "ours, merged tokens", fraction, partial(_merged, curves, fraction)
    if bench.random:
        yield "ours, factors", 0.5, lambda given: with_random_factors(given.dense, 0.5, "factors")
        yield "ours, narrower layers", 0.5, lambda given: with_narrower_layers(given.dense, 0.5)


def _merged(curves: list[Sequence[Tensor]], fraction: float, bench: Bench) -> PreTrainedModel:
    """As ``vitshrink compress --tokens merge --token-operations`` makes it; ``curves`` are measured once."""
    (seed, calibration), *_ = bench.material.calibrations.items()
    if not curves:
        curves.append(measured_curves(Trials.on(bench.dense, calibration.batches), Job(Silent())))
    model = own(view_of(bench.dense))
    merge_tokens(model, kept_within(bench.dense, curves[0], fraction))
    reference = DenseOutputs(bench.dense, passes_of(bench.dense, "auto"))
    shift_merged(model, reference, calibration.batches, Job(Silent()), seed=seed)
    return model


def _integers(make: Callable[[Bench], PreTrainedModel], bench: Bench) -> PreTrainedModel:
    """On grids that nobody chose: for time alone."""
    return as_fast_as_integers(make(bench))


def _exported(make: Callable[[Bench], PreTrainedModel], ir: bool, bench: Bench, folder: Path) -> Path:
    file = Program.of(make(bench)).write(folder / ONNX_FILE)
    return convert(file, folder) if ir else file


def _dynamic(make: Callable[[Bench], PreTrainedModel], bench: Bench, folder: Path) -> Path:
    onnx_runtime.write_dynamic(Program.of(make(bench)).write(folder / "float.onnx"), folder / ONNX_FILE)
    return folder / ONNX_FILE


def _static(bench: Bench, folder: Path) -> Path:
    exported = Program.of(bench.dense).write(folder / "float.onnx")
    onnx_runtime.write_static(exported, folder / ONNX_FILE, nncf_openvino.singles(bench.material, _seed(bench)))
    return folder / ONNX_FILE


def _nncf(make: Callable[[Bench], PreTrainedModel], bench: Bench, folder: Path) -> Path:
    """NNCF's post-training int8 of the IR that vitshrink exports."""
    import openvino

    material = replace(bench.material, source=replace(bench.material.source, model=make(bench)))
    file = _exported(make, True, bench, folder)
    quantized = nncf_openvino.post_training(openvino.Core().read_model(file), material, _seed(bench))
    (folder / "int8").mkdir(exist_ok=True)
    openvino.save_model(quantized, folder / "int8" / IR_FILE)
    return folder / "int8" / IR_FILE


def _rounded(fraction: float, form: str, training: FinetuneConfig | None, bench: Bench, folder: Path) -> Path:
    """As the command line makes it: tokens merged where there is a fraction, trained where that is asked for, and
    ``quantize --activations static``."""
    given, name = bench.material, f"{fraction:g}{'' if training is None else '-recovered'}"
    data: dict[str, Any] = {"calibration": given.calibration, "samples": given.samples, "holdout": 8, "offline": True}
    source, merged, small = given.model, folder.parent / f"merged-{fraction:g}", folder.parent / f"int8-{name}"
    if fraction < 1:
        if not merged.exists():
            compress(CompressConfig(source, str(merged), tokens="merge", token_operations=fraction, **data))
        source = str(merged)
    if training is not None:
        recovered = folder.parent / f"merged-{name}"
        if not recovered.exists():
            job = FinetuneJob(source, str(recovered), teacher=given.model, finetune=training, offline=True)
            finetune_checkpoint(job)
        source = str(recovered)
    if not small.exists():
        quantize_checkpoint(QuantizeJob(source, str(small), activations="static", **data))
    found = export(str(small), str(folder / form), form, offline=True, overwrite=True)
    return folder / form / found.file


def _in_time(share: float, form: str, image: bool, bench: Bench, folder: Path) -> Path:
    """As the command line makes it for a batch: integers, and merged tokens of images or narrower layers of texts."""
    given, small = bench.material, folder / "model"
    data: dict[str, Any] = {"calibration": given.calibration, "samples": given.samples, "holdout": 8, "offline": True}
    levers: dict[str, Any] = {"tokens": "merge"} if image else {"forms": "narrow"}
    runtime = "openvino" if form == "openvino" else "onnxruntime"
    clock = {"runtime": runtime, "threads": torch.get_num_threads(), "latency_batch_size": bench.batch}
    if not small.exists():
        compress(CompressConfig(given.model, str(small), target_latency=f"{share:g}", **clock, **levers, **data))
    found = export(str(small), str(folder / form), form, offline=True, overwrite=True)
    return folder / form / found.file


def _seed(bench: Bench) -> int:
    return next(iter(bench.material.calibrations))
