"""The smallest model that keeps within a bound on samples that it was not calibrated on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from vitshrink.compression.candidates import Plan
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.compression.quantization import Quantization
from vitshrink.compression.sizes import as_integers
from vitshrink.config.options import CompressConfig
from vitshrink.data import BadSamples, Batch, Preprocessor, SampleSet
from vitshrink.data.opening import warn_of_bad
from vitshrink.errors import DataError, GateError, UsageError
from vitshrink.evaluation import Masking, evaluate
from vitshrink.evaluation.gates import percent_changed, points_lost
from vitshrink.evaluation.measurement import has_unanswerable, labels_of
from vitshrink.evaluation.rows import LabelOf
from vitshrink.models.tasks import head_of, task_of
from vitshrink.models.views import rounded
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job, Silent
from vitshrink.statistics.calibration import to_device
from vitshrink.statistics.recomputing import batch_that_fits
from vitshrink.statistics.reference import DenseOutputs

RESOLUTION = 0.01
"""Sizes closer than this fraction of the dense model's are not told apart."""

REPAIRED = 0.95
"""Where a model as it is stored loses less than this fraction of what its truncation does, smaller ones are tried."""

Make = Callable[[Findings, Plan], PreTrainedModel]


@dataclass(frozen=True)
class Bound:
    """What a compressed model may lose, on the held-out samples."""

    flag: str
    limit: float
    unit: str
    figure: str
    """What is judged: the divergence of the head, the agreement of predictions, or the drop of the accuracy."""

    @classmethod
    def of(cls, config: CompressConfig) -> "Bound | None":
        """The bound that a job asks for in place of a size, if it does."""
        if config.max_kl is not None:
            return cls("--max-kl", config.max_kl, "nats", "kl")
        if config.max_error is not None:
            return cls("--max-error", config.max_error, "of the spread", "relative_error")
        if config.max_changed is not None:
            return cls("--max-changed", config.max_changed, "percent of the predictions", "agreement")
        if config.max_accuracy_drop is not None:
            return cls("--max-accuracy-drop", config.max_accuracy_drop, "points of accuracy", "drop")
        return None

    @property
    def counts(self) -> bool:
        """Whether it is a number of samples."""
        return self.figure in ("agreement", "drop")

    def label_of(self, model: PreTrainedModel, samples: SampleSet, class_map: str | None) -> LabelOf | None:
        """From the labels of samples to classes, where those are judged by. Raises DataError where there are none."""
        task = task_of(model)
        if self.figure != "drop" or task == "masked-lm":  # whose labels are the tokens
            return None
        found, _ = labels_of(model, samples, task, Path(class_map) if class_map else None)
        if found is None:
            raise DataError(
                f"{self.flag} needs labels, and {samples.source} has none: pass --calibration with class folders "
                "or with a --label-column, or use --max-changed, which needs no labels."
            )
        return found

    def require(self, model: PreTrainedModel) -> None:
        """Raises UsageError for a model whose outputs this bound does not judge; before any work."""
        measure = head_of(model).measure
        if self.figure == measure or (self.counts and measure == "kl"):
            return
        why, other = _UNFIT[measure]
        raise UsageError(f"{self.flag} cannot be used with this model, whose outputs are {why}: use {other}.")


_UNFIT = {
    "kl": ("probabilities", "--max-kl 0.05 or --max-changed 5"),
    "relative_error": ("scores or features, not classes", "--max-error 0.01, or a size, such as --keep 0.7"),
}
"""What a model gives that a bound does not judge, and what does, by the measure of its head."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A size that was tried, and what it lost."""

    size: int
    """Parameters, or bytes of the file: what ``Compressor.size`` gives."""
    findings: Findings
    plan: Plan
    loss: float
    model: PreTrainedModel | None = None


@dataclass(eq=False)
class Search:
    """Bisection over the size, each step one set of ranks cut from the same factors and run on the held-out samples.

    Raises:
        DataError: no held-out sample, or more unusable ones than allowed.
    """

    compressor: Compressor
    bound: Bound
    batches: Sequence[Batch]
    masking: Masking | None = None
    dtype: torch.dtype = torch.float32
    """Type of the weights in the file; models are judged with weights rounded to it."""
    quantization: Quantization | None = None
    """How they are rounded further."""
    label_of: LabelOf | None = None
    unanswerable: bool = False
    tried: list[Trial] = field(default_factory=list)
    baseline: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        dense = self.compressor.dense
        # a masked LM is asked for its logits at a few tokens, by a hook that has to reach the model itself, and hidden
        # states are too many to keep
        self.baseline = dense if task_of(dense) in ("masked-lm", "features", "image-text") else DenseOutputs(dense)

    @classmethod
    def on(
        cls,
        samples: SampleSet | None,
        preprocessor: Preprocessor | None,
        compressor: Compressor,
        bound: Bound,
        dtype: torch.dtype,
        job: Job,
        quantization: Quantization | None = None,
    ) -> "Search":
        """A search that judges on ``samples``, which the model was not calibrated on."""
        config = compressor.config
        if samples is None or preprocessor is None:
            raise DataError(
                f"{bound.flag} needs samples that were not used for calibration, and none is left: pass fewer "
                f"--samples, or more data to --calibration ({config.calibration})."
            )
        if bound.counts and bound.limit < 100 / len(samples):
            job.warn(
                f"{bound.flag} {bound.limit:g}: one of the {len(samples)} held-out samples is already "
                f"{100 / len(samples):.2g} percent. Use more held-out samples with --holdout."
            )
        if config.eval is None:
            job.warn(
                "the same held-out samples chose the size and gave the figures below, so these figures are too "
                "good: pass --eval for independent ones."
            )
        label_of = bound.label_of(compressor.dense, samples, config.class_map)
        bad = BadSamples.of(samples, config.max_bad_samples)
        mine = replace(samples, samples=processes.share(samples.samples))  # what each loses is put together
        with job.stage("preprocess", "Reading held-out samples"):
            device = next(compressor.dense.parameters()).device
            size = config.batch_size or batch_that_fits(compressor.dense)
            batches = [
                replace(batch, inputs=to_device(batch.inputs, device))
                for batch in (preprocessor.batches(mine, size, bad=bad) if len(mine) else [])
            ]
        warn_of_bad(bad, samples.source, job)
        lm = task_of(compressor.dense) == "masked-lm"
        masking = Masking.from_tokenizer(preprocessor.processor, config.seed) if lm else None
        unanswerable = has_unanswerable(samples)
        return cls(compressor, bound, batches, masking, dtype, quantization, label_of, unanswerable)

    def smallest(self, findings: Findings, refine: int, job: Job) -> Trial:
        """The smallest model within the bound, from ``findings`` or those that ``refine`` re-estimations make of them.

        Raises:
            GateError: every size loses more; the message says what the best one does.
        """
        least = self.compressor.least_budget(findings)
        found = self._bisect(findings, least, self.compressor.whole - 1, job)
        for number in range(refine if found is not None else 0):
            assert found is not None
            again = self.compressor.refine(found.findings, found.plan, job, f"search-{number + 1}")
            if again.light:
                break
            found = self._bisect(again, least, found.size, job) or found
        kept = sorted((each for each in self.tried if each.loss <= self.bound.limit), key=lambda each: each.size)
        missed: list[Trial] = []
        for candidate in kept:
            with self._stage(job):
                stored = self._judge(candidate.findings, candidate.plan, self._stored)
                if stored.loss <= self.bound.limit:
                    return self._smaller(stored, least) if stored.loss < REPAIRED * candidate.loss else stored
            missed.append(stored)
            job.warn(f"after storing, {self._asked(stored)} loses {stored.loss:.3g}: a larger size is used.")
        raise GateError(self._missed(missed))

    def _stage(self, job: Job) -> AbstractContextManager[object]:
        return job.stage("search", f"Searching the size for {self.bound.flag} {self.bound.limit:g}")

    def _bisect(self, findings: Findings, low: int, high: int, job: Job) -> Trial | None:
        """The smallest candidate from ``low`` to ``high`` within the bound; None when the largest is not."""
        with self._stage(job):
            best = self._try(findings, high, self._truncated)
            if best is None:
                return None
            if (smallest := self._try(findings, low, self._truncated)) is not None:
                return smallest
            while high - low > self._resolution:
                middle = (low + high) // 2
                candidate = self._try(findings, middle, self._truncated)
                if candidate is None:
                    low = middle
                else:
                    best, high = candidate, candidate.size
            return best

    def _smaller(self, best: Trial, low: int) -> Trial:
        """The smallest of the models below ``best`` that keep the bound as they are stored.

        Repairs that come with storing are not cheap, so the steps down are small first.
        """
        step = 2 * self._resolution
        while best.size - low > self._resolution:
            budget = max(best.size - step, (low + best.size) // 2)
            candidate = self._try(best.findings, budget, self._stored)
            if candidate is None:
                low = budget
            else:
                best = candidate
            step *= 2
        return best

    @property
    def _resolution(self) -> int:
        return int(RESOLUTION * self.compressor.whole)

    def _truncated(self, findings: Findings, plan: Plan) -> PreTrainedModel:
        return self.compressor.truncate(findings, plan, Job(Silent()))

    def _stored(self, findings: Findings, plan: Plan) -> PreTrainedModel:
        """The final model: repaired, and with pivots."""
        return self.compressor.build(findings, plan, Job(Silent()))

    def _try(self, findings: Findings, budget: int, make: Make) -> Trial | None:
        candidate = self._judge(findings, self.compressor.plan(findings, budget), make)
        return candidate if candidate.loss <= self.bound.limit else None

    def _judge(self, findings: Findings, plan: Plan, make: Make) -> Trial:
        model = rounded(make(findings, plan), self.dtype)
        stored = model if self.quantization is None else self.quantization.applied(model)
        candidate = Trial(self.compressor.size(plan), findings, plan, self._loss(stored))
        self.tried.append(candidate)  # without the model: there may be many
        return replace(candidate, model=model)

    def _loss(self, model: PreTrainedModel) -> float:
        """What ``model`` loses on the held-out samples, in the unit of the bound."""
        task = task_of(self.compressor.dense)
        found = evaluate(
            model,
            self.batches,
            task=task,
            label_of=self.label_of,
            baseline=self.baseline,
            masking=self.masking,
            unanswerable=self.unanswerable,
        )
        assert found.fidelity is not None
        figures = {
            "agreement": percent_changed(found.fidelity),
            "kl": found.fidelity.kl,
            "relative_error": found.fidelity.relative_error,
            "drop": points_lost(found),
        }
        loss = figures[self.bound.figure]
        assert loss is not None
        return loss

    def _asked(self, trial: Trial) -> str:
        """The size that would have to be asked for."""
        config = self.compressor.config
        if config.counts_bytes:
            return f"--target-size {trial.size / 1e6:.2f}MB{as_integers(config)}"
        return f"--keep {trial.size / self.compressor.whole:.3f}"

    def _missed(self, stored: Sequence[Trial]) -> str:
        """Of the models that were judged last: as they are stored, where truncation alone kept the bound."""
        judged = stored or self.tried
        best = min(judged, key=lambda each: (each.loss, each.size))
        samples = sum(processes.gather(sum(len(batch.keys) for batch in self.batches)))
        number = f"{len(judged)} sizes that keep it before storing" if stored else f"{len(judged)} tried sizes"
        loss = f"{best.loss:.3g} {self.bound.unit}{' as it is stored' if stored else ''}"
        return (
            f"no size keeps {self.bound.flag} {self.bound.limit:g}: the best of {number}, {self._asked(best)}, "
            f"loses {loss} on {samples} held-out samples. Allow more loss, calibrate on more --samples, or check "
            "on more samples with --holdout. Nothing was written."
        )
