"""One compressor for all forms: it learns, plans over all sites at once, and builds what a plan says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

from transformers import PreTrainedModel

from vitshrink.compression.allocation import Allocation
from vitshrink.compression.candidates import Form, Offer, Plan, least_cost, whole_cost
from vitshrink.compression.findings import Findings, Rebuild
from vitshrink.compression.forms.registry import Maker, Material
from vitshrink.compression.nesting import nested, spread
from vitshrink.compression.selection import choose_plan
from vitshrink.config.options import CompressConfig
from vitshrink.models import cost
from vitshrink.models.checkpoint import HEADER_BYTES
from vitshrink.models.views import own, view_of
from vitshrink.runtime.observer import Job


class Estimator(Protocol):
    """What a method learns of the sites on the dense model."""

    def learn(self, job: Job) -> Findings:
        """From the dense model."""


class Refiner(Protocol):
    """What a method learns again on compressed models."""

    def refine(
        self, before: Findings, plan: Plan, model: PreTrainedModel, rebuilt: Rebuild, job: Job, step: str = ""
    ) -> Findings:
        """From ``model``, compressed by ``plan``; what is done is kept as ``step``."""

    def resume(self, step: str, job: Job) -> Findings | None:
        """What an interrupted run of the job has kept of a step, if it had completed it."""

    def kept(self, step: str) -> bool:
        """Whether an interrupted run of the job has completed a step."""

    def forget(self, step: str) -> None:
        """Keep nothing of a step that another one has overtaken."""


class Repairs(Protocol):
    """What is fitted after the sites have their forms."""

    def after_truncation(self, model: PreTrainedModel, plan: Plan, findings: Findings, job: Job) -> None:
        """In place."""

    def before_storing(self, model: PreTrainedModel, plan: Plan, findings: Findings, job: Job) -> None:
        """In place."""


@dataclass(frozen=True, eq=False)
class Compressor:
    """A dense model and every choice that is not the size.

    Attributes:
        makers: what offers candidates; the first is that of the method.
        refiner: what learns again from compressed models, where anything does.
        missing: what a model loses on some samples, where several kinds of forms are compared by it.
    """

    config: CompressConfig
    material: Material
    makers: Sequence[Maker]
    estimator: Estimator
    repairs: Repairs
    allocation: Allocation
    refiner: Refiner | None = None
    missing: Callable[[PreTrainedModel], float] | None = None

    @property
    def dense(self) -> PreTrainedModel:
        return self.material.dense

    def learn(self, job: Job) -> Findings:
        """Calibrate on the dense model, once for all sizes."""
        return self.estimator.learn(job)

    def refine(self, findings: Findings, plan: Plan, job: Job, step: str = "") -> Findings:
        """Learn again from the model compressed by ``plan``, if anything does; what is done is kept as ``step``."""
        if self.refiner is None:
            return findings
        budget = self.size(plan)
        return self.refiner.refine(
            findings,
            plan,
            self.replaced(findings, plan),
            lambda again: self.replaced(again, self.plan(again, budget)),
            job,
            step,
        )

    def offers(self, findings: Findings | None = None) -> Sequence[Offer]:
        """The candidates of every site of which something was found; without findings only their costs are told.

        A site that has others within it has theirs, too.
        """
        if findings is None:
            return self._unpriced
        if id(findings) not in self._priced:
            self._priced.clear()  # the findings are kept beside, so that no others get their identity
            offers = [maker.offers(findings) for maker in self.makers]
            if findings.scales:
                offers = [[each.scaled(by) for each in kind] for kind, by in zip(offers, findings.scales, strict=True)]
            found = _merged(offers)
            self._priced[id(findings)] = findings, nested(found)
        return self._priced[id(findings)][1]

    def plan(self, findings: Findings, budget: int) -> Plan:
        """A candidate for every site, or for those within it, for a budget of the whole model. Raises TargetError."""
        offers = self.offers(findings)
        plan = spread(choose_plan(self.config, offers, budget - self.fixed(offers), self.allocation))
        failed = [offer for offer in self.sites if offer.name in findings.failures]
        return plan | {offer.name: offer.kept for offer in failed if not _covered(offer, plan, self.sites)}

    @cached_property
    def whole(self) -> int:
        """Size of the dense model in the currency of the job: its parameters, the bytes of its file, or its time."""
        material = self.material
        if material.prices is not None:
            return material.prices.whole
        if material.currency == "parameters":
            return cost.parameters(self.dense)
        if material.quantization is not None:
            return material.quantization.file_bytes(self.dense)
        return cost.parameters(self.dense) * material.itemsize + HEADER_BYTES * len(self.dense.state_dict())

    def fixed(self, offers: Sequence[Offer]) -> int:
        """What no plan changes: norms, biases, heads, and all that is not on offer."""
        return self.whole - whole_cost(offers)

    def least_budget(self, findings: Findings | None = None) -> int:
        """The smallest budget that ``plan`` can meet; without findings, where every site has its candidates."""
        offers = self.offers(findings)
        return self.fixed(offers) + least_cost(offers)

    def size(self, plan: Plan) -> int:
        """Size of the whole model that ``build`` gives for ``plan``."""
        currency = self.material.currency
        return self.fixed(self._unpriced) + sum(candidate.cost.of(currency) for candidate in plan.values())

    def replaced(self, findings: Findings, plan: Plan) -> PreTrainedModel:
        """A view of the dense model with the forms of the plan, as they are made."""
        model = view_of(self.dense)
        for maker, chosen in zip(self.makers, self._by_maker(plan), strict=True):
            if chosen:
                maker.build(model, chosen, findings)
        return model

    def truncate(self, findings: Findings, plan: Plan, job: Job) -> PreTrainedModel:
        """The compressed model before the repairs and the form that come with storing it; a view of the dense one."""
        model = self.replaced(findings, plan)
        self.repairs.after_truncation(model, plan, findings, job)
        return model

    def build(self, findings: Findings, plan: Plan, job: Job) -> PreTrainedModel:
        """The compressed model, repaired, in the form in which it is stored; it shares nothing with the dense one."""
        model = own(self.truncate(findings, plan, job))
        self.repairs.before_storing(model, plan, findings, job)
        return model

    @cached_property
    def sites(self) -> Sequence[Offer]:
        """All sites, those within others as well; only costs are told."""
        return _merged([maker.offers() for maker in self.makers])

    @cached_property
    def _unpriced(self) -> Sequence[Offer]:
        return nested(self.sites)

    @cached_property
    def _priced(self) -> dict[int, tuple[Findings, Sequence[Offer]]]:
        return {}

    def _by_maker(self, plan: Plan) -> list[dict[str, Form]]:
        """What each maker has to build."""
        chosen: list[dict[str, Form]] = [{} for _ in self.makers]
        for name, candidate in plan.items():
            if candidate.form is not None:
                number = next(n for n, maker in enumerate(self.makers) if maker.makes(candidate.form))
                chosen[number][name] = candidate.form
        return chosen


def _covered(offer: Offer, plan: Plan, sites: Sequence[Offer]) -> bool:
    """Whether a plan says what becomes of a site: by its name, by that of one around it, or by those within it."""
    around = (each.name for each in sites if offer.name in each.site.parts)
    return any(name in plan for name in (offer.name, *around, *offer.site.parts))


def _merged(offers: Sequence[Sequence[Offer]]) -> list[Offer]:
    """One offer a site, with the candidates of all makers."""
    found: dict[str, Offer] = {}
    for offer in chain(*offers):
        before = found.get(offer.name)
        found[offer.name] = offer if before is None else before.with_more(offer.candidates)
    return list(found.values())
