"""What a site may become: candidates, each with a form, a cost and a loss; and the plan that chooses among them."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Literal, Protocol

Currency = Literal["parameters", "bytes", "nanoseconds"]
"""What a budget is counted in."""

Kind = Literal["matrix", "embedding", "attention", "mlp", "tokens"]


class Form(Protocol):
    """How a site is stored. A form is a frozen value: two that are equal store the same."""

    @property
    def label(self) -> str:
        """As a table says it: ``rank 48``, ``int8``."""

    @property
    def rank(self) -> int | None:
        """None for a form that has none."""

    @property
    def bits(self) -> float | None:
        """Of a weight on average, where it is an integer."""


@dataclass(frozen=True)
class Site:
    """A place in the model that may be stored in several forms.

    Attributes:
        name: of a module, or of a part of one; unique in the model.
        shape: (m, n) of the matrix, or of one with as many numbers.
        parts: sites within it, which have no form of their own where it has one.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """The price of a form in each currency; None where it was not determined."""

    parameters: int
    bytes: int
    nanoseconds: int | None = None

    def of(self, currency: Currency) -> int:
        """Raises ValueError for a currency in which there is no price."""
        price: int | None = getattr(self, currency)
        if price is None:
            raise ValueError(f"there is no price in {currency}")
        return price


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form that a site may have.

    Attributes:
        form: None keeps the site as it is.
        loss: what the model loses by it. Losses of two sites compare only where the method says so.
        grade: what a user compares sites by: the rank, for forms that have one.
    """

    form: Form | None
    cost: Cost
    loss: float = 0.0
    grade: int = 0


Plan = dict[str, Candidate]
"""From the name of a site to the candidate that it becomes."""


@dataclass(frozen=True, eq=False)
class Offer:
    """The candidates of one site, in the order of their cost in one currency.

    Attributes:
        kept: the site as it is, which loses nothing.
        candidates: all cost less than ``kept``, no two the same, and a dearer one never loses more.
        nothing: what is lost where nothing of the site is left.
        most: the largest grade that a candidate is the answer to; who asks for more keeps the site.
    """

    site: Site
    currency: Currency
    kept: Candidate
    candidates: Sequence[Candidate]
    nothing: float = 0.0
    most: float = math.inf

    @classmethod
    def of(
        cls,
        site: Site,
        currency: Currency,
        kept: Candidate,
        candidates: Iterable[Candidate],
        *,
        nothing: float = 0.0,
        most: float = math.inf,
    ) -> "Offer":
        """An offer of those among ``candidates`` that are cheaper than ``kept``, and that no cheaper one beats."""
        found: list[Candidate] = []
        most_of_all, last = kept.cost.of(currency), 0
        priced = [(each.cost.of(currency), each.loss, each) for each in candidates]
        for price, loss, each in sorted(priced, key=itemgetter(0, 1)):
            if price >= most_of_all:
                break
            if not found or (price > last and loss <= found[-1].loss):
                found.append(each)
                last = price
        return cls(site, currency, kept, found, nothing, most)

    def with_more(self, candidates: Iterable[Candidate]) -> "Offer":
        """The same with further candidates."""
        every = [*self.candidates, *candidates]
        return Offer.of(self.site, self.currency, self.kept, every, nothing=self.nothing, most=self.most)

    def scaled(self, by: float) -> "Offer":
        """The same with losses that are so many times as large; without candidates where they are infinite."""
        losing = [] if math.isinf(by) else [replace(each, loss=by * each.loss) for each in self.candidates]
        return replace(self, candidates=losing, nothing=self.nothing if math.isinf(by) else by * self.nothing)

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def cheapest(self) -> Candidate:
        """What costs the least; the site as it is, where nothing is on offer."""
        return self.candidates[0] if self.candidates else self.kept

    @cached_property
    def ladder(self) -> Sequence[Candidate]:
        """The candidates, and above them the site as it is."""
        return [*self.candidates, self.kept]

    @cached_property
    def costs(self) -> Sequence[int]:
        """Of the ladder, ascending."""
        return [each.cost.of(self.currency) for each in self.ladder]

    @cached_property
    def losses(self) -> Sequence[float]:
        """Of the ladder."""
        return [each.loss for each in self.ladder]

    @cached_property
    def graded(self) -> Sequence[Candidate]:
        """The candidates that have a grade, by it."""
        return sorted((each for each in self.candidates if each.grade), key=lambda each: each.grade)

    def price(self, candidate: Candidate) -> int:
        return candidate.cost.of(self.currency)

    def within(self, budget: float) -> Candidate | None:
        """The dearest candidate that costs at most ``budget``."""
        number = bisect_right(self.costs, budget, hi=len(self.candidates))
        return self.candidates[number - 1] if number else None

    def nearest(self, grade: int) -> Candidate:
        """What a user who asks for ``grade`` gets: that, or the nearest below; the smallest, where there is none."""
        if not self.graded or grade > self.most:
            return self.kept
        return self.graded[max(bisect_right(self.graded, grade, key=lambda each: each.grade) - 1, 0)]


def plan_cost(offers: Iterable[Offer], plan: Mapping[str, Candidate]) -> int:
    """Cost of all sites under ``plan``."""
    return sum(offer.price(plan[offer.name]) for offer in offers)


def least_cost(offers: Iterable[Offer]) -> int:
    """The smallest budget that any plan meets."""
    return sum(offer.price(offer.cheapest) for offer in offers)


def whole_cost(offers: Iterable[Offer]) -> int:
    """Cost of all sites as they are."""
    return sum(offer.price(offer.kept) for offer in offers)
