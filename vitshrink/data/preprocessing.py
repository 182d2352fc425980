"""A checkpoint's own preprocessing: found, described, and applied to samples batch by batch."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BaseImageProcessor, PreTrainedTokenizerBase

from vitshrink.data.batches import BadSamples, Batch
from vitshrink.data.choice_encoder import ChoiceEncoder
from vitshrink.data.given import ReadyBatches
from vitshrink.data.image_encoder import ImageEncoder
from vitshrink.data.pair_encoder import PairEncoder
from vitshrink.data.question_encoder import QuestionEncoder
from vitshrink.data.recipes import Kind
from vitshrink.data.samples import SampleSet
from vitshrink.data.text_encoder import TextEncoder
from vitshrink.data.timm_transform import TimmTransform
from vitshrink.data.word_encoder import WordEncoder
from vitshrink.errors import CheckpointError, DataError, UsageError
from vitshrink.models.duals import FILLED
from vitshrink.models.example import text_config, text_length
from vitshrink.models.families import reads_any_size
from vitshrink.models.geometry import image_shape
from vitshrink.models.sentences import NO_SETTINGS, TextSettings
from vitshrink.models.timm import TIMM

_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TIMM_FILES: Mapping[str, tuple[str, ...]] = {TIMM: ("config.json",)}
"""Where transformers has the settings of an image processor by type of model, if elsewhere."""
_VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)


_TEXT_ENCODERS: Mapping[str | None, type[TextEncoder]] = {
    "token-classification": WordEncoder,
    "question-answering": QuestionEncoder,
    "multiple-choice": ChoiceEncoder,
}
"""By task, where a sample is more than a text or a pair."""


class Preprocessor:
    """The image processor or tokenizer of a checkpoint; never a default one, and timm's geometry only when asked for.

    ``description`` says what it does to a sample: figures of two evaluations can be compared only where it is the same.
    """

    def __init__(self, encoder: ImageEncoder | TextEncoder | PairEncoder | ReadyBatches) -> None:
        self._encoder = encoder
        self.kind: Kind = encoder.kind
        self.processor: Any = encoder.processor
        self.description: dict[str, Any] = encoder.description

    def identity(self) -> str:
        """SHA-256 of the processor or tokenizer itself, and of how it is used."""
        processor = self.processor
        if isinstance(processor, PreTrainedTokenizerBase):
            fast = getattr(processor, "backend_tokenizer", None)
            own = processor.get_vocab() if fast is None else json.loads(fast.to_str())
            own = {name: part for name, part in own.items() if name not in ("padding", "truncation")}  # set by each use
        else:
            own = {} if processor is None else json.loads(processor.to_json_string())
        return hashlib.sha256(json.dumps([self.description, own], sort_keys=True, default=str).encode()).hexdigest()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        kind: Kind,
        *,
        task: str | None = None,
        config: Any = None,
        max_length: int | None = None,
        style: Literal["checkpoint", "timm"] = "checkpoint",
        offline: bool = False,
        resolution: int | None = None,
    ) -> "Preprocessor":
        """The preprocessing that lies beside the weights, in a directory or on the Hub.

        ``task`` is what the head of the model is for, which may ask for more than the tokens of a text. ``config`` is
        that of the model in memory; it is read from the checkpoint where none is given. ``max_length`` in tokens takes
        the place of the checkpoint's own, within what tokenizer and model can take. The style ``timm``
        resizes and crops images as timm does, whose published accuracies are measured so. ``resolution`` in pixels
        takes the place of the size of its images, and what is resized before it is cropped is scaled along. Code in a
        checkpoint is never run.

        Raises:
            CheckpointError: the files are missing, damaged, need code of the checkpoint, or do not fit the model.
            UsageError: ``max_length`` is not one that the model can take, or a style that it has no use for.
        """
        if config is None:
            config = _load(AutoConfig.from_pretrained, path, offline, "configuration")
        if kind == "image-text":
            images = cls.from_checkpoint(
                path, "image", config=config, style=style, offline=offline, resolution=resolution
            )
            texts = cls.from_checkpoint(path, "text", config=config, max_length=max_length, offline=offline)
            return cls._of_pairs(images, texts, config)
        if kind == "image":
            _require(path, (*_IMAGE_PROCESSOR_FILES, *_TIMM_FILES.get(config.model_type, ())), "image processor")
            processor = _load(AutoImageProcessor.from_pretrained, path, offline, "image processor")
            if style != "checkpoint" and resolution is not None:
                raise UsageError(f"--preprocess {style} uses the image size of the model: remove --resolution.")
            if resolution is not None:
                _scale(processor, resolution, path)
            channels, height, width = _shape(processor, config)
            shape = (channels, height, width) if resolution is None else (channels, resolution, resolution)
            geometry = _timm_transform(path, height, width) if style == "timm" else None
            return cls(ImageEncoder(processor, geometry, shape, f"the image processor of {path}"))
        if style != "checkpoint":
            raise UsageError(f"--preprocess {style} is for images, but {path} reads text.")
        _require(path, _VOCABULARY_FILES, "tokenizer")
        tokenizer = _load(AutoTokenizer.from_pretrained, path, offline, "tokenizer", config=config)
        _check_vocabulary(path, tokenizer, config)
        settings = TextSettings.read(Path(path)) if Path(path).is_dir() else NO_SETTINGS
        return cls._of_texts(path, tokenizer, config, max_length, settings, task)

    @classmethod
    def _of_pairs(cls, images: "Preprocessor", texts: "Preprocessor", config: Any) -> "Preprocessor":
        assert isinstance(images._encoder, ImageEncoder)
        assert isinstance(texts._encoder, TextEncoder)
        filled = text_length(config) if config.model_type in FILLED else None
        return cls(PairEncoder(images._encoder, texts._encoder, filled))

    @classmethod
    def _of_texts(
        cls,
        path: str | Path,
        tokenizer: Any,
        config: Any,
        max_length: int | None,
        settings: TextSettings,
        task: str | None,
    ) -> "Preprocessor":
        length = _length(path, tokenizer, config, max_length, settings.max_length)
        encoder = _TEXT_ENCODERS.get(task, TextEncoder)
        return cls(encoder(tokenizer, length, lower_case=settings.lower_case, prompt=settings.prompt))

    @classmethod
    def of(
        cls,
        processor: Any,
        kind: Kind,
        config: Any,
        *,
        task: str | None = None,
        max_length: int | None = None,
        settings: TextSettings = NO_SETTINGS,
    ) -> "Preprocessor":
        """The preprocessing of an image processor or tokenizer in memory, for a model with this ``config``.

        ``settings`` are those of the sentence encoder that the model is.

        Raises:
            UsageError: it is none, or ``max_length`` is not one that the model can take.
            CheckpointError: a tokenizer with another vocabulary than the model.
        """
        if kind == "image-text":
            images, texts = cls.of(processor, "image", config), cls.of(processor, "text", config, max_length=max_length)
            return cls._of_pairs(images, texts, config)
        part = "image_processor" if kind == "image" else "tokenizer"
        processor = getattr(processor, part, processor)  # a processor of several modalities holds one for each
        if not isinstance(processor, BaseImageProcessor if kind == "image" else PreTrainedTokenizerBase):
            raise UsageError(
                f"processor: the model needs its {part.replace('_', ' ')}, not a {type(processor).__name__}."
            )
        if kind == "image":
            return cls(ImageEncoder(processor, shape=_shape(processor, config), name="processor"))
        _check_vocabulary("the model", processor, config)
        return cls._of_texts("the model", processor, config, max_length, settings, task)

    def windows(self, samples: SampleSet) -> SampleSet:
        """As they are read whole: long contexts of questions in windows, under one key."""
        return self._encoder.windows(samples) if isinstance(self._encoder, QuestionEncoder) else samples

    def batches(
        self,
        samples: SampleSet,
        batch_size: int,
        *,
        bad: BadSamples | None = None,
        workers: int | None = None,
        in_order: bool = False,
    ) -> Iterator[Batch]:
        """Batches of at most ``batch_size`` samples on the CPU.

        Samples that cannot be used go to ``bad``; without it the first one ends the reading, so that none is left out
        unseen. ``workers`` threads decode images ahead of the caller (as many as there are cores; 0: none). Texts come
        sorted by length in windows of some batches unless ``in_order``; keys and labels stay with their samples.

        Raises:
            DataError: more bad samples than allowed, no usable sample, or samples of the other kind.
        """
        if samples.kind != self.kind:
            raise DataError(f"{samples.source} contains {samples.kind} samples, but the model takes {self.kind}.")
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}.")
        bad = BadSamples(limit=0) if bad is None else bad
        empty = True
        encoder = self._encoder
        if isinstance(encoder, ImageEncoder):
            batches = encoder.batches(samples, batch_size, bad, workers)
        elif isinstance(encoder, PairEncoder):
            batches = encoder.batches(samples, batch_size, bad, workers, in_order)
        else:
            batches = encoder.batches(samples, batch_size, bad, in_order)
        for batch in batches:
            empty = False
            yield batch
        if empty:
            reasons = "".join(f" {key} {reason}." for key, reason in bad.reasons.items())
            raise DataError(f"{samples.source}: there is no usable sample.{reasons}")


def _shape(processor: Any, config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes; where that is any size, of those it is given."""
    shape = channels, height, width = image_shape(config)
    if reads_any_size(config.model_type):
        blank = Image.new("RGB", (width, height))
        pixels = processor(blank, return_tensors="np")["pixel_values"]
        shape = channels, *pixels.shape[-2:]
    return shape


def _scale(processor: Any, resolution: int, path: str | Path) -> None:
    """Make an image processor give images of ``resolution`` pixels. Raises UsageError where it cannot be told how."""
    settings = json.loads(processor.to_json_string())
    cropped = settings.get("do_center_crop") and settings.get("crop_size")
    final = settings.get("crop_size") if cropped else settings.get("size")
    side = final.get("height", final.get("shortest_edge")) if isinstance(final, dict) else final
    if not settings.get("do_resize") or not isinstance(side, int):
        raise UsageError(f"--resolution: the image processor of {path} does not say to which size it resizes.")
    for name in ("size", "crop_size"):
        entries = settings.get(name)
        if isinstance(entries, dict):
            scaled = {key: round(value * resolution / side) for key, value in entries.items() if value is not None}
            setattr(processor, name, type(getattr(processor, name))(**scaled))


def _require(path: str | Path, names: tuple[str, ...], what: str) -> None:
    """transformers builds a tokenizer without vocabulary from nothing but a config.json, so this looks first."""
    directory = Path(path)
    if directory.is_dir() and not any((directory / name).is_file() for name in names):
        raise CheckpointError(
            f"{path} has no {what}: there is no {' or '.join(names)}. "
            f"Copy the {what} files of the model it was fine-tuned from into it; a guess could be wrong unnoticed."
        )


def _load(loader: Callable[..., Any], path: str | Path, offline: bool, what: str, **options: Any) -> Any:
    try:
        return loader(str(path), local_files_only=offline, trust_remote_code=False, **options)
    except Exception as error:  # damaged files end in any exception: JSON, attributes, the tokenizers library's own
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error) or "custom code" in reason:
            reason = "it needs code from the checkpoint, which vitshrink never runs"
        raise CheckpointError(f"cannot read the {what} of {path}: {reason}") from error


def _timm_transform(path: str | Path, height: int, width: int) -> TimmTransform:
    if height != width:
        raise UsageError(f"--preprocess timm is for square images, but {path} takes {height} × {width} pixels.")
    return TimmTransform(height)


def _check_vocabulary(path: str | Path, tokenizer: Any, config: Any) -> None:
    size = getattr(text_config(config), "vocab_size", None)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CheckpointError(f"the tokenizer of {path} has no words: its vocabulary file is missing or empty.")
    if size is not None and len(tokenizer) > size:
        raise CheckpointError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, but the model has {size}: they do not belong "
            "together."
        )
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer of {path} has no padding token: name it in tokenizer_config.json.")


def _length(path: str | Path, tokenizer: Any, config: Any, wanted: int | None, own: int | None) -> int:
    """The maximum number of tokens, special ones included; ``own`` is that of a sentence encoder."""
    positions = text_length(config)
    longest = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if wanted is None:
        if own is not None:
            return min(own, positions or own)
        if longest > 10**9:  # what transformers puts where nothing is known
            raise UsageError(f"the maximum text length of {path} is unknown: pass --max-length.")
        return int(longest)
    if not tokenizer.num_special_tokens_to_add(pair=True) < wanted <= longest:
        raise UsageError(f"--max-length {wanted} is not possible: {path} takes at most {longest} tokens.")
    return wanted
