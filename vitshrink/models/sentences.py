"""How a checkpoint makes one vector of a sentence: the modules that sentence-transformers runs after the transformer.

``modules.json`` lists them, each with a folder for its settings and weights. What is computed here is what
sentence-transformers computes from the same directory; a module that is not known is named, and nothing replaces it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitshrink.errors import CheckpointError
from vitshrink.models.companions import SAFETENSORS, SETTINGS
from vitshrink.models.files import check_regular, read_json
from vitshrink.models.source import CONFIG, MODULES, STATE_DICT, Module, modules_of
from vitshrink.models.weights import read_tensors

MODEL_SETTINGS, TEXT_SETTINGS = SETTINGS
TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"

Vectors = dict[str, Tensor]
"""``token_embeddings`` (batch, tokens, width), ``sentence_embedding`` (batch, width) once there is one."""

Step = Callable[[Vectors, Tensor], Vectors]
"""From the vectors so far and the mask (batch, tokens) of the real tokens."""

OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Switches of older settings, in the order in which the vectors of several are put side by side."""


def masked_mean(features: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of features (n, tokens, width), mask (n, tokens) or None, to (n, width)."""
    if mask is None:
        return features.mean(1)
    weight = mask.to(features.dtype).unsqueeze(-1)
    return (features * weight).sum(1) / weight.sum(1).clamp_min(1)


def _first(tokens: Tensor, real: Tensor) -> Tensor:
    return tokens[torch.arange(len(tokens), device=tokens.device), real.int().argmax(1)]


def _last(tokens: Tensor, real: Tensor) -> Tensor:
    return _first(tokens.flip(1), real.flip(1))


def _largest(tokens: Tensor, real: Tensor) -> Tensor:
    return tokens.masked_fill(~real.unsqueeze(-1), -torch.inf).amax(1)


def _mean_root(tokens: Tensor, real: Tensor) -> Tensor:
    return masked_mean(tokens, real) * real.sum(1, keepdim=True).sqrt()


def _mean_by_place(tokens: Tensor, real: Tensor) -> Tensor:
    weights = (real.cumsum(1) * real).unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": masked_mean,
    "mean_sqrt_len_tokens": _mean_root,
    "weightedmean": _mean_by_place,
    "lasttoken": _last,
}

SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda first, second: torch.cosine_similarity(first, second, dim=-1),
    "dot": lambda first, second: (first * second).sum(-1),
    "euclidean": lambda first, second: -(first - second).norm(dim=-1),
    "manhattan": lambda first, second: -(first - second).abs().sum(-1),
}


@dataclass(frozen=True, eq=False)
class Embedding:
    """From the tokens of sentences to a vector for each, and from two vectors to their similarity."""

    steps: Sequence[Step] = field(default=(), repr=False)
    pooling: str = "mean (the default: there is no modules.json)"
    """The steps in words."""
    similarity: str = "cosine"
    width: int | None = None
    """Of a sentence's vector, where it is known; otherwise that of the tokens."""
    problem: str | None = None
    """Why vitshrink cannot compute it; it is then never called."""
    remarks: Sequence[str] = ()
    """What the checkpoint says of its sentences that has no effect here."""
    digest: str = ""
    """SHA-256 of the steps and their weights."""

    @property
    def known(self) -> bool:
        """Whether the checkpoint says how to make a vector of a sentence, so that nothing else counts in its model."""
        return bool(self.steps) and self.problem is None

    @classmethod
    def read(cls, directory: Path, width: int) -> "Embedding":
        """As a checkpoint directory describes it, whose tokens have ``width`` numbers; their mean by default.

        Raises CheckpointError where its files are damaged or contradict each other.
        """
        modules = modules_of(directory)
        if not modules:
            return MEAN
        settings, texts = (_settings(directory, name) for name in (MODEL_SETTINGS, TEXT_SETTINGS))
        similarity = settings.get("similarity_fn_name") or "cosine"
        try:
            _check_transformer(modules[0], texts)
            if not isinstance(similarity, str) or similarity not in SIMILARITIES:
                raise _UnknownError(f"{MODEL_SETTINGS} compares sentences by {similarity!r}")
            if not TextSettings.read(directory).prompt_is_pooled:
                raise _UnknownError("its default prompt is excluded from the pooling (include_prompt: false)")
            reader = _Reader(directory, {TOKENS: width})
            for module in modules[1:]:
                reader.add(module)
            if SENTENCE not in reader.widths:
                raise _UnknownError(f"{MODULES} has no Pooling")
        except _UnknownError as unknown:
            return cls(pooling="unknown", problem=f"{directory}: {unknown}")
        return cls(
            tuple(reader.steps),
            ", ".join(reader.words),
            similarity,
            reader.widths[SENTENCE],
            remarks=_remarks(settings, texts),
            digest=reader.digest(),
        )

    def __call__(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """tokens (batch, tokens, width), mask (batch, tokens) or None, to (batch, width)."""
        real = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        vectors: Vectors = {TOKENS: tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens}
        for step in self.steps:
            vectors = step(vectors, real.to(tokens.device))
        return vectors[SENTENCE] if self.steps else masked_mean(tokens, mask)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Similarities (batch,) of vectors (batch, width)."""
        return SIMILARITIES[self.similarity](first, second)


MEAN = Embedding()


@dataclass(frozen=True)
class TextSettings:
    """What a sentence encoder does to a text before it is tokenized, and how many tokens it takes."""

    max_length: int | None = None
    lower_case: bool = False
    prompt: str = ""
    """Stands before every text, where the checkpoint names one for all."""
    prompt_is_pooled: bool = True

    @classmethod
    def read(cls, directory: Path) -> "TextSettings":
        """As a checkpoint directory has it; nothing for one without modules.json. Raises CheckpointError."""
        modules = modules_of(directory)
        if not modules:
            return cls()
        model, texts = (_settings(directory, name) for name in (MODEL_SETTINGS, TEXT_SETTINGS))
        length, lower = texts.get("max_seq_length"), texts.get("do_lower_case") or False
        if length is not None and (type(length) is not int or length < 1):
            raise CheckpointError(f"{directory / TEXT_SETTINGS}: max_seq_length {length!r} is not a number of tokens.")
        if not isinstance(lower, bool):
            raise CheckpointError(f"{directory / TEXT_SETTINGS}: do_lower_case {lower!r} is neither true nor false.")
        prompts, name = model.get("prompts") or {}, model.get("default_prompt_name")
        prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else ""
        if not isinstance(prompts, dict) or not isinstance(prompt, str):
            raise CheckpointError(f"{directory / MODEL_SETTINGS}: its prompts have no text for the default {name!r}.")
        poolings = [_settings(directory, f"{each.folder}/{CONFIG}") for each in modules if _kind(each) == "Pooling"]
        pooled = all(pooling.get("include_prompt", True) for pooling in poolings)
        return cls(length, lower, prompt, pooled or not prompt)


NO_SETTINGS = TextSettings()


class _UnknownError(Exception):
    """Something that vitshrink cannot compute as sentence-transformers does."""


class _Reader:
    """Puts the steps together, module by module, and keeps track of how wide the vectors are."""

    def __init__(self, directory: Path, widths: dict[str, int]) -> None:
        self.directory = directory
        self.widths = widths
        self.steps: list[Step] = []
        self.words: list[str] = []
        self._hash = hashlib.sha256()

    def add(self, module: Module) -> None:
        """Raises _UnknownError for a module of another kind, CheckpointError for a damaged one."""
        kinds: dict[str | None, Callable[[str], None]] = {
            "Pooling": self._pooling,
            "Dense": self._dense,
            "LayerNorm": self._layer_norm,
            "Normalize": self._normalize,
            "Dropout": lambda _folder: None,  # does nothing outside training
        }
        kind = _kind(module)
        if kind not in kinds:
            raise _UnknownError(f"{MODULES} has a module of the type {module.type!r}, which vitshrink does not compute")
        kinds[kind](module.folder)

    def digest(self) -> str:
        """Of the steps and their weights so far."""
        self._hash.update("\x00".join(self.words).encode())
        return self._hash.hexdigest()

    def _pooling(self, folder: str) -> None:
        settings = self._config(folder, needed=True)
        old = tuple(name for key, name in OLD_POOLINGS.items() if settings.get(key))
        named = settings.get("pooling_mode", old or "mean")
        modes = (named,) if isinstance(named, str) else tuple(named) if isinstance(named, list | tuple) else ()
        for mode in modes or (named,):
            if not isinstance(mode, str) or mode not in POOLINGS:
                raise _UnknownError(f"{folder}/{CONFIG} pools by {mode!r}, which vitshrink does not compute")
        self.widths[SENTENCE] = len(modes) * self._width(folder, TOKENS)

        def pool(vectors: Vectors, real: Tensor) -> Vectors:
            parts = [POOLINGS[mode](vectors[TOKENS], real) for mode in modes]
            return vectors | {SENTENCE: torch.cat(parts, dim=-1)}

        self._step(" + ".join(modes), pool)

    def _dense(self, folder: str) -> None:
        settings, tensors = self._config(folder, needed=True), self._tensors(folder)
        source = settings.get("module_input_name", SENTENCE)
        width, target = self._width(folder, source), self._target(settings, source)
        weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
        residual = tensors.get("residual.weight") if settings.get("use_residual") else None
        if weight is None or weight.dim() != 2 or weight.shape[1] != width or (bias is not None and bias.dim() != 1):
            shape = None if weight is None else list(weight.shape)
            raise CheckpointError(
                f"{self.directory / folder}: linear.weight is {shape}, but its input vectors have {width} "
                "numbers: the folder is incomplete, or belongs to another model."
            )
        name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
        activation = _activation(name, folder)

        def project(vectors: Vectors, _real: Tensor) -> Vectors:
            given = vectors[source]
            made = activation(functional.linear(given, weight.to(given), None if bias is None else bias.to(given)))
            if settings.get("use_residual"):
                made = made + (given if residual is None else functional.linear(given, residual.to(given)))
            return vectors | {target: made}

        self.widths[target] = weight.shape[0]
        extra = ", residual" if settings.get("use_residual") else ""
        self._step(f"dense to {weight.shape[0]} ({type(activation).__name__}{extra})", project)

    def _layer_norm(self, folder: str) -> None:
        tensors, width = self._tensors(folder), self._width(folder, SENTENCE)
        weight, bias = tensors.get("norm.weight"), tensors.get("norm.bias")
        if weight is None or bias is None or weight.shape != (width,) or bias.shape != (width,):
            raise CheckpointError(f"{self.directory / folder} has no weights for a layer norm of {width} numbers.")

        def norm(vectors: Vectors, _real: Tensor) -> Vectors:
            given = vectors[SENTENCE]
            return vectors | {SENTENCE: functional.layer_norm(given, (width,), weight.to(given), bias.to(given))}

        self._step("layer norm", norm)

    def _normalize(self, folder: str) -> None:
        settings = self._config(folder)
        source = settings.get("module_input_name", SENTENCE)
        width, target = self._width(folder, source), self._target(settings, source)
        self.widths[target] = width
        self._step(
            "normalized",
            lambda vectors, _real: vectors | {target: functional.normalize(vectors[source], dim=-1)},
        )

    def _step(self, words: str, step: Step) -> None:
        self.words.append(words)
        self.steps.append(step)

    def _width(self, folder: str, name: Any) -> int:
        if not isinstance(name, str) or name not in self.widths:
            raise _UnknownError(f"{folder} reads {name!r}, which no module before it makes")
        return self.widths[name]

    def _target(self, settings: Mapping[str, Any], source: str) -> str:
        return str(settings.get("module_output_name") or source)

    def _config(self, folder: str, *, needed: bool = False) -> dict[str, Any]:
        name = f"{folder}/{CONFIG}"
        if needed and not (self.directory / name).exists():
            raise self._incomplete(folder, CONFIG)
        return _settings(self.directory, name)

    def _incomplete(self, folder: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.directory / MODULES} lists the module {folder}, which has no {name}: copy the folder as well, or "
            f"remove {MODULES} to use the transformer alone."
        )

    def _tensors(self, folder: str) -> dict[str, Tensor]:
        files = (self.directory / folder / name for name in (SAFETENSORS, STATE_DICT))
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise self._incomplete(folder, SAFETENSORS)
        check_regular(file, self.directory)
        tensors = {name: tensor.double() for name, tensor in read_tensors(file).items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{file}: {name} has values that are NaN or infinite: the file is damaged.")
            self._hash.update(tensor.contiguous().numpy().tobytes())
        return tensors


def _kind(module: Module) -> str | None:
    """The class of a module of sentence-transformers, whose own names for it have changed; None for another's."""
    return module.type.rpartition(".")[2] if module.type.startswith("sentence_transformers.") else None


def _settings(directory: Path, name: str) -> dict[str, Any]:
    """A file of settings, nothing where it is missing, as sentence-transformers takes it. Raises CheckpointError."""
    path = directory / name
    if not path.exists() and not path.is_symlink():
        return {}
    check_regular(path, directory)
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} contains no settings: it is damaged.")
    return settings


def _check_transformer(first: Module, texts: Mapping[str, Any]) -> None:
    """Raises _UnknownError where something else than the last hidden states is handed to the other modules."""
    if first.folder or _kind(first) != "Transformer":
        raise _UnknownError(
            f"{MODULES} starts with {first.type!r} in {first.folder!r}, not with the transformer beside it"
        )
    modality = texts.get("modality_config")
    text = modality.get("text") if isinstance(modality, dict) else None
    made = text.get("method_output_name") if isinstance(text, dict) else None
    if texts.get("module_output_name", TOKENS) != TOKENS or made not in (None, "last_hidden_state"):
        raise _UnknownError(
            f"{TEXT_SETTINGS} uses the output {made or texts['module_output_name']!r} of the transformer"
        )


def _activation(name: str, folder: str) -> nn.Module:
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        try:
            return kind().eval()
        except TypeError:
            pass  # needs to be told something, which no settings do
    raise _UnknownError(f"{folder}/{CONFIG} has the activation {name!r}, which vitshrink does not compute")


def _remarks(settings: Mapping[str, Any], texts: Mapping[str, Any]) -> tuple[str, ...]:
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    others = [str(name) for name, text in prompts.items() if text and name != default]
    remarks = [f"only the default prompt is used, not {', '.join(others)}"] if others else []
    ignored = [name for name in ("truncate_dim",) if settings.get(name)]
    ignored += [name for name in ("processing_kwargs", "query_expansion") if texts.get(name)]
    return (*remarks, *(f"{name} has no effect here" for name in ignored))
