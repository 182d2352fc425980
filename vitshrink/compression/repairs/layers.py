"""The repairs of a model whose linear layers have other forms."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from vitshrink.compression.candidates import Candidate, Plan
from vitshrink.compression.estimation import LayerEstimator
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.low_rank import LowRank
from vitshrink.compression.forms.registry import Material
from vitshrink.compression.repairs.bias import RESCALING
from vitshrink.compression.repairs.products import means_of, narrow_targets
from vitshrink.compression.repairs.rescaling import forward_passes, rescale_components
from vitshrink.compression.repairs.sequential import compensate_residuals
from vitshrink.compression.repairs.stream import restore_stream, why_not_restored, writers
from vitshrink.models.pivoting import fix_gauge
from vitshrink.models.reading import chain_problem
from vitshrink.models.targets import blocks_of
from vitshrink.runtime.observer import Job
from vitshrink.statistics.calibration import first_of
from vitshrink.statistics.effects import MEASURED_SAMPLES
from vitshrink.statistics.sharing import shared_effects, shared_shortfall


@dataclass(frozen=True, eq=False)
class LayerRepairs:
    """What the job's compensation does to smaller layers, and the form in which low-rank ones are stored."""

    material: Material
    estimator: LayerEstimator

    def after_truncation(self, model: PreTrainedModel, plan: Plan, _findings: Findings, job: Job) -> None:
        """Fit residuals, where the job asks for that."""
        calibration = self.estimator.calibration
        if self.material.compensation != "residual" or calibration is None:
            return
        layers = {name: self.material.layer(name) for name in self._low_rank(plan)}
        with job.stage("compensate", "Fitting residuals", len(layers)) as advance:
            compensate_residuals(
                model,
                blocks_of(model),
                self.material.targets,
                layers,
                calibration.batches,
                walked=chain_problem(self.material.dense) is None,
                on_layer=lambda _name: advance(1),
            )

    def before_storing(self, model: PreTrainedModel, plan: Plan, findings: Findings, job: Job) -> None:
        """Fit gains and biases, and choose pivots, where the job asks for that."""
        calibration, estimator = self.estimator.calibration, self.estimator
        if self.material.compensation == "stream":
            self._restore_stream(model, findings, job)
        if self.material.compensation in RESCALING and calibration is not None:
            means = {name: estimator.mean(name, findings.stats) for name in self._low_rank(plan)}
            if narrow := narrow_targets(model, self.material.targets):
                means |= means_of(model, narrow, first_of(calibration.batches, MEASURED_SAMPLES))
            steps, batches = estimator.repairs(findings).steps, estimator.to_rescale(findings)
            total = forward_passes(sum(len(batch.keys) for batch in batches), steps)
            with job.stage("compensate", "Fitting gains and biases", total) as advance:
                rescale_components(
                    model,
                    estimator.dense_outputs,
                    list(means),
                    means,
                    batches,
                    steps=steps,
                    seed=estimator.config.seed + 2,
                    passes=estimator.passes,
                    measure=shared_effects,
                    lacking=shared_shortfall,
                    pages=estimator.pages,
                    on_passes=advance,
                )
        if self.material.storage == "gauge":
            with job.stage("gauge", "Choosing pivots"):
                fix_gauge(model, self.material.targets)

    def _restore_stream(self, model: PreTrainedModel, findings: Findings, job: Job) -> None:
        calibration, estimator = self.estimator.calibration, self.estimator
        layers = writers(model, self.material.targets)
        if calibration is None or not layers:
            return
        if (problem := why_not_restored(self.material.dense)) is not None:
            job.warn(f"The residual stream is not repaired: {problem}.")
            return
        with job.stage("stream", "Repairing the residual stream", len(layers)) as advance:
            restore_stream(
                model,
                self.material.dense,
                layers,
                findings.stats,
                estimator.factorize,
                estimator.to_repair(findings),
                weights=estimator.token_weights() if findings.light else None,
                seed=estimator.config.seed + 5,
                passes=estimator.passes,
                pages=estimator.pages,
                on_layer=lambda _name: advance(1),
            )

    def _low_rank(self, plan: Plan) -> list[str]:
        """In the order of the targets."""
        return [target.name for target in self.material.targets if _is_low_rank(plan.get(target.name))]


def _is_low_rank(chosen: Candidate | None) -> bool:
    return chosen is not None and isinstance(chosen.form, LowRank)


@dataclass(frozen=True)
class NoRepairs:
    """For methods whose forms are complete as they are made."""

    def after_truncation(self, model: PreTrainedModel, plan: Plan, findings: Findings, job: Job) -> None:
        """Nothing."""

    def before_storing(self, model: PreTrainedModel, plan: Plan, findings: Findings, job: Job) -> None:
        """Nothing."""
