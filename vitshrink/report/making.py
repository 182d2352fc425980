"""The parts of a report that say how the model was made: its layers, the samples, the training, the machine."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from vitshrink.runtime.records import IfSet

DENSE, LOW_RANK, INTEGER, CODED = "dense", "low-rank", "integer", "coded"
"""Forms in which a layer may be stored."""


@final
@dataclass(frozen=True, kw_only=True)
class BlockTokens:
    """What one block reads and keeps of the tokens of a sample, where they are merged."""

    block: int
    """Its number, from 0."""
    tokens: int
    """Tokens that enter the block."""
    kept: int
    """Tokens that its MLP reads and that leave the block."""
    macs: int
    """Multiply-accumulate operations of the block, matching included."""


@final
@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """One layer, or attention, that could be compressed."""

    name: str
    """Dotted path in the model; ``:qk`` and the like name a part of an attention."""
    shape: tuple[int, int]
    """Shape of the dense weight: outputs, inputs."""
    rank: int | None = None
    """Rank of its factors; None if it has none."""
    form: IfSet[str] = None
    """How it is stored: ``dense``, ``low-rank``, ``integer`` (of one width), ``coded`` (of any), or what there is of
    something narrower, such as ``512 neurons``; left out where the rank says it."""
    bits: IfSet[float] = None
    """Bits of an integer weight; left out where the weights are floating-point numbers."""
    parameters: int
    """Numbers stored, without the bias."""
    relative_error: float | None = None
    """Square root of the relative loss in the metric of the method; 0 for a dense layer, None if unknown."""
    reason: str | None = None
    """Why the layer stayed dense."""

    @property
    def dense(self) -> bool:
        """Whether it is as it was."""
        return self.rank is None if self.form is None else self.form == DENSE

    @property
    def block(self) -> int | None:
        """Number of its block, from 0; None outside of blocks."""
        match = _in_block(self.name)
        return None if match is None else int(match[1])

    @property
    def place(self) -> str:
        """Its path within its block."""
        match = _in_block(self.name)
        return self.name if match is None else self.name[match.end() :]

    @property
    def kept(self) -> float:
        """Numbers stored, as a fraction of those of the dense weight."""
        return 1.0 if self.dense else self.parameters / (self.shape[0] * self.shape[1])

    @property
    def stored(self) -> str:
        """Its rank, its integers or both: ``24``, ``int8``, ``24, int4``; or ``dense``, or the name of its form."""
        if self.dense:
            return DENSE
        parts = [] if self.form in (None, LOW_RANK, INTEGER, CODED) else [str(self.form)]
        parts += [] if self.rank is None else [str(self.rank)]
        if self.bits is not None:
            parts.append(f"{self.bits:.1f} bits" if self.form == CODED else f"int{self.bits:g}")
        return ", ".join(parts) or str(self.form)


def _in_block(name: str) -> re.Match[str] | None:
    return re.search(r"\.(\d+)\.", name)


@final
@dataclass(frozen=True)
class QuantizationRecord:
    """How integer weights are stored."""

    weights: str
    """``int8`` or ``int4``."""
    activations: str
    """``none``, ``dynamic``: rounded to int8 as they come, or ``static``: on grids that calibration chose."""


@final
@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """The calibration samples."""

    source: str
    """Source of the samples, as the user named it."""
    samples: int
    """Number of samples."""
    tokens: int | None = None
    """Number of their tokens; None for images."""
    seed: int | None = None
    """Seed that chose the samples."""
    fingerprint: str | None = None
    """SHA-256 of the contents of the samples, in their order."""
    preprocessing: Mapping[str, Any] | None = None
    """What the image processor or the tokenizer did to a sample."""


@final
@dataclass(frozen=True, kw_only=True)
class RecoveryStep:
    """The losses at one step of training."""

    step: int
    """Optimizer steps done."""
    epoch: float
    """Epochs done."""
    seconds: float
    """Seconds spent."""
    learning_rate: float
    """Learning rate of the next step."""
    loss: float | None
    """Mean training loss since the last entry; None at the start, or if it is not finite."""
    held_out: float | None
    """Loss of the held-out samples; None if it is not finite."""


@final
@dataclass(frozen=True)
class BlockError:
    """Relative error of the output of one block, if blocks were reconstructed one by one."""

    block: int
    """From 0."""
    before: float | None
    """None if it is not finite."""
    after: float | None
    """Likewise."""


@final
@dataclass(frozen=True, kw_only=True)
class RecoveryRecord:
    """The training after compression. Losses are those of the held-out samples, in nats for probabilities."""

    objective: str
    """``distill`` or ``supervised``."""
    before: float
    """Loss before training."""
    after: float
    """Loss of the result."""
    best_step: int
    """The step whose state was kept."""
    ended: str
    """``done``, ``time``, ``early`` (nothing was gained any longer) or ``diverged``."""
    samples: int
    """Number of training samples."""
    held_out: int
    """Number of held-out samples."""
    seconds: float
    """Seconds spent."""
    settings: Mapping[str, Any]
    """Every setting of the training."""
    history: tuple[RecoveryStep, ...] = ()
    """Every evaluation of the held-out samples, with the start first."""
    blocks: tuple[BlockError, ...] = ()
    """Empty if blocks were not reconstructed."""
    familiar: bool = False
    """Whether the held-out samples had been calibrated on or trained on before; other views of them judged then."""


@final
@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the job ran on, and with. What is not known is left out."""

    python: IfSet[str] = None
    """Version."""
    torch: IfSet[str] = None
    """Version."""
    transformers: IfSet[str] = None
    """Version."""
    platform: IfSet[str] = None
    """Operating system and processor."""
    device: IfSet[str] = None
    """``cpu``, or the name of the GPU."""
    threads: IfSet[int] = None
    """Threads of torch on the CPU."""
    peak_memory: IfSet[int] = None
    """Bytes resident in the process, at most."""
    peak_device_memory: IfSet[int] = None
    """Bytes allocated on the GPU, at most."""
