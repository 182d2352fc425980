"""Plans for a budget of time are timed beside the dense model, and planned again where the clock says otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from vitshrink.compression.candidates import Offer, Plan
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.compression.merging import Trials, measured_curves
from vitshrink.compression.pace import CLOSE, Mixture, Pace, Paced
from vitshrink.models.merged import Kept, merge_tokens
from vitshrink.models.parts import with_pivots
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job

ATTEMPTS = 3
"""Plans that are timed at most for one budget."""


@dataclass(frozen=True, eq=False)
class Attempt:
    """A plan for a budget, and what the clock says of it.

    Attributes:
        compressor: counts in time, with the tokens that the blocks keep.
        aim: nanoseconds that the parts of the model may take, as they were timed.
    """

    compressor: Compressor
    kept: Kept | None
    plan: Plan
    aim: int
    paced: Paced

    @property
    def ranked(self) -> bool:
        """Whether layers become factors."""
        return ranked(self.plan)


@dataclass(frozen=True, eq=False)
class Course:
    """A budget of time, and what makes models for it.

    Attributes:
        base: the model that is to get faster.
        offers: layers whose ranks are on offer, of which only the costs are told; nothing, where only tokens are.
        compressors: with the prices of layers, what counts in time.
        pivots: whether factors are stored with pivots.
    """

    pace: Pace
    base: PreTrainedModel
    offers: Sequence[Offer]
    compressors: Callable[..., Compressor]
    pivots: bool

    def require_reachable(self) -> None:
        """Raises TargetError."""
        pace = self.pace
        pace.require_reachable(self._priced(None).least_budget() if pace.blocks is None else pace.fastest(self.offers))

    def mixture(self, findings: Findings, trials: Trials | None, job: Job) -> Mixture | None:
        """Tokens and ranks with what they lose; None where all tokens are kept.

        Sums of losses of two kinds are no more than a guess: ranks are left out where tokens alone measure less.
        """
        if self.pace.blocks is None or trials is None:
            return None
        curves = measured_curves(trials, job)
        found = self.pace.mixture(curves, self.compressors().offers(findings) if self.offers else ())
        alone = replace(found, sites=())
        if not found.sites or self.pace.fastest(()) > self.pace.budget:
            return found
        with job.stage("tokens", "Measuring tokens alone, and tokens and ranks"):
            both, one = (processes.by_main(partial(self._loss, each, findings, trials)) for each in (found, alone))
        return found if both < one else alone

    def _loss(self, mixture: Mixture, findings: Findings, trials: Trials) -> float:
        compressor, kept, plan, _ = self.plan(findings, mixture, self.pace.budget)
        return trials.loss(merged(compressor.replaced(findings, plan), kept))

    def plan(self, findings: Findings, mixture: Mixture | None, aim: int) -> tuple[Compressor, Kept | None, Plan, int]:
        """What counts in time, how many tokens the blocks keep, the forms of the layers, and what all may take."""
        kept = None if mixture is None else self.pace.schedule(mixture, aim)
        compressor = self._priced(kept)
        if not self.offers or (mixture is not None and not mixture.sites):
            return compressor, kept, {offer.name: offer.kept for offer in self.offers}, aim
        aim = max(aim, compressor.least_budget(findings))
        return compressor, kept, compressor.plan(findings, aim), aim

    def best(self, mixture: Mixture | None, findings: Findings, job: Job) -> Attempt:
        """The plan whose time is nearest to the budget, not above it if that can be."""
        aim, tried = self.pace.budget, list[Attempt]()
        for number in range(ATTEMPTS):
            compressor, kept, plan, aim = self.plan(findings, mixture, aim)
            with job.stage("clock", f"Timing attempt {number + 1}"):
                trial = merged(compressor.replaced(findings, plan), kept)
                pivots = self.pivots and self.pace.clock.runtime.factors
                paced = self.pace.measured(with_pivots(trial) if pivots else trial)
            tried.append(Attempt(compressor, kept, plan, aim, paced))
            if paced.close:
                break
            aim = int(aim / paced.over)
        return min(tried, key=lambda each: (each.paced.over > 1 + CLOSE, abs(each.paced.over - 1)))

    def finished(self, best: Attempt, model: PreTrainedModel, plan: Plan, job: Job) -> Paced:
        """What the finished model takes, with a warning where that is not what was asked for."""
        paced, clock = best.paced, self.pace.clock
        if best.ranked:  # once weights were fitted ranks may be others than those of the plan that was timed
            with job.stage("clock", "Timing the finished model"):
                paced = self.pace.measured(model)
        if not paced.close:
            job.warn(
                f"--target-latency {self.pace.said}: a batch takes {1000 * paced.taken:.3g} ms, "
                f"{paced.taken / paced.dense:.3f} of the dense model's time, not {1000 * paced.asked:.3g} ms "
                f"{clock.described}: {ATTEMPTS} plans came no nearer."
            )
        used = {"merged tokens": best.kept is not None, "ranks": ranked(plan)}
        return replace(paced, levers=tuple(lever for lever, there in used.items() if there))

    def _priced(self, kept: Kept | None) -> Compressor:
        return self.compressors(prices=self.pace.prices(kept) if self.offers else None)


def ranked(plan: Plan) -> bool:
    """Whether layers become factors."""
    return any(candidate.form is not None for candidate in plan.values())


def merged(model: PreTrainedModel, kept: Kept | None) -> PreTrainedModel:
    """The model itself, whose blocks keep so many tokens."""
    if kept is not None:
        merge_tokens(model, kept)
    return model
