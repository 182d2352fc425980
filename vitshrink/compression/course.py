"""Plans for a budget of time are timed beside the dense model, and planned again where the clock says otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from vitshrink.compression.candidates import Offer, Plan
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.compression.merging import Trials, measured_curves
from vitshrink.compression.pace import CLOSE, INTEGERS, MERGED, NARROWER, RANKS, Mixture, Pace, Paced
from vitshrink.compression.static_layers import as_fast_as_integers
from vitshrink.models.merged import Kept, merge_tokens
from vitshrink.models.parts import with_pivots
from vitshrink.models.views import view_of
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Job

ATTEMPTS = 3
"""Plans that are timed at most for one budget."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan for a budget.

    Attributes:
        compressor: counts in time, with the tokens that the blocks keep.
        kept: how many; None for all.
        plan: the forms of the layers.
        aim: nanoseconds that the parts of the model may take, as they were timed.
        spare: whether all is kept, and fast enough as integers.
    """

    compressor: Compressor
    kept: Kept | None
    plan: Plan
    aim: int
    spare: bool = False


@dataclass(frozen=True, eq=False)
class Attempt:
    """A plan, and what the clock says of it."""

    planned: Planned
    paced: Paced

    @property
    def ranked(self) -> bool:
        """Whether layers become smaller."""
        return ranked(self.planned.plan)


Learned = Callable[[], tuple[Findings, Mixture | None]]
"""What is known of the layers, and tokens and ranks with what they lose: learned when it is first asked for."""


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
        with job.stage("tokens", "Measuring merged tokens alone and with ranks"):
            both, one = (processes.by_main(partial(self._loss, each, findings, trials)) for each in (found, alone))
        return found if both < one else alone

    def _loss(self, mixture: Mixture, findings: Findings, trials: Trials) -> float:
        found = self._planned(findings, mixture, self.pace.budget)
        return trials.loss(merged(found.compressor.replaced(findings, found.plan), found.kept))

    def plan(self, learned: Learned, aim: int) -> "Planned":
        """For a budget; nothing has to be learned where integers alone are fast enough."""
        if self.pace.suffices(aim):
            return Planned(self._priced(None), None, self._whole, aim, spare=True)
        return self._planned(*learned(), aim)

    def _planned(self, findings: Findings, mixture: Mixture | None, aim: int) -> "Planned":
        kept = None if mixture is None else self.pace.schedule(mixture, aim)
        compressor = self._priced(kept)
        if not self.offers or (mixture is not None and not mixture.sites):
            return Planned(compressor, kept, self._whole, aim)
        aim = max(aim, compressor.least_budget(findings))
        return Planned(compressor, kept, compressor.plan(findings, aim), aim)

    def best(self, learned: Learned, job: Job) -> Attempt:
        """The plan whose time is nearest to the budget, not above it if that can be."""
        aim, tried = self.pace.budget, list[Attempt]()
        for number in range(ATTEMPTS):
            planned = self.plan(learned, aim)
            trial = view_of(self.base) if planned.spare else planned.compressor.replaced(learned()[0], planned.plan)
            with job.stage("clock", f"Timing attempt {number + 1}"):
                paced = self.pace.measured(self._as_it_runs(merged(trial, planned.kept)), spare=planned.spare)
            tried.append(Attempt(planned, paced))
            if paced.close:
                break
            aim = int(planned.aim / paced.over)
        return min(tried, key=lambda each: (each.paced.over > 1 + CLOSE, abs(each.paced.over - 1)))

    def _as_it_runs(self, trial: PreTrainedModel) -> PreTrainedModel:
        """A model that takes as long as the finished one."""
        if self.pace.integers:
            return as_fast_as_integers(trial)
        return with_pivots(trial) if self.pivots and self.pace.clock.runtime.factors else trial

    def finished(self, best: Attempt, model: PreTrainedModel, plan: Plan, job: Job) -> Paced:
        """What the finished model takes, with a warning where that is not what was asked for."""
        paced, clock, integers = best.paced, self.pace.clock, self.pace.integers
        if best.ranked or integers:  # which may have other ranks than the plan that was timed, or fewer integers
            with job.stage("clock", "Timing the finished model"):
                paced = self.pace.measured(model, spare=best.planned.spare)
        if not paced.close:
            job.warn(
                f"--target-latency {self.pace.said} is missed: a batch takes {1000 * paced.taken:.3g} ms, "
                f"{paced.taken / paced.dense:.3f} of the dense model's time, not {1000 * paced.asked:.3g} ms "
                f"{clock.described}. None of {ATTEMPTS} plans was closer."
            )
        forms = [candidate.form for candidate in plan.values() if candidate.form is not None]
        used = {
            INTEGERS: integers,
            MERGED: best.planned.kept is not None,
            RANKS: any(form.rank is not None for form in forms),
            NARROWER: any(form.rank is None for form in forms),
        }
        return replace(paced, levers=tuple(lever for lever, there in used.items() if there))

    @property
    def _whole(self) -> Plan:
        return {offer.name: offer.kept for offer in self.offers}

    def _priced(self, kept: Kept | None) -> Compressor:
        return self.compressors(prices=self.pace.prices(kept) if self.offers else None)


def ranked(plan: Plan) -> bool:
    """Whether layers become smaller."""
    return any(candidate.form is not None for candidate in plan.values())


def merged(model: PreTrainedModel, kept: Kept | None) -> PreTrainedModel:
    """The model itself, whose blocks keep so many tokens."""
    if kept is not None:
        merge_tokens(model, kept)
    return model
