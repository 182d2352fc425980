"""What a job is: frozen, checked where it is built, read from flags or YAML, and written beside the result."""

import difflib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, get_args, get_origin

from vitshrink.config.names import is_portable, quoted, unportable
from vitshrink.config.written import Written, plain, read_yaml, truth, write_yaml
from vitshrink.errors import UsageError

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

DTYPES = ("float32", "float16", "bfloat16")

Layers = Literal["attention", "mlp", "all"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Objective = Literal["distill", "supervised"]
Trained = Literal["all", "factors"]
GAMMAS = (0.5, 0.25, 0.125)
"""Sizes of γ under BDIA, the published one first."""
Precision = Literal["auto", "no", "bf16", "fp16"]

Preprocessing = Literal["checkpoint", "timm"]

BOUNDS = ("max_changed", "max_kl", "max_error")
"""The entries that say how small by what may be lost."""
SIZES = ("keep", "target_params", "target_size", "rank", "explained_variance", *BOUNDS)
"""The entries that say how small; a job has exactly one of them."""

READ = {"read": True}
"""Marks an entry that names files, or a model on the Hub, which are read. Samples are known as ``DataConfig``."""

RENAMED = {"max_drop": "max_changed"}
"""Present names of entries of a job by the old ones. ``max_drop`` now is a gate alone: points of accuracy."""


def flag_of(name: str) -> str:
    """The flag of an entry: ``--target-params`` for ``target_params``."""
    return "--" + name.replace("_", "-")


def parse_quantity(text: str, flag: str) -> int:
    """``22M`` parameters or ``90MB`` bytes as a whole number. Raises UsageError."""
    match = _SIZE.fullmatch(str(text))
    number = int(Fraction(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if not number:
        raise UsageError(f"{flag}: cannot read {text!r}; write a number with k, M or G, such as 22M or 90MB.")
    return number


def share_of(share: float, total: int) -> int:
    """A part of ``total``, rounded down, with the share taken as it is written: 0.29 of 100 is 29."""
    return int(Fraction(str(share)) * total)


def quantized_bits(weights: str, activations: str | None) -> tuple[int, Literal["none", "dynamic"]]:
    """Bits of a weight and how activations are treated, by default the faster way. Raises UsageError."""
    if weights not in ("int8", "int4"):
        raise UsageError(f"weights cannot be stored as {weights!r}. {_did_you_mean(weights, ['int8', 'int4'])}")
    if activations not in (None, "none", "dynamic"):
        raise UsageError(f"--activations {activations}: {_did_you_mean(activations, ['none', 'dynamic'])}")
    if weights == "int4":
        if activations == "dynamic":
            raise UsageError("int4 weights are multiplied in floating point: leave --activations none.")
        return 4, "none"
    return 8, "none" if activations == "none" else "dynamic"


def parse_duration(text: str, flag: str) -> float:
    """``90``, ``90s``, ``30m`` or ``1.5h`` as seconds. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smh]?)\s*", text)
    if not match or float(match[1]) == 0:
        raise UsageError(f"{flag}: cannot read {text!r}; write a time such as 90s, 30m or 1.5h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _did_you_mean(name: str, available: list[str]) -> str:
    near = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Available: {', '.join(available)}."


def _require_portable(name: str, directory: str | None) -> None:
    if directory is not None and not is_portable(Path(directory)):
        raise UsageError(f"{flag_of(name)}: {unportable(Path(directory))}")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from, and how to read them."""

    source: str
    split: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    labels: str | None = None
    """File with the classes of a flat folder of images."""
    flags: str = "--"
    """How the flags begin that name the columns."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a compressed model is trained to recover: the flags of ``finetune``, the options of ``compress --finetune``.

    ``distill`` needs no labels: the dense model's answers are the targets. What is None depends on the objective.
    """

    objective: Objective = "distill"
    data: str | None = None
    """Samples to train on, other than those of the calibration."""
    split: str | None = None
    samples: int | None = None
    epochs: float | None = None
    """None: as many as ``minutes`` allow, or else a usual number."""
    minutes: float | None = None
    learning_rate: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    validation: float = 0.1
    """Part of the samples that is held out to choose the best state."""
    patience: int = 4
    """Evaluations without a gain after which training stops."""
    blockwise: int = 0
    """Epochs of block-wise reconstruction before the whole model is trained."""
    train: Trained = "all"
    augment: bool = True
    mixing: float | None = None
    """Part of the images that are blended with another; None: a usual one in distillation without ``views``."""
    views: int | None = None
    """Different augmentations of a sample, so that the dense model's answers are kept; None: new ones in each epoch."""
    features: float | None = None
    """Weight of what the blocks hand on; None: a usual one where the dense model is asked and blocks are comparable."""
    temperature: float = 1.0
    distillation: float | None = None
    """Share of the dense model's answers in the supervised objective."""
    label_smoothing: float = 0.1
    decatt: float = 0.0
    bdia: bool = False
    reversible: bool = False
    gamma: float = GAMMAS[0]
    """Size of γ under ``bdia`` and ``reversible``, a power of two."""
    momentum: bool = False
    """γ of one sign: a momentum residual network."""
    gradient_checkpointing: bool = False
    precision: Precision = "auto"
    checkpoints: str | None = None
    """A directory that keeps the state of training, from which a killed job goes on."""

    def __post_init__(self) -> None:
        for name, known in (("objective", Objective), ("train", Trained), ("precision", Precision)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise UsageError(
                    f"finetune: {name} {value!r} is unknown. {_did_you_mean(value, list(get_args(known)))}"
                )
        for name in ("epochs", "minutes", "learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"finetune: {name} {value} must be above 0.")
        for name in ("samples", "batch_size", "accumulation", "patience", "views"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"finetune: {name} {value} must be at least 1.")
        for name in ("features", "decatt", "blockwise"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"finetune: {name} {value} must not be negative.")
        for name in ("mixing", "distillation", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"finetune: {name} {value} is a share: give a number from 0 to 1.")
        _require_portable("checkpoints", self.checkpoints)
        if not 0 < self.validation < 1:
            raise UsageError(f"finetune: validation {self.validation} is the part held out: above 0 and below 1.")
        if self.mixing and self.objective != "distill":
            raise UsageError("finetune: mixing blends images of different labels: it is for the objective distill.")
        if self.gamma not in GAMMAS:
            raise UsageError(f"finetune: gamma {self.gamma}: choose one of {', '.join(map(str, GAMMAS))}.")
        if (self.momentum or self.gamma != GAMMAS[0]) and not (self.bdia or self.reversible):
            raise UsageError("finetune: gamma and momentum belong to bdia and reversible: add one of these.")
        if self.reversible and self.gradient_checkpointing:
            raise UsageError("finetune: reversible already recomputes activations: leave gradient_checkpointing out.")
        if self.features and (self.bdia or self.reversible):
            raise UsageError("finetune: bdia and reversible change what blocks hand on: leave features out.")
        if self.reversible and self.decatt:
            raise UsageError("finetune: decatt reads activations that reversible does not keep: choose one, or bdia.")

    def of_size(self, label: str) -> "FinetuneConfig":
        """The same for one of several sizes, each with checkpoints of its own."""
        return self if self.checkpoints is None else replace(self, checkpoints=str(Path(self.checkpoints) / label))


@dataclass(frozen=True)
class CompressConfig:
    """Everything ``compress`` needs to know; the field names are the flags and the keys of a recipe.

    Exactly one size: ``keep`` (fractions of the whole model's parameters; several give several outputs),
    ``target_params``, ``target_size``, ``rank``, ``explained_variance`` (the share that every layer keeps of its energy
    in the method's metric), or the smallest that keeps a bound on held-out calibration samples:
    ``max_changed``, percent of the predictions, which differ from the dense model's, ``max_kl``, nats, or, for scores
    and features, ``max_error``, the squared error as a share of their spread.
    """

    model: str = field(metadata=READ)
    output: str
    method: str = "curvature"
    allocation: str | None = None
    compensation: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: tuple[float, ...] = ()
    target_params: str | None = None
    target_size: str | None = None
    rank: int | None = None
    explained_variance: float | None = None
    max_changed: float | None = None
    max_kl: float | None = None
    max_error: float | None = None
    finetune: FinetuneConfig | None = None
    attention: Attention = "sdpa"
    rank_multiple: int = 1
    storage: Literal["auto", "gauge", "factors"] = "auto"
    quantize: str | None = None
    activations: str | None = None
    probes: int = 1
    refine: int = 2
    precision: Precision = "auto"
    cache: str | None = None
    layers: Layers = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tokens: Literal["all", "mixed"] = "all"
    token_budget: int | None = None
    token_levels: int = 2
    token_scorer: str = "blur"
    resolution: int | None = None
    landmarks: int | None = None
    landmark_form: str = "pooled"
    calibration: str | None = None
    calibration_split: str | None = None
    samples: int = 512
    holdout: int = 64
    max_length: int | None = None
    batch_size: int = 32
    eval: str | None = None
    eval_split: str | None = None
    eval_limit: int | None = None
    eval_image_column: str | None = None
    eval_text_column: str | None = None
    eval_text_pair_column: str | None = None
    eval_label_column: str | None = None
    eval_labels: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    class_map: str | None = field(default=None, metadata=READ)
    max_bad_samples: int | None = None
    preprocess: Preprocessing = "checkpoint"
    workers: int | None = None
    latency: tuple[int, ...] = (1,)
    thumbnails: bool = False
    seed: int = 0
    save_every: float = 30.0
    device: str = "auto"
    dtype: str | None = None
    offline: bool = False
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        sizes = [flag_of(name) for name in SIZES if getattr(self, name) not in (None, ())]
        check_approximations({name: getattr(self, name) for name in APPROXIMATIONS})
        others = {"--tokens mixed": self.token_budget, "--landmarks": self.landmarks}
        approximated = [flag for flag, number in others.items() if number is not None]
        if approximated and set(map(flag_of, BOUNDS)) & set(sizes):
            raise UsageError(f"{sizes[0]} searches the size of the weights: with {approximated[0]} ask for a size.")
        if len(sizes) != 1 and (sizes or not approximated):
            given = f"{' and '.join(sizes)} were given" if sizes else "none was"
            known = ", ".join(map(flag_of, SIZES))
            raise UsageError(f"say how small: exactly one of {known}, such as --keep 0.6; {given}.")
        for name in ("target_params", "target_size"):
            if getattr(self, name) is not None:
                parse_quantity(getattr(self, name), flag_of(name))
        for keep in self.keep:
            if not (math.isfinite(keep) and 0 < keep < 1):
                raise UsageError(
                    f"--keep {keep}: give the fraction of the model's parameters to keep, above 0 and below 1."
                )
        if len(set(self.keep)) != len(self.keep):
            raise UsageError("--keep: the same fraction was given twice.")
        if self.explained_variance is not None and not 0 < self.explained_variance < 1:
            raise UsageError(
                f"--explained-variance {self.explained_variance}: give the share of its energy that every layer "
                "keeps, above 0 and below 1."
            )
        for name, most, what in (
            ("max_changed", 100, "the percentage of predictions that may change"),
            ("max_kl", math.inf, "nats that may be lost"),
            ("max_error", 1, "the squared error, as a share of the spread of the dense model's answers"),
        ):
            bound = getattr(self, name)
            if bound is None:
                continue
            if not (math.isfinite(bound) and 0 <= bound <= most):
                raise UsageError(f"{flag_of(name)} {bound}: give {what}, such as {flag_of(name)} {min(1, most / 100)}.")
            if self.calibration is None or self.holdout == 0:
                raise UsageError(
                    f"{flag_of(name)} is judged on held-out calibration samples: pass --calibration, not --holdout 0."
                )
        for name in (
            "rank",
            "rank_multiple",
            "token_budget",
            "token_levels",
            "resolution",
            "landmarks",
            "probes",
            "samples",
            "batch_size",
            "eval_limit",
            "max_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag_of(name)} {value}: must be at least 1.")
        if self.rank is not None and self.rank % self.rank_multiple:
            above = self.rank + -self.rank % self.rank_multiple
            below = f"--rank {above - self.rank_multiple} or " if above > self.rank_multiple else ""
            raise UsageError(
                f"--rank {self.rank} is no multiple of --rank-multiple {self.rank_multiple}: "
                f"give {below}--rank {above}, or leave --rank-multiple out."
            )
        if not self.latency or min(self.latency) < 1:
            raise UsageError(f"--latency {min(self.latency, default='')}: give batch sizes, which are at least 1.")
        for name in ("refine", "holdout", "max_bad_samples", "workers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{flag_of(name)} {value}: must not be negative.")
        if not (math.isfinite(self.save_every) and self.save_every >= 0):
            raise UsageError(f"--save-every {self.save_every}: give seconds, such as 60.")
        _require_portable("cache", self.cache)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: not a type to save in. {_did_you_mean(self.dtype, list(DTYPES))}")
        if self.storage not in ("auto", "gauge", "factors"):
            raise UsageError(f"--storage {self.storage}: {_did_you_mean(self.storage, ['auto', 'gauge', 'factors'])}")
        if self.quantize is None and self.activations is not None:
            raise UsageError("--activations says how a quantised model computes: pass --quantize int8 as well.")
        if self.quantize is not None:
            quantized_bits(self.quantize, self.activations)
        if self.precision not in ("auto", "no", "bf16"):
            raise UsageError(
                f"--precision {self.precision}: gradients of samples need the range of float32, which fp16 has not. "
                f"{_did_you_mean(self.precision, ['auto', 'no', 'bf16'])}"
            )
        if self.preprocess not in get_args(Preprocessing):
            styles = list(get_args(Preprocessing))
            raise UsageError(f"--preprocess {self.preprocess}: unknown. {_did_you_mean(self.preprocess, styles)}")
        for name, choices in (("layers", get_args(Layers)), ("attention", get_args(Attention))):
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"{flag_of(name)} {value}: unknown. {_did_you_mean(value, list(choices))}")

    @property
    def sized(self) -> bool:
        """Whether the weights are to get smaller; fewer tokens or landmarks alone leave them as they are."""
        return any(getattr(self, name) not in (None, ()) for name in SIZES)

    @property
    def size(self) -> str:
        """What is asked for, as a table says it: ``keep 0.5``, ``landmarks 49``."""
        asked = {name: getattr(self, name) for name in (*SIZES, "token_budget", "landmarks")}
        values = {name: value if isinstance(value, tuple) else (value,) for name, value in asked.items()}
        return ", ".join(
            f"{name} {entry}" for name, entries in values.items() for entry in entries if entry is not None
        )

    @property
    def counts_bytes(self) -> bool:
        """Whether ranks are chosen by the bytes of the file, because its weights are integers of several widths."""
        asked = (getattr(self, name) for name in ("target_size", *BOUNDS))
        return self.quantize is not None and any(size is not None for size in asked)

    @property
    def calibration_data(self) -> DataConfig | None:
        if self.calibration is None:
            return None
        columns = (self.image_column, self.text_column, self.text_pair_column, self.label_column)
        return DataConfig(self.calibration, self.calibration_split, *columns)

    @property
    def eval_data(self) -> DataConfig | None:
        if self.eval is None:
            return None
        columns = (
            self.eval_image_column,
            self.eval_text_column,
            self.eval_text_pair_column,
            self.eval_label_column,
            self.eval_labels,
        )
        return DataConfig(self.eval, self.eval_split, *columns, flags="--eval-")

    @property
    def finetune_data(self) -> DataConfig | None:
        if self.finetune is None or self.finetune.data is None:
            return None
        columns = (self.image_column, self.text_column, self.text_pair_column, self.label_column)
        return DataConfig(self.finetune.data, self.finetune.split, *columns)

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any], where: str = "the recipe") -> Self:
        """Build from flags or YAML keys, also old ones. Raises UsageError that names the entry, and the nearest one."""
        values = _values(cls, renamed(entries, where), where)
        for required, what in (("model", "the checkpoint to compress"), ("output", "the directory to write")):
            if not values.get(required):
                raise UsageError(
                    f"{where}: {required!r}, {what}, is missing, as in `vitshrink compress ./model ./small --keep 0.6`."
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every entry as plain data, so that a later version with other defaults does the same."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def to_yaml(self) -> str:
        """The recipe: what ``--config`` reads."""
        return write_yaml(self.to_dict())

    def command(self) -> str:
        """The command line that does the same: what differs from the defaults, as flags."""
        words = ["vitshrink", "compress", *map(_positional, (self.model, self.output))]
        # a data recipe has defaults of its own
        said = ("samples", "seed") if re.search(r"\.ya?ml(:|$)", self.calibration or "") else ()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("model", "output") or (value in (f.default, (), {}) and f.name not in said):
                continue
            if isinstance(value, FinetuneConfig):
                words += [flag_of(f.name), value.objective]
                for option in fields(value)[1:]:
                    if getattr(value, option.name) != option.default:
                        words += ["--finetune-option", f"{option.name}={_option(getattr(value, option.name))}"]
            elif isinstance(value, bool):
                words.append(flag_of(f.name))
            elif isinstance(value, Mapping):
                words += [word for key, entry in value.items() for word in ("--option", f"{key}={_option(entry)}")]
            else:
                items = value if isinstance(value, tuple) else (value,)
                words += [word for item in items for word in (flag_of(f.name), str(item))]
        return " ".join(map(quoted, words))


def holds(name: str, kind: type) -> bool:
    """Whether an entry of a job may be None (``NoneType``), a ``list``, or a ``dict`` of entries of its own."""
    found = next((f.type for f in fields(CompressConfig) if f.name == name), None)
    allowed = get_args(found) if get_origin(found) is UnionType else (found,)
    if kind is dict:
        return any(entry is FinetuneConfig or get_origin(entry) is Mapping for entry in allowed)
    return any((get_origin(entry) is tuple) if kind is list else entry is kind for entry in allowed)


APPROXIMATIONS = ("tokens", "token_budget", "token_levels", "token_scorer", "landmarks", "landmark_form")
"""Entries about fewer tokens and landmarks, with which a model runs whatever its weights are."""


def check_approximations(entries: Mapping[str, Any]) -> None:
    """Raises UsageError where those of ``APPROXIMATIONS`` contradict each other, or would make no difference."""
    tokens, mixed = entries["tokens"], entries["tokens"] == "mixed"
    if tokens not in ("all", "mixed"):
        raise UsageError(f"--tokens {tokens}: {_did_you_mean(tokens, ['all', 'mixed'])}")
    if mixed is not (entries["token_budget"] is not None):
        raise UsageError("--tokens mixed and --token-budget, the patches of an image, go together.")
    if mixed and entries["landmarks"] is not None:
        raise UsageError("--landmarks are means over a grid of patches, and --tokens mixed is no grid: choose one.")
    for name, needed, there in (
        ("token_levels", "--tokens mixed", mixed),
        ("token_scorer", "--tokens mixed", mixed),
        ("landmark_form", "--landmarks", entries["landmarks"] is not None),
    ):
        if not there and entries[name] != getattr(CompressConfig, name):
            raise UsageError(f"{flag_of(name)} {entries[name]} makes no difference without {needed}: pass both.")


@dataclass(frozen=True)
class FinetuneJob:
    """Everything ``finetune`` needs to know; the names are the flags, those of ``finetune`` among them."""

    model: str
    output: str
    finetune: FinetuneConfig
    teacher: str | None = None
    eval: str | None = None
    eval_split: str | None = None
    eval_limit: int | None = None
    eval_image_column: str | None = None
    eval_text_column: str | None = None
    eval_text_pair_column: str | None = None
    eval_label_column: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    class_map: str | None = None
    max_length: int | None = None
    max_bad_samples: int | None = None
    seed: int = 0
    attention: Attention = "sdpa"
    device: str = "auto"
    dtype: str | None = None
    offline: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.finetune.data is None:
            raise UsageError("--data is missing: samples to train on, as a folder, a file, a recipe or a Hub data set.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: not a type to save in. {_did_you_mean(self.dtype, list(DTYPES))}")
        if self.attention not in get_args(Attention):
            known = list(get_args(Attention))
            raise UsageError(f"--attention {self.attention}: unknown. {_did_you_mean(self.attention, known)}")

    @property
    def data(self) -> DataConfig | None:
        if self.finetune.data is None:
            return None
        columns = (self.image_column, self.text_column, self.text_pair_column, self.label_column)
        return DataConfig(self.finetune.data, self.finetune.split, *columns)

    @property
    def eval_data(self) -> DataConfig | None:
        if self.eval is None:
            return None
        columns = (
            self.eval_image_column,
            self.eval_text_column,
            self.eval_text_pair_column,
            self.eval_label_column,
        )
        return DataConfig(self.eval, self.eval_split, *columns, flags="--eval-")

    @classmethod
    def from_mapping(cls, entries: Mapping[str, Any], where: str = "the recipe") -> Self:
        """Build from flags or YAML keys; those of training may stand beside the others. Raises UsageError."""
        own = {f.name for f in fields(cls)}
        nested = entries.get("finetune") or {}
        training = dict(nested) if isinstance(nested, Mapping) else {"objective": nested}
        outer: dict[str, Any] = {}
        for key, value in entries.items():
            name = str(key).replace("-", "_")
            if name in {f.name for f in fields(FinetuneConfig)} and name not in own:
                training[name] = value
            elif name != "finetune":
                outer[name] = value
        for required, what in (("model", "the compressed checkpoint"), ("output", "the directory to write")):
            if not outer.get(required):
                raise UsageError(
                    f"{where}: {required!r}, {what}, is missing, as in "
                    "`vitshrink finetune ./small ./recovered --teacher ./model --data ./photos`."
                )
        return cls(**_values(cls, outer | {"finetune": training}, where))

    def to_dict(self) -> dict[str, Any]:
        """Every entry as plain data."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The recipe: what ``--config`` reads."""
        return write_yaml(self.to_dict())

    def command(self) -> str:
        """The command line that does the same: what differs from the defaults, as flags."""
        words = ["vitshrink", "finetune", *map(_positional, (self.model, self.output))]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("model", "output") or value == entry.default:
                continue
            if isinstance(value, FinetuneConfig):
                for option in fields(value):
                    setting = getattr(value, option.name)
                    if setting != option.default:
                        words += _flag(option.name, setting)
            else:
                words += _flag(entry.name, value)
        return " ".join(map(quoted, words))


def _positional(path: str) -> str:
    """A path that is not taken for a flag."""
    return f"./{path}" if path.startswith("-") else path


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag_of(name) if value else "--no-" + flag_of(name)[2:]]
    return [flag_of(name), str(value)]


def _option(value: Any) -> str:
    """As ``--option name=value`` reads it: JSON, a string as it is where that reads back as the same."""
    return value if isinstance(value, str) and parse_option(value) == value else json.dumps(value)


def parse_option(text: str) -> Any:
    """The value in ``--option name=value``: JSON where it is, otherwise the string."""
    try:
        return json.loads(text, parse_float=Written)
    except json.JSONDecodeError:
        return text


def read_recipe(path: Path) -> dict[str, Any]:
    """The entries of a YAML recipe. Raises UsageError when it is missing or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}.") from error
    try:
        entries = read_yaml(text)
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"{path} must hold entries such as 'method: whitened', one a line.")
    return entries


def warn_of_old_name(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=3)


def renamed(entries: Mapping[str, Any], where: str, warn: Callable[[str], None] = warn_of_old_name) -> dict[str, Any]:
    """Entries of a job by their present names; warns of an old name that says something.

    Raises UsageError for an entry under both of its names.
    """
    found = {key: value for key, value in entries.items() if str(key).replace("-", "_") not in RENAMED}
    present = {str(key).replace("-", "_") for key, value in found.items() if value is not None}
    for old, new in RENAMED.items():
        for key in (old, old.replace("_", "-")):
            if entries.get(key) is None:  # as in the recipe of an old result
                continue
            if new in present:
                raise UsageError(f"{where}: {key!r} is the old name of {new!r}, which is given too: leave it out.")
            warn(
                f"{where}: {key!r} is the old name of {new!r}, the percentage of predictions that may change: "
                f"write {new!r} or {flag_of(new)}. The gate {old!r} of eval and sweeps is points of accuracy."
            )
            found[new] = entries[key]
    return found


def _values(cls: type[Any], entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries in the types of the fields of a dataclass. Raises UsageError for one that it does not have."""
    known = {f.name: f for f in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"{where}: unknown entry {key!r}. {_did_you_mean(name, list(known))}")
        values[name] = _fitting(value, known[name].type, f"{where}: {key}")
    return values


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _fitting(value: Any, kind: Any, where: str) -> Any:
    """``value`` in the type of its field; YAML and flags give lists for tuples and numbers for strings."""
    allowed = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if value is None and NoneType in allowed:
        return None
    if FinetuneConfig in allowed:
        if isinstance(value, FinetuneConfig):
            return value
        entries = value if isinstance(value, Mapping) else {"objective": value}
        return FinetuneConfig(**_values(FinetuneConfig, entries, where))
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_fitting(item, get_args(kind)[0], where) for item in items)
    if get_origin(kind) is Mapping:
        if isinstance(value, Mapping):
            return {str(key): plain(entry) for key, entry in value.items()}
        raise UsageError(f"{where}: {value!r} does not fit; expected entries of name and value.")
    if bool in allowed or isinstance(value, bool):
        if isinstance(truth(value), bool) and bool in allowed:
            return truth(value)
    elif int in allowed:
        with suppress(ValueError):
            if isinstance(value, str):
                return int(value, 0)  # 0x10 and 1_000, which YAML may hold
            if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
                return int(value)
    elif float in allowed:
        with suppress(OverflowError):
            if isinstance(value, int | float):
                return float(value)
    elif isinstance(value, str | int | float):
        return str(value)
    expected = " or ".join(_KINDS.get(entry, str(entry)) for entry in allowed if entry is not NoneType)
    raise UsageError(f"{where}: {value!r} does not fit; expected {expected}.")
