"""The model families that vitshrink knows, their linear layers that may be factorized, and loading them."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from vitshrink.errors import CheckpointError, DependencyError, UsageError, VitshrinkError
from vitshrink.models.companions import Companions, companions_of
from vitshrink.models.duals import read_apart
from vitshrink.models.families import Family, family_named, family_of
from vitshrink.models.fidelity import PROBLEM_TYPES
from vitshrink.models.format import QUANT_METHOD
from vitshrink.models.readings import read_as
from vitshrink.models.sentences import MEAN, Embedding
from vitshrink.models.source import WRAPPERS, Source, examine, resolve
from vitshrink.models.tasks import Task, task_of
from vitshrink.models.whole_images import whole_images

FLASH = "flash_attention_2"
"""The attention that computes in half precision only, so that it serves training with mixed precision."""

HARMLESS = 2**24
"""Numbers that a parameter may have whatever is stored; a shape that does not fit is then named with both its sides."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory and where it came from."""

    model: PreTrainedModel
    source: Source
    """Its files, as they were examined once."""
    source_dtype: torch.dtype
    """Type of the weights on disk; in memory they are float32."""
    family: Family
    companions: Companions
    """The other files of the directory: which of them a result takes along."""
    embedding: Embedding = MEAN
    """How the checkpoint makes one vector of a sentence, where it has no head."""
    ignored: tuple[str, ...] = ()
    """Tensors of the checkpoint, outside the blocks, that the architecture does not use (a pooler, say)."""
    notes: tuple[str, ...] = ()
    """What was done to load it that a user should know of."""

    @property
    def directory(self) -> Path:
        return self.source.directory

    @property
    def task(self) -> Task:
        """What its head is for."""
        return task_of(self.model)


def embedding_of(directory: Path, model: PreTrainedModel) -> Embedding:
    """How the checkpoint in ``directory`` makes one vector of a sentence. Raises CheckpointError."""
    if task_of(model) != "features" or family_of(model).modality != "text":
        return MEAN
    return Embedding.read(directory, model.config.hidden_size)


def moved(
    model: PreTrainedModel, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model itself, on another device and in another type; transformers does not say what its ``to`` takes."""
    untyped: Any = model
    same: PreTrainedModel = untyped.to(device=device, dtype=dtype)
    return same


def held(model: PreTrainedModel, dtype: torch.dtype, origin: Path | None = None) -> LoadedModel:
    """A model that is in memory already, as if it had been loaded. Raises CheckpointError.

    ``dtype`` is the type of what it was made from, ``origin`` the directory with its files, where that is known.
    """
    directory = origin or Path(model.config._name_or_path or type(model).__name__)
    source = Source(directory, model.config.to_dict(), weights=(), tensors={})
    companions = Companions(directory) if origin is None else companions_of(origin)
    embedding = MEAN if origin is None else embedding_of(origin, model)
    read_as(model, embedding)
    read_apart(model)
    return LoadedModel(model, source, dtype, family_of(model), companions, embedding)


def load_dense(
    path_or_id: str | Path,
    *,
    offline: bool = False,
    revision: str | None = None,
    allow_compressed: bool = False,
    attention: str = "sdpa",
    warn: Callable[[str], object] = lambda _note: None,
) -> LoadedModel:
    """Load a checkpoint in float32 on the CPU, in evaluation mode, with the class that its config names.

    ``warn`` is told what was done that a user should know of: names of tensors that were changed, say.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, unsafe, unsupported, incomplete or compressed.
        UsageError: a revision was given for a local folder.
    """
    source = examine(resolve(path_or_id, offline=offline, revision=revision))
    if is_compressed(source) and not allow_compressed:
        raise CheckpointError(f"{source.directory} is already compressed by vitshrink: start from the original model.")
    loaded = load_source(source, dtype=torch.float32, attention=attention)
    for note in loaded.notes:
        warn(note)
    return loaded


def is_compressed(source: Source) -> bool:
    """Whether vitshrink wrote it. Raises CheckpointError when something else quantized it."""
    quantization = source.config.get("quantization_config")
    if not quantization:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"{source.directory} is already quantized ({method or quantization!r}): start from the original checkpoint."
        )
    return True


def load_source(source: Source, *, dtype: torch.dtype, attention: str = "sdpa") -> LoadedModel:
    """Load a checked checkpoint strictly: every weight of the model comes from the files, and is finite.

    ``attention`` is an implementation that transformers knows; what needs half precision waits until training.

    Raises:
        CheckpointError: the architecture is not supported, or weights are missing, of another shape, left
            over or not finite.
    """
    where = f"{source.directory / 'config.json'}"
    architectures = source.config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            f'{where} names no architecture: add the transformers class of the weights, such as "architectures": '
            '["BertModel"].'
        )
    family = family_named(source.config["model_type"], str(architectures[0]), where)
    depth = source.config.get("num_hidden_layers")
    if isinstance(depth, int) and depth > len(source.tensors):  # would be built before anything is compared
        raise CheckpointError(f"{where} describes {depth} blocks, more than the checkpoint has tensors: it is damaged.")
    check_config(source.config, where)
    companions = companions_of(source.directory, source.weights)
    options: dict[str, Any] = {}
    architecture = getattr(transformers, architectures[0])
    pooled = any("pooler." in name for name in source.tensors)
    if not pooled and "add_pooling_layer" in signature(architecture.__init__).parameters:
        options["add_pooling_layer"] = False  # saved without one: transformers would add a random pooler
    if source.config.get("output_attentions"):
        options["output_attentions"] = False  # nobody looks at them, and fast attention has none
    if not architecture._supports_sdpa:
        attention = "eager"
    _check_size(source, architecture, options, where)
    try:
        with quiet_transformers():
            model, info = architecture.from_pretrained(
                **_readable(source, architecture),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=source.safetensors,
                weights_only=True,
                attn_implementation="sdpa"
                if attention == FLASH
                else attention,  # otherwise the config may name a kernel to be fetched and run
                ignore_mismatched_sizes=True,  # reported below, with names and shapes
                output_loading_info=True,
                **options,
            )
    except (VitshrinkError, MemoryError):
        raise
    except Exception as error:  # from_pretrained raises whatever a contradictory config leads to
        raise CheckpointError(f"transformers cannot load {source.directory}: {_one_line(error)}") from error
    _check_complete(source, info, strict=is_compressed(source))
    model.config.name_or_path = str(source.directory)
    notes = (*source.notes, *usual_outputs(model), *whole_images(model))
    for parameter in model.parameters():
        # Out of the mapped file, which may be replaced while the model lives, and into aligned memory, on which
        # the order of summation may depend.
        parameter.data = parameter.data.clone()
    check_finite(model, f"{source.directory}")
    embedding = embedding_of(source.directory, model)
    read_as(model, embedding)
    read_apart(model)
    return LoadedModel(
        model.eval(),
        source,
        source_dtype=source.dtype,
        family=family,
        companions=companions,
        embedding=embedding,
        ignored=tuple(sorted(info["unexpected_keys"])),
        notes=notes,
    )


def _readable(source: Source, architecture: type[PreTrainedModel]) -> dict[str, Any]:
    """Where transformers finds the weights: in the files, or in memory where their names had to be changed."""
    if not source.wrappers and not source.nested:
        return {"pretrained_model_name_or_path": source.directory}
    config = _config_of(source, architecture)
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": source.read_tensors()}


def _config_of(source: Source, architecture: type[PreTrainedModel]) -> PreTrainedConfig:
    kind = architecture.config_class
    assert kind is not None  # families are of whole models
    return kind.from_dict(source.config | {"output_attentions": False})


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for entries that transformers takes, and that make a model which cannot be computed with,
    or computed with as it was trained."""
    if config.get("is_encoder_decoder") and not str((config.get("architectures") or [""])[0]).endswith("EncoderModel"):
        raise CheckpointError(
            f"{where} describes an encoder with a decoder, but vitshrink compresses only encoders. If "
            "transformers has a class for the encoder alone (such as T5EncoderModel), load it with that class "
            "and save it with save_pretrained."
        )
    for entry in ("is_decoder", "add_cross_attention"):
        if config.get(entry):
            raise CheckpointError(
                f"{where} has {entry}, but vitshrink compresses encoders, whose tokens see each other. If the "
                "model was trained as an encoder, remove the entry in a copy."
            )
    if (positions := config.get("position_embedding_type") or "absolute") != "absolute":
        raise CheckpointError(
            f"{where} has position_embedding_type {positions!r}, but transformers {transformers.__version__} "
            "computes 'absolute': the outputs would differ from those of the trained model."
        )
    for entry, known in (("hidden_act", ACT2FN), ("problem_type", PROBLEM_TYPES)):
        if (value := config.get(entry)) is not None and value not in list(known):  # may be of any type
            raise CheckpointError(f"{where} has {entry} {value!r}, which is not one of {', '.join(known)}.")
    for entry in ("image_size", "patch_size"):
        if isinstance(value := config.get(entry), list | tuple) and len(value) != 2:
            raise CheckpointError(f"{where} has {entry} {list(value)}: give the height and the width.")


def usual_outputs(model: PreTrainedModel) -> list[str]:
    """Make a model give its outputs by name and in one piece, in place. Returns what a user should know of it."""
    model.config.return_dict = True  # what asks for them by place gets the same
    notes = []
    chunked: list[Any] = [module for module in model.modules() if getattr(module, "chunk_size_feed_forward", 0)]
    for module in chunked:
        module.chunk_size_feed_forward = 0
    if chunked:
        notes.append(
            f"chunk_size_feed_forward {model.config.chunk_size_feed_forward} was switched off: it only saves "
            "memory, and it fails with text lengths that are not multiples of it."
        )
        model.config.chunk_size_feed_forward = 0
    return notes


def _check_size(source: Source, architecture: type[PreTrainedModel], options: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError where the config describes far more than the files hold, before memory is taken for it.

    Each side of a matrix is a side of something stored, factors and biases included; anything else is stored itself.
    """
    side = max(length for tensor in source.tensors.values() for length in (1, *tensor.shape))
    most = max(HARMLESS, side**2, *(tensor.numel for tensor in source.tensors.values()))
    labels = source.config.get("num_labels")
    if isinstance(labels, int) and labels > most:
        raise CheckpointError(
            f"{where} describes {labels} classes, more than the checkpoint has numbers: it is damaged."
        )
    try:
        with quiet_transformers(), torch.device("meta"):
            config = _config_of(source, architecture)
            # the config may name a kernel to be fetched and run
            config._attn_implementation = "sdpa" if architecture._supports_sdpa else "eager"
            model = architecture(config, **{k: v for k, v in options.items() if k != "output_attentions"})
    except MemoryError:
        raise
    except Exception as error:  # a constructor raises whatever a contradictory config leads to
        raise CheckpointError(
            f"transformers cannot build the model that {where} describes: {_one_line(error)}"
        ) from error
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise CheckpointError(f"{where} makes {name} {list(parameter.shape)}, which is empty.")
        if parameter.numel() > most:
            raise CheckpointError(
                f"{where} makes {name} {list(parameter.shape)}, far larger than anything in the weight files: "
                "the config or the weights are damaged, or do not belong together."
            )


def check_finite(model: nn.Module, where: str) -> None:
    """Raises CheckpointError naming the first parameter or buffer with NaN or Inf, and how many."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong:
            raise CheckpointError(
                f"{where}: {name} has {wrong} of {tensor.numel()} values that are NaN or infinite. "
                "The model was damaged in training or conversion: use another checkpoint."
            )


@contextmanager
def flash_attention(*models: PreTrainedModel) -> Iterator[None]:
    """Inside, the models use the kernels of FlashAttention 2, for training with mixed precision on a GPU."""
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.set_attn_implementation(FLASH)
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)


def require_attention(name: str, device: torch.device) -> None:
    """Raises DependencyError or UsageError where this attention cannot be computed, before any work."""
    if name != FLASH:
        return
    if device.type != "cuda":
        raise UsageError(f"--attention {FLASH} needs a CUDA device, and this is {device}: use --attention sdpa.")
    if not is_flash_attn_2_available():
        raise DependencyError(f"--attention {FLASH} needs flash-attn: pip install flash-attn, or use --attention sdpa.")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and load reports of transformers: what matters is raised as an error."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_complete(source: Source, info: Mapping[str, Any], *, strict: bool) -> None:
    problems = []
    if info["missing_keys"]:
        untied = source.config.get("tie_word_embeddings") is False and any("decoder" in n for n in info["missing_keys"])
        problems.append(
            f"it has no weights for {_listing(info['missing_keys'])}: "
            + (
                "its config has tie_word_embeddings false, so they need weights of their own"
                if untied
                else (
                    f"it was saved from another class than {source.config['architectures'][0]}, or its head was "
                    "never trained"
                )
            )
        )
        if wrapped := [name for name in info["unexpected_keys"] if name.startswith(WRAPPERS)]:
            problems.append(
                f"only some of its tensor names have the prefix of a wrapper ({_listing(wrapped)}): save the "
                "state dict of the inner model"
            )
    if info["mismatched_keys"]:
        shapes = (f"{name} ({list(there)} instead of {list(here)})" for name, there, here in info["mismatched_keys"])
        problems.append(f"shapes do not fit its config: {_listing(shapes)}")
    # A head or pooler that this architecture lacks may be left over. A tensor within the blocks may not: they
    # would compute something else than they were trained for.
    left = [name for name in info["unexpected_keys"] if strict or re.search(r"(^|\.)layers?\.\d+\.", name)]
    if left:
        problems.append(f"it has weights that the model does not use: {_listing(left)}")
    problems += info["error_msgs"]
    if problems:
        raise CheckpointError(f"cannot use {source.directory}: {'; '.join(problems)}.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _listing(names: Any, most: int = 6) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
