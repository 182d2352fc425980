"""``vitshrink quantize``: a checkpoint, dense or compressed, with integer weights."""

from dataclasses import asdict
from pathlib import Path

import torch

from vitshrink._version import __version__
from vitshrink.compression.quantization import quantized
from vitshrink.config.options import DataConfig, quantized_bits
from vitshrink.data import Preprocessor
from vitshrink.data.opening import open_data
from vitshrink.evaluation.measurement import measure, require_embedding
from vitshrink.jobs.compress import CompressionResult
from vitshrink.jobs.description import environment, quantization_of
from vitshrink.jobs.evaluate import check_comparable
from vitshrink.models import cost
from vitshrink.models.checkpoint import file_bytes, load, save, verify
from vitshrink.models.example import example_inputs
from vitshrink.models.families import task_of
from vitshrink.models.loading import load_dense
from vitshrink.models.publication import check_space, publish
from vitshrink.report import Report, before_after, write
from vitshrink.runtime.observer import Job, Observer, Silent


def quantize_checkpoint(
    model: str,
    output: str,
    *,
    weights: str = "int8",
    activations: str | None = None,
    data: DataConfig | None = None,
    baseline: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    class_map: Path | None = None,
    seed: int = 0,
    offline: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> CompressionResult:
    """Write ``model`` with integer weights into the directory ``output``, verified, whole or not at all.

    With ``data`` it is measured beside ``baseline``, which is the model itself if none is given.

    Raises:
        UsageError: weights or activations that there are not, or a model that is quantised already.
        CheckpointError, DataError, OutputError: as the parts that read and write.
    """
    bits, treated = quantized_bits(weights, activations)
    job = Job(observer or Silent())
    with job.stage("load", "Loading the model"):
        source = load_dense(model, offline=offline, allow_compressed=True, warn=job.warn)
        dense = load_dense(baseline, offline=offline, allow_compressed=True, warn=job.warn) if baseline else source
        check_comparable(source, dense)
    source.companions.tell(job)
    samples = None
    if data is not None:  # before any work, so that what cannot be read stops it here
        samples = open_data(data, source, offline=offline, job=job, labelled=True).at_most(limit, seed)
        require_embedding(source.embedding, samples)
    check_space(Path(output), 2 * cost.parameters(source.model))
    with publish(Path(output), overwrite=overwrite, protect=source.directory) as staging:
        with job.stage("quantize", "Quantising, saving and verifying"):
            rounded = quantized(source.model, bits, treated, dtype=source.source_dtype)
            save(rounded, staging, source=source)
            inputs = example_inputs(source.model)
            verify(staging, rounded, inputs)
            again = load(staging, dtype=torch.float32)
        measurement, preprocessing = None, None
        if samples is not None:
            preprocessor = Preprocessor.from_checkpoint(
                source.directory, source.family.modality, config=source.model.config, offline=offline
            )
            preprocessing = preprocessor.description
            measurement = measure(
                again,
                samples,
                preprocessor,
                job,
                task=task_of(source.model),
                baseline=dense.model,
                embedding=source.embedding,
                baseline_embedding=dense.embedding,
                device=torch.device("cpu"),
                batch_size=batch_size,
                seed=seed,
                class_map=class_map,
            )
        with job.stage("cost", "Measuring cost"):
            latency = cost.latency({"dense": dense.model, "compressed": again}, inputs, repeats=10, warmup=2)
            macs = before_after(cost.macs(dense.model, inputs), cost.macs(again, inputs))
        parameters = before_after(cost.parameters(dense.model), cost.parameters(again))
        report = Report(
            vitshrink=__version__,
            model=baseline or model,
            task=task_of(source.model),
            method="none",
            allocation="none",
            compensation="none",
            quantization=quantization_of(weights, activations),
            parameters=parameters,
            layers_parameters={},
            layers=[],
            bytes=before_after(file_bytes(dense.directory), file_bytes(staging)),
            macs=macs,
            latency={role: asdict(timing) for role, timing in latency.items()},
            evaluation=None if measurement is None else measurement.to_dict(preprocessing),
            timings=dict(job.timings),
            environment=environment(torch.device("cpu")),
            warnings=list(job.warnings),
            left_out=source.companions.left,
        )
        write(report, staging)
    return CompressionResult(Path(output), report)
