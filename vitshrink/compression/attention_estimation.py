"""What a method learns of attentions: statistics, and nested parts of which a rank is a slice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from vitshrink.compression.attentions import Attention, AttentionSite, attentions_of, sites_of, weights_of
from vitshrink.compression.estimation import DENSE
from vitshrink.compression.findings import Findings
from vitshrink.compression.keeping import Step
from vitshrink.config.options import CompressConfig
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import NumericsError
from vitshrink.methods.attention import ATTENTION, AttentionMethod
from vitshrink.models.targets import Target
from vitshrink.runtime.entries import laid_out
from vitshrink.runtime.observer import Job
from vitshrink.runtime.state import Progress
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.sharing import Shared
from vitshrink.statistics.stats import LinearStats


@dataclass(frozen=True, eq=False)
class AttentionEstimator:
    """The dense model and its calibration data. These methods look at nothing else."""

    config: CompressConfig
    dense: PreTrainedModel
    targets: Sequence[Target]
    method: AttentionMethod
    calibration: CalibrationData | None
    progress: Progress = field(default_factory=Progress)

    def learn(self, job: Job) -> Findings:
        """Calibrate on the dense model and decompose each attention once; a rank is then a slice."""
        if self.config.cache is not None:
            job.warn(f"--cache has no effect for --method {self.method.name}.")
        attentions = attentions_of(self.dense, self.targets)
        findings = Findings({}, {}, self._statistics(attentions, job))
        sites = sites_of(attentions, self.method, self.config.options)
        with job.stage("factorize", "Factorizing", len(attentions)) as advance:
            for attention in attentions:
                self._decompose([site for site in sites if site.attentions[0] == attention], findings, job)
                advance(1)
        if not findings.layers:
            raise NumericsError("no attention could be factorized; see the warnings for the reasons.")
        return findings

    def _statistics(self, attentions: Sequence[Attention], job: Job) -> Mapping[str, LinearStats]:
        assert self.calibration is not None
        memory, batches = Step(self.progress, DENSE), self.calibration.batches
        if stats := memory.read(LinearStats):
            return stats
        used = [target for attention in attentions for target in attention.targets.values()]
        course = Shared(self.progress, DENSE, next(self.dense.parameters()).device)
        with job.stage("calibrate", "Calibrating", len(self.calibration.samples)) as advance:
            found = collect(self.dense, used, batches, self.method.needs, course=course, on_batch=advance)
        stats = laid_out(found)
        memory.write(stats)
        return stats

    @torch.no_grad()
    def _decompose(self, sites: Sequence[AttentionSite], findings: Findings, job: Job) -> None:
        """Put what begins with one attention into the findings; where that fails it is kept, and reported."""
        if not sites:
            return
        stack = max((site.attentions for site in sites), key=len)
        first, *others = (weights_of(self.dense, each, findings.stats) for each in stack)
        options = self.config.options
        ranks = self.method.ranks(stack[0].dimensions, **options)
        try:
            wanted = [site.part for site in sites]
            parts = self.method.factorize(replace(first, following=others), ranks, wanted, **options)
            for site in sites:
                findings.layers[site.name] = parts[site.part].check_finite()
        except NumericsError as error:
            for site in sites:
                findings.layers.pop(site.name, None)
                findings.failures[site.name] = str(error)
            job.warn(f"{', '.join(each.places[ATTENTION] for each in stack)} stays dense: {error}")
