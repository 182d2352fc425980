"""``vitshrink.compress``: the job of the command line on a model in memory."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vitshrink.compression.choices import Choices
from vitshrink.compression.quantization import Quantization
from vitshrink.compression.search import Bound
from vitshrink.compression.shrinking import Shrinking
from vitshrink.config.fields import names_of
from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.data import (
    Preprocessor,
    ReadyBatches,
    SampleSet,
    listed,
    recipe_defaults,
    samples_in_memory,
)
from vitshrink.data.columns import Columns
from vitshrink.data.layouts import LAYOUTS
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import CheckpointError, DataError, UsageError
from vitshrink.jobs.description import Description
from vitshrink.jobs.inputs import calibration_of, held_out_of
from vitshrink.jobs.session import Session, Settings
from vitshrink.models import cost
from vitshrink.models.checkpoint import cast, save, verify
from vitshrink.models.companions import Companions
from vitshrink.models.duals import read_together
from vitshrink.models.example import example_inputs
from vitshrink.models.families import family_of
from vitshrink.models.hf_quantizer import list_structures
from vitshrink.models.loading import check_config, check_finite, held, moved, usual_outputs
from vitshrink.models.publication import publish
from vitshrink.models.readings import plainly_read
from vitshrink.models.sentences import NO_SETTINGS, TextSettings
from vitshrink.models.source import resolve
from vitshrink.models.tasks import task_of
from vitshrink.report import Report, headline, write
from vitshrink.runtime.observer import Job, Observer, Silent
from vitshrink.statistics.recomputing import batch_that_fits


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model with its report."""

    model: PreTrainedModel
    """The model, in evaluation mode, with the type and device of the original. ``save_pretrained`` works as usual."""
    report: Report
    """Sizes, operations, time, and the fidelity on held-out samples if there are any."""
    processor: Any = None
    """The image processor or tokenizer, if one was given or found."""
    modules: Companions | None = None
    """For a sentence encoder: the other modules of sentence-transformers, if the original files were found."""

    def __str__(self) -> str:
        return headline(self.report)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write checkpoint, processor, report and model card to a directory.

        The directory appears only after the checkpoint was loaded again and compared.

        Raises:
            OutputError: the directory exists, cannot be written, or differs from the model in memory.
        """
        with publish(Path(directory), overwrite=overwrite) as staging:
            save(self.model, staging)
            if self.processor is not None:
                self.processor.save_pretrained(staging)
            if self.modules is not None:
                self.modules.copy_to(staging)
            verify(staging, self.model, example_inputs(self.model))
            write(self.report, staging)
        return Path(directory)


@torch.inference_mode(False)  # gradients are taken, wherever this is called from
def compress(
    model: PreTrainedModel,
    calibration: Any = None,
    *,
    keep: float | None = None,
    processor: Any = None,
    observer: Observer | None = None,
    **choices: Any,
) -> Compressed:
    """Compress a model in memory and return a smaller copy. The model itself does not change.

    Args:
        model: a supported transformers encoder, on any device and with any floating-point type.
        calibration: unlabeled samples. A list, series or array of PIL images, byte arrays, texts or pairs of texts; a
            ``datasets.Dataset`` or data frame with a column of them; a ``DataLoader`` or any iterable of batches with
            the model's inputs; or a value of ``--calibration``: a folder, a file, a URL, a recipe or a Hub data set.
        keep: fraction of the model's parameters to keep. Instead of it, you can pass another size or bound of
            ``vitshrink compress``, such as ``target_size``, ``bits``, ``rank``, ``max_kl`` or ``max_changed``.
        processor: image processor or tokenizer of the model. If it is not given, vitshrink loads it from where the
            model came from. Batches need none.
        observer: receives progress and warnings. By default, nothing is shown.
        choices: flags of ``vitshrink compress``, such as ``method="whitened"``, ``samples=256`` or ``seed=1``.

    Returns:
        The compressed model with its report.

    Raises:
        UsageError: options that are wrong or contradict each other.
        TargetError: a size that cannot be reached.
        CheckpointError: a model that is not supported, or not finite.
        DataError: calibration samples that cannot be used.
        NumericsError: NaN or infinity, or no layer that can be factorized.
        GateError: no size keeps the bound.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"model: expected a transformers model, not a {type(model).__name__}.")
    if getattr(model, "is_quantized", False):
        raise UsageError("model: it is already quantized: start from the floating-point model.")
    config = _config(model, calibration, {"keep": keep} | choices)
    chosen, job = Choices.of(config), Job(observer or Silent())
    family_of(model)
    check_config(model.config.to_dict(), "the model's config")
    dense = copy.deepcopy(model).float().eval()
    check_finite(dense, "the model")
    for note in usual_outputs(dense):
        job.warn(note)
    origin = _origin(dense, config, job)
    session = Session(Settings.of(config), job, model.device, held(dense, model.dtype, origin))
    dtype = session.dtype(config.stored_dtype)
    shrinking = Shrinking.of(chosen, dense, dtype)
    preprocessor, data, held_out = _data(session, origin, calibration, processor, config, calibrated=chosen.calibrated)
    (shrunk,) = shrinking.run(data, held_out, preprocessor, job)
    assert shrunk.model is not None
    quantization = Quantization.of(config, dtype)
    final = shrunk.model if quantization is None else quantization.applied(shrunk.model)
    small = moved(cast(final, dtype, in_place=True), model.device).eval()
    nbytes = (cost.memory_bytes(model), cost.memory_bytes(small))
    exact = torch.promote_types(dtype, torch.float32) is torch.float32  # as float32, and back again
    judged = moved(small if exact else copy.deepcopy(small), dtype=torch.float32)
    measurement = None
    if held_out is not None and preprocessor is not None:
        labeled = config.max_accuracy_drop is not None
        (measurement,) = session.measure_each(
            [judged], held_out, preprocessor, against=session.source, job=shrunk.job, labeled=labeled
        )
    description = Description.of(shrinking, data, preprocessor)
    layers = description.layers(shrunk.findings, shrunk.plan)
    report = description.written(layers, shrunk.plan, shrunk.job, judged, nbytes, measurement, paced=shrunk.paced)
    plainly_read(small)
    read_together(small)
    runs_in: torch.dtype = getattr(torch, config.dtype) if config.dtype else model.dtype
    list_structures(small, stored=None if runs_in is dtype else dtype)
    return Compressed(
        moved(small, dtype=runs_in),
        replace(report, command=None),
        processor or getattr(preprocessor, "processor", None),
        None if origin is None else session.source.companions.of_modules,
    )


def _config(model: PreTrainedModel, calibration: Any, entries: dict[str, Any]) -> CompressConfig:
    for name in names_of(CompressConfig, lambda option: not option.in_memory):
        if name in entries:
            raise UsageError(f"compress() has no argument {name!r}, because it takes a model and returns one.")
    if isinstance(entries["keep"], Sequence):
        raise UsageError(
            "keep: give one fraction. For several sizes, call compress() once for each, with the same cache=DIRECTORY."
        )
    entries = {name: value for name, value in entries.items() if value is not None}
    named = model.config._name_or_path or type(model).__name__
    source = None if calibration is None else str(calibration) if _is_address(calibration) else "samples in memory"
    defaults = recipe_defaults(calibration) if _is_address(calibration) else {}
    return CompressConfig.from_mapping(
        {"model": named, "output": "memory", "calibration": source, **defaults, **entries}, "compress()"
    )


def _origin(model: PreTrainedModel, config: CompressConfig, job: Job) -> Path | None:
    """The directory of a sentence encoder, whose files say how it makes its embeddings; None for other models."""
    if task_of(model) != "features" or family_of(model).modality != "text" or not model.config._name_or_path:
        return None
    try:
        return resolve(model.config._name_or_path, offline=config.offline)
    except CheckpointError as error:
        job.warn(f"the mean of the tokens is used as the sentence embedding: {error}")
        return None


def _is_address(calibration: Any) -> bool:
    return isinstance(calibration, str | Path)


def _data(
    session: Session, origin: Path | None, calibration: Any, processor: Any, config: CompressConfig, *, calibrated: bool
) -> tuple[Preprocessor | None, CalibrationData | None, SampleSet | None]:
    """How samples are read, those to calibrate on, and those that are held out of them."""
    if calibration is None:
        return None, None, None
    job = session.job
    preprocessor, samples = _samples(session, origin, calibration, processor, config)
    data = calibration_of(config, samples, preprocessor, session) if calibrated else None
    needed = Bound.of(config) is not None
    if not needed and session.source.task == "masked-lm" and preprocessor.processor is None:
        job.warn("the fidelity was not measured: pass the tokenizer as processor=, because it defines the mask token.")
        return preprocessor, data, None
    return preprocessor, data, held_out_of(config, samples, job, calibrated=calibrated)


def _samples(
    session: Session, origin: Path | None, calibration: Any, processor: Any, config: CompressConfig
) -> tuple[Preprocessor, SampleSet]:
    model, kind = session.source.model, session.source.family.modality
    if isinstance(calibration, SampleSet):
        return _preprocessor(session, origin, processor, config), calibration
    if _is_address(calibration):
        samples = session.samples(config.calibration_data or DataConfig(str(calibration)))
        return _preprocessor(session, origin, processor, config), samples
    if kind == "image-text":
        raise UsageError(
            "calibration: for a dual encoder, pass a value of --calibration: a table of images and captions, or "
            "a folder of images with calibration_texts=FILE."
        )
    most = config.samples + config.holdout
    task = session.source.task
    columns = Columns(
        config.image_column,
        config.text_column,
        config.text_pair_column,
        flags="",
        layout=task if task in LAYOUTS else None,
    )
    calibration = listed(calibration, kind, most)
    if (found := samples_in_memory(calibration, kind, most, columns)) is not None:
        found = replace(found, apart=session.source.embedding.known)
        return _preprocessor(session, origin, processor, config), found
    if isinstance(calibration, Mapping | torch.Tensor):
        calibration = [calibration]  # one batch
    elif hasattr(calibration, "column_names"):  # a data set of rows that were prepared
        calibration = calibration.with_format("torch").iter(config.batch_size or batch_that_fits(session.source.model))
    if not isinstance(calibration, Iterable):
        raise DataError(
            f"calibration: a {type(calibration).__name__} holds no samples: give a list of "
            f"{'PIL images' if kind == 'image' else 'texts'}, batches, or the path of a folder."
        )
    batches = ReadyBatches(calibration, kind, most, processor, model.config)
    return Preprocessor(batches), batches.samples()


def _preprocessor(session: Session, origin: Path | None, processor: Any, config: CompressConfig) -> Preprocessor:
    model, kind = session.source.model, session.source.family.modality
    if processor is not None:
        settings = NO_SETTINGS if origin is None else TextSettings.read(origin)
        return Preprocessor.of(
            processor,
            kind,
            model.config,
            task=session.source.task,
            max_length=config.max_length,
            settings=settings,
        )
    if not model.config._name_or_path:
        what = "image processor" if kind == "image" else "tokenizer"
        raise UsageError(f"processor: the model does not say where it came from: pass its {what} as processor=.")
    return session.preprocessor()
