"""What a job learns of matrices that it rounds: how much errors in them cost at the output of the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from vitshrink.compression.estimation import DENSE, origin
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.coded import matrix_of
from vitshrink.compression.keeping import Cached, Step
from vitshrink.compression.rounding import Metric
from vitshrink.config.options import CompressConfig
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import NumericsError
from vitshrink.models.families import passes_of, precision_for
from vitshrink.models.readings import reading_of
from vitshrink.runtime.cache import Cache
from vitshrink.runtime.entries import laid_out
from vitshrink.runtime.observer import Job
from vitshrink.runtime.offloading import device_of_passes
from vitshrink.runtime.paging import paged
from vitshrink.runtime.precision import resolve_precision
from vitshrink.runtime.state import Progress
from vitshrink.statistics.recomputing import is_large
from vitshrink.statistics.sensitivity import Sensitivity, collect_sensitivity
from vitshrink.statistics.sharing import Shared


@dataclass(frozen=True, eq=False)
class SensitivityEstimator:
    """The dense model, its calibration data, and the matrices that may be rounded."""

    config: CompressConfig
    dense: PreTrainedModel
    sites: Sequence[str]
    calibration: CalibrationData | None
    progress: Progress = field(default_factory=Progress)

    def learn(self, job: Job) -> Findings:
        """One walk over the calibration data, from which every fineness follows."""
        cached = self._cached(job)
        step = Step(self.progress, DENSE)
        found = step.read(Sensitivity) if cached is None else cached.read(Sensitivity)
        if not found:
            found = self._collected(job)
            if cached is None:
                step.write(dict(found), hold=False)  # they are used up
            elif len(found) == len(self.sites):
                cached.write(found)
        findings = Findings({}, {}, found)
        needed = sum(each.half.nbytes for each in found.values() if each.half is not None)
        pages = self.progress.prepared() if is_large(needed, self.dense) else None
        with job.stage("factorize", "Factorizing", len(self.sites)) as advance:
            for name in self.sites:
                try:
                    findings.layers.update(paged({name: self._metric(name, found.get(name), job)}, pages))
                except NumericsError as error:
                    findings.failures[name] = str(error)
                    job.warn(f"{name} stays dense: {error}")
                if name in found:  # all that it tells is in the metric, which is as large
                    found[name] = replace(found[name], half=None)
                advance(1)
        if not findings.layers:
            raise NumericsError("no layer could be rounded; see the warnings for the reasons.")
        return findings

    def _cached(self, job: Job) -> Cached | None:
        """Where sensitivities are kept for other jobs; None where the job keeps none."""
        if self.config.cache is None:
            return None
        with job.stage("cache", "Looking into the cache"):
            device = next(self.dense.parameters()).device
            precision = resolve_precision(
                device_of_passes(self.dense), precision_for(self.dense, self.config.precision)
            )
            key = origin(self.dense, self.sites, self.calibration) | {"seed": self.config.seed, "precision": precision}
            if self._probes > 1:
                key["probes"] = self._probes
            return Cached(Cache.at(self.config.cache, device, job.warn), {Sensitivity: key})

    @property
    def _probes(self) -> int:
        return reading_of(self.dense).probes

    def _collected(self, job: Job) -> dict[str, Sensitivity]:
        assert self.calibration is not None
        device = next(self.dense.parameters()).device
        with job.stage("calibrate", "Calibrating", self._probes * len(self.calibration.samples)) as advance:
            found = collect_sensitivity(
                self.dense,
                self.sites,
                self.calibration.batches,
                seed=self.config.seed,
                passes=passes_of(self.dense, self.config.precision),
                course=Shared(self.progress, DENSE, device),
                on_batch=advance,
            )
        return laid_out(found)

    def _metric(self, name: str, found: Sensitivity | None, job: Job) -> Metric:
        """Raises NumericsError where there is none."""
        if found is not None:
            return Metric.of(found)
        job.warn(f"{name}: the measured outputs do not depend on it; it is rounded with an error of two percent.")
        return Metric.unseen(matrix_of(self.dense.get_submodule(name)))
