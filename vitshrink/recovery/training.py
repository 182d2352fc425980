"""The training loop, on accelerate: it never ends with a model that is worse on the held-out samples."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vitshrink.recovery.checkpoints import Checkpoints
from vitshrink.recovery.progress import Progress
from vitshrink.recovery.training_set import TrainingBatch

GRADIENT_NORM = 1.0
"""Longer gradients are shortened to this."""
MOST_FAILURES = 3
"""Times that training goes back to the last good state before it gives up."""


class Criterion(Protocol):
    """What is trained for."""

    def training_loss(self, batch: TrainingBatch, epoch: int) -> Tensor:
        """The loss (), from which gradients flow."""


@dataclass(eq=False)
class Loop:
    """Everything that a step needs; ``model`` is what accelerate made of the model, ``parameters`` those that learn."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    loader: Any
    held_out_losses: Callable[[], list[float]]
    """The plain loss of every row of the held-out samples, the same in every process: the model is judged by it."""
    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    patience: int
    evaluate_every: int
    progress: Progress
    checkpoints: Checkpoints | None = None
    warn: Callable[[str], None] = lambda _message: None
    best: dict[str, Tensor] = field(default_factory=dict)
    _good: tuple[dict[str, Tensor], Any] | None = None
    _losses: list[float] = field(default_factory=list)

    def begin(self) -> float:
        """Judge the model as it is; returns its held-out loss."""
        self.progress.resume_clock()
        self._good = self._state()
        self.judge()
        return self.progress.best

    def resume(self) -> bool:
        """Take up the state on disk, if there is one."""
        if self.checkpoints is None:
            return False
        best = self.checkpoints.load(self.accelerator, self.progress, self.parameters)
        if best is None:
            return False
        self.best = best
        self._good = self._state()
        self.progress.resume_clock()
        return True

    def run(self, criterion: Criterion, on_progress: Callable[[float], None] = lambda _fraction: None) -> str:
        """Train to the end and leave the best state in the model; returns why it ended."""
        progress = self.progress
        ended = ""
        while not ended:
            self.loader.set_epoch(progress.epoch)
            done = progress.step % progress.steps_an_epoch * self.accelerator.gradient_accumulation_steps
            for batch in self.accelerator.skip_first_batches(self.loader, done) if done else self.loader:
                if self._step(batch, criterion):
                    ended = self._after_step()
                    on_progress(progress.fraction)
                if ended:
                    break
        self._restore(self.best)
        return ended

    def _step(self, batch: TrainingBatch, criterion: Criterion) -> bool:
        """Run one batch; True when it ended with a step of the optimizer, or with the return to a good state."""
        accelerator, progress = self.accelerator, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.learning_rate * progress.learning_rate
        with accelerator.accumulate(self.model):
            loss = criterion.training_loss(batch, progress.epoch)
            accelerator.backward(loss)
            norm = torch.zeros(())
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(list(self.parameters.values()), GRADIENT_NORM)
            mean = accelerator.reduce(loss.detach().float(), "mean").item()  # as finite in every process
            scaled = accelerator.scaler is not None  # half precision: it skips steps of infinite gradients itself
            if math.isfinite(mean) and (scaled or math.isfinite(float(norm))):
                self.optimizer.step()
                self.optimizer.zero_grad()
                self._losses.append(mean)
            else:
                self._go_back()
                return True
        return bool(accelerator.sync_gradients)

    def _after_step(self) -> str:
        progress = self.progress
        progress.step += 1
        progress.tick()
        if progress.seconds is not None:
            elapsed = torch.tensor(progress.elapsed, device=self.accelerator.device)
            progress.tick(self.accelerator.reduce(elapsed, "mean").item())
        over = progress.fraction >= 1
        alarmed = bool(self._losses) and progress.alarms(self._losses[-1])
        if over or alarmed or progress.step % self.evaluate_every == 0:
            self.judge()
            if self.checkpoints is not None and not over:
                self.checkpoints.save(self.accelerator, progress, self.best, self.parameters)
        if progress.failures > MOST_FAILURES:
            return "diverged"
        if over:
            return "time" if progress.step < progress.steps else "done"
        return "early" if progress.stale(self.patience) and not progress.may_retreat else ""

    def settings(self) -> dict[str, Any]:
        """What a report should say that no config says."""
        return {
            "learning_rate": self.learning_rate,
            "precision": self.accelerator.mixed_precision,
            "processes": self.accelerator.num_processes,
        }

    def judge(self) -> None:
        """Run the held-out samples, and keep the state where it is the best so far, or go back to that."""
        progress = self.progress
        rows = self.held_out_losses()
        held_out = sum(rows) / len(rows)
        losses, self._losses = self._losses, []
        progress.history.append(
            {
                "step": progress.step,
                "epoch": round(progress.step / progress.steps_an_epoch, 3),
                "seconds": round(progress.elapsed, 3),
                "learning_rate": self.learning_rate * progress.learning_rate,
                "loss": sum(losses) / len(losses) if losses else None,
                "held_out": held_out if math.isfinite(held_out) else None,
            }
        )
        if progress.keeps(rows):
            self.best = _copy(self.parameters)
        gives_up = progress.destroyed(held_out) or (math.isfinite(held_out) and progress.stale(self.patience))
        if gives_up and progress.may_retreat:
            self._retreat(held_out)
        if math.isfinite(held_out):
            self._good = self._state()
        elif progress.step:
            self._go_back()

    @torch.no_grad()
    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def _state(self) -> tuple[dict[str, Tensor], Any]:
        return _copy(self.parameters), deepcopy(self.optimizer.state_dict())

    def _retreat(self, held_out: float) -> None:
        """From a learning rate that brings nothing more: to the best state, and a lower one."""
        progress = self.progress
        if not progress.best_step:
            self.warn(
                f"learning rate {self.learning_rate * progress.rate:.1e} raised the held-out loss from "
                f"{progress.best:.4g} to {held_out:.4g} in {progress.step - progress.began[0]} steps: training "
                "starts again with a third of this learning rate."
            )
        progress.retreat()
        self._restore(self.best)
        self.optimizer.state.clear()

    def _go_back(self) -> None:
        """After numbers that are not finite: the last good state, at half the learning rate."""
        assert self._good is not None
        self.progress.failures += 1
        self.progress.rate /= 2
        self.warn(
            f"training met NaN or infinity at step {self.progress.step}: it continues from the last good state "
            f"with half the learning rate ({self.progress.failures} of at most {MOST_FAILURES} times)."
        )
        weights, optimizer = self._good
        self._restore(weights)
        self.optimizer.load_state_dict(deepcopy(optimizer))
        self.optimizer.zero_grad()
        self._losses.clear()


def _copy(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def steps_an_epoch(batches: int, accumulation: int) -> int:
    return max(1, math.ceil(batches / accumulation))
