"""The plan that a job asks for: one rank for all, the ranks that keep a share of the energy, or those of a budget."""

from collections.abc import Sequence

from vitshrink.compression.allocation import Allocation, allocate, explained_variance, of_grade
from vitshrink.compression.candidates import Offer, Plan
from vitshrink.config.options import CompressConfig
from vitshrink.errors import TargetError


def choose_plan(config: CompressConfig, offers: Sequence[Offer], budget: int, allocation: Allocation) -> Plan:
    """A candidate for every site.

    Raises TargetError where that makes nothing smaller, or cannot be reached.
    """
    if config.rank is not None:
        plan = of_grade(offers, config.rank)
        if _keeps_all(plan):
            largest = max(each.grade for offer in offers for each in offer.candidates)
            raise TargetError(f"--rank {config.rank} makes no layer smaller: the largest useful rank is {largest}.")
        return plan
    if config.explained_variance is not None:
        plan = explained_variance(offers, config.explained_variance)
        if _keeps_all(plan):
            raise TargetError(
                f"--explained-variance {config.explained_variance} leaves every layer dense: no smaller rank "
                "keeps that much. Use a lower value."
            )
        return plan
    return allocate(offers, budget, allocation)


def _keeps_all(plan: Plan) -> bool:
    return all(candidate.form is None for candidate in plan.values())
