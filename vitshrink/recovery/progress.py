"""How far training has come, and what it remembers of the way."""

import math
import time
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

WARM_UP = 0.05
"""Part of the training in which the learning rate rises."""
WINDOW = 8
"""Steps over which the training loss is averaged before it raises an alarm."""
ALARM = 1.3
"""Growth of the training loss at which the model is judged at once."""
DESTROYED = 1.3
"""Growth of the held-out loss at which training, as long as it has gained nothing, begins again."""
RETREAT = 1 / 3
"""What the learning rate is multiplied by then."""
MOST_RETREATS = 4


@dataclass
class Progress:
    """Where training stands: ``fraction`` is that of the steps, or of the time, whichever is further."""

    steps_an_epoch: int
    epochs: float
    seconds: float | None = None
    """Most that training may take."""
    step: int = 0
    """Optimizer steps done."""
    elapsed: float = 0.0
    """Seconds, over all runs."""
    rate: float = 1.0
    """By which the learning rate was cut, after numbers that were not finite or a start that was destroyed."""
    failures: int = 0
    """Times that training met numbers that were not finite."""
    retreats: int = 0
    """Times that training brought nothing more, and went back to the best state."""
    began: tuple[int, float] = (0, 0.0)
    """Step and fraction at which it last went on from there."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since then: the first ``WINDOW``, and as many of the last."""
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = math.inf
    """The held-out loss of the state that is kept."""
    best_step: int = 0
    lowest: list[float] = field(default_factory=list)
    """The losses of the held-out rows in the state where their mean was least."""
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
        warm = min(1.0, (self.fraction - self.began[1] + 1 / self.steps) / WARM_UP)
        return self.rate * warm * 0.5 * (1 + math.cos(math.pi * self.fraction))

    def resume_clock(self) -> None:
        self._since = time.perf_counter() - self.elapsed

    def tick(self, shared: float | None = None) -> None:
        """Read the clock; in several processes all have to take over the same reading."""
        assert self._since is not None
        self.elapsed = time.perf_counter() - self._since if shared is None else shared

    def keeps(self, losses: list[float]) -> bool:
        """Whether the state with these losses of the held-out rows, in the same order each time, is to be kept.

        It is where their mean is the least so far; and where it is below that of the start, and above the least by no
        more than the standard error of the difference. Held-out samples are few, and training goes from states that a
        high learning rate has stirred to settled ones: of states that cannot be told apart the later is the better.
        """
        loss = fmean(losses)
        if not math.isfinite(loss):
            return False
        if not self.lowest or loss < fmean(self.lowest):
            self.lowest = losses
        elif not loss < self.start or loss - fmean(self.lowest) > _standard_error(losses, self.lowest):
            return False
        self.best, self.best_step = loss, self.step
        return True

    @property
    def start(self) -> float:
        """The held-out loss of the compressed model."""
        return float(self.history[0]["held_out"])

    def stale(self, patience: int) -> bool:
        """Whether none of the last ``patience`` evaluations met a state to be kept."""
        since = max(self.best_step, self.began[0])
        return len([entry for entry in self.history if entry["step"] > since]) >= patience

    def alarms(self, loss: float) -> bool:
        """Take in the training loss of a step; True where the last ones say that training destroys its start."""
        self.losses.append(loss)
        if len(self.losses) > 2 * WINDOW:
            del self.losses[WINDOW]
        if self.best_step or len(self.losses) < 2 * WINDOW:
            return False
        if not fmean(self.losses[WINDOW:]) > ALARM * fmean(self.losses[:WINDOW]):
            return False
        del self.losses[WINDOW:]  # the judgment that follows stands for as many steps
        return True

    def destroyed(self, loss: float) -> bool:
        """Whether a held-out loss is so much worse than that of the start that training should begin again."""
        return self.best_step == 0 < self.step and loss > DESTROYED * self.best

    @property
    def may_retreat(self) -> bool:
        """Whether lower learning rates, and time, are left to try them."""
        return self.retreats < MOST_RETREATS and self.fraction < 1

    def retreat(self) -> None:
        """To a lower learning rate, which rises anew."""
        self.retreats += 1
        self.rate *= RETREAT
        self.began = (self.step, self.fraction)
        self.losses.clear()

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


def _standard_error(losses: list[float], others: list[float]) -> float:
    """Of the mean difference between two states' losses of the same rows."""
    differences = [a - b for a, b in zip(losses, others, strict=True)]
    return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
