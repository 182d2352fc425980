"""How far training has come, and what it remembers of the way."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

WARM_UP = 0.05
"""Part of the training in which the learning rate rises."""


@dataclass
class Progress:
    """Where training stands: ``fraction`` is that of the steps, or of the time, whichever is further."""

    steps_an_epoch: int
    epochs: float
    seconds: float | None = None
    """Most that training may take."""
    step: int = 0
    """Optimiser steps done."""
    elapsed: float = 0.0
    """Seconds, over all runs."""
    rate: float = 1.0
    """By which the learning rate was cut after numbers that were not finite."""
    failures: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    _since: float | None = None

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.epochs * self.steps_an_epoch))

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, from 0."""
        return self.step // self.steps_an_epoch

    @property
    def fraction(self) -> float:
        of_time = 0.0 if self.seconds is None else self.elapsed / self.seconds
        return min(1.0, max(self.step / self.steps, of_time))

    @property
    def learning_rate(self) -> float:
        """Factor of the peak learning rate: linear warm-up, then half a cosine."""
        warm = min(1.0, (self.fraction + 1 / self.steps) / WARM_UP)
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * self.fraction))

    def resume_clock(self) -> None:
        self._since = time.perf_counter() - self.elapsed

    def tick(self, shared: float | None = None) -> None:
        """Read the clock; in several processes all have to take over the same reading."""
        assert self._since is not None
        self.elapsed = time.perf_counter() - self._since if shared is None else shared

    def improves(self, loss: float) -> bool:
        """Whether a held-out loss is the best so far, which is then remembered."""
        if not loss < self.best:
            return False
        self.best, self.best_step = loss, self.step
        return True

    def stale(self, patience: int) -> bool:
        """Whether the last ``patience`` evaluations all were worse than the best one before them."""
        return len([entry for entry in self.history if entry["step"] > self.best_step]) >= patience

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}
