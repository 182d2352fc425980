"""The state of a training on disk, from which a killed run goes on as if nothing had happened."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink._version import __version__
from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor
from vitshrink.errors import OutputError, UsageError
from vitshrink.recovery.material import Material
from vitshrink.recovery.progress import Progress
from vitshrink.runtime import processes
from vitshrink.runtime.entries import same_bits
from vitshrink.runtime.state import JOB, differing, record_identity
from vitshrink.statistics.digests import model_digest

_STATE, _NEW, _OLD, _ROUNDED = "state", "state.new", "state.old", "rounded"
_PROGRESS, _BEST, _WEIGHTS = "progress.json", "best.safetensors", "weights.safetensors"


@dataclass(frozen=True)
class Checkpoints:
    """A directory that holds the last state of one job; ``job`` is all that the job's result follows from.

    Raises:
        OutputError: the directory cannot be read or written, or another process of the job sees another one.
        UsageError: it holds the state of another job.
    """

    directory: Path
    job: Mapping[str, Any]

    def save(
        self,
        accelerator: Accelerator,
        progress: Progress,
        best: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        """Replace the state; a kill at any moment leaves the old one or the new one.

        Of the ``best`` weights only those are kept that the ``parameters`` of the model are not equal to.
        """
        new, state, old = (self.directory / name for name in (_NEW, _STATE, _OLD))
        with processes.together(), self._writing():
            if processes.is_main():
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir(parents=True)
        with processes.together(), self._writing():
            self._require(new)
            accelerator.save_state(str(new))
        with processes.together(), self._writing():
            if processes.is_main():
                others = {name: each for name, each in best.items() if not same_bits(each, parameters[name].detach())}
                save_file({name: tensor.cpu().contiguous() for name, tensor in others.items()}, new / _BEST)
                (new / _PROGRESS).write_text(json.dumps(progress.to_dict()), encoding="utf-8")
                record_identity(new / JOB, self.job)
                for file in new.iterdir():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
                if state.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    state.rename(old)
                new.rename(state)
                shutil.rmtree(old, ignore_errors=True)

    def save_rounded(self, weights: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
        """Keep a model whose integers were made anew, and what was found meanwhile: training goes on from there."""
        new, place = self.directory / _NEW, self.directory / _ROUNDED
        with processes.together(), self._writing():
            if processes.is_main():
                for each in (new, place):
                    shutil.rmtree(each, ignore_errors=True)
                new.mkdir(parents=True)
                save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, new / _WEIGHTS)
                (new / _PROGRESS).write_text(json.dumps(found), encoding="utf-8")
                record_identity(new / JOB, self.job)
                new.rename(place)

    def load_rounded(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What ``save_rounded`` kept, or None."""
        place = self.directory / _ROUNDED
        if not processes.from_main(place.is_dir()):
            return None
        with processes.together():
            self._require(place)
            try:
                self._check(place)
                found: dict[str, Any] = json.loads((place / _PROGRESS).read_text(encoding="utf-8"))
                return load_file(place / _WEIGHTS), found
            except (OSError, ValueError, SafetensorError) as error:
                raise self._unreadable(error) from error

    def _check(self, state: Path) -> None:
        """Raises UsageError for the state of another job."""
        if different := differing(state / JOB, self.job):
            raise UsageError(
                f"{self.directory} contains the state of another job (different: {', '.join(different)}): pass "
                "another --checkpoints, or remove the directory to start again."
            )

    def _unreadable(self, error: Exception) -> OutputError:
        return OutputError(
            f"the state of training in {self.directory} cannot be read ({error}): remove it to start again."
        )

    def load(
        self, accelerator: Accelerator, progress: Progress, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor] | None:
        """Take up the last state; gives the best weights so far, or None where nothing was saved."""
        state = next((self.directory / name for name in (_STATE, _OLD) if (self.directory / name).is_dir()), None)
        state = processes.from_main(state)
        if state is None:
            return None
        with processes.together():
            self._require(state)
            return self._read(state, accelerator, progress, parameters)

    def _require(self, state: Path) -> None:
        """Raises OutputError where this process does not see what the first one does."""
        if not state.is_dir():
            raise OutputError(
                f"{self.directory} is not the same directory for every process: on several machines, "
                "--checkpoints must be on shared storage."
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            raise OutputError(
                f"cannot write the state of training to {self.directory}: {error}. Check free space and permissions."
            ) from error

    def _read(
        self, state: Path, accelerator: Accelerator, progress: Progress, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        try:
            saved = json.loads((state / _PROGRESS).read_text(encoding="utf-8"))
            self._check(state)
            others = load_file(state / _BEST, device=str(accelerator.device))
            accelerator.load_state(str(state))
            best = {name: each.detach().clone() for name, each in parameters.items()} | others
            known = {each.name for each in fields(Progress)}
            for name, value in saved.items():
                if name in known:
                    setattr(progress, name, value)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
            raise self._unreadable(error) from error
        return best


def clear_state(directory: Path) -> None:
    """Remove the state of a job that is done, and the directory where nothing else is in it."""
    for name in (_STATE, _NEW, _OLD, _ROUNDED):
        shutil.rmtree(directory / name, ignore_errors=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def identity_of(
    start: str,
    dense: PreTrainedModel | None,
    material: Material,
    preprocessor: Preprocessor,
    config: FinetuneConfig,
    seed: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Everything that the result of a training follows from; ``start`` is the digest of the model before it."""
    return {
        "vitshrink": __version__,
        "torch": torch.__version__,
        "model": start,
        "teacher": None if dense is None else model_digest(dense),
        "data": material.identity(),
        "preprocessing": preprocessor.identity(),
        "seed": seed,
        "settings": asdict(replace(config, checkpoints=None)),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }
