"""Tiny models of the real architectures, with random but reproducible weights, and the files beside them.

``build(name)`` gives a model in memory, ``write(name, directory)`` a complete Hugging Face directory. Names
are the architectures' class names, as in ``config.json``.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedModel

from vitshrink.compression.effort import DEFAULT
from vitshrink.models.structures.low_rank import LowRankLinear

REFINES_ALWAYS = replace(DEFAULT, light=0.0)
"""An effort for which no cut is light: tiny models of random weights lose little."""

IMAGE_SIZE = 32
IMAGE_CLASSES = ("bird", "cat", "dog", "fish")
TEXT_CLASSES = ("negative", "positive")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
WORDS = ("a", "and", "bad", "film", "good", "is", "it", "not", "of", "so", "that", "the", "this", "was")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-")
VOCABULARY = tuple(dict.fromkeys((*SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS)))

_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_IMAGE = {"image_size": IMAGE_SIZE, "patch_size": 8}
_TEXT = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 64}

_LABELS = {"BertForSequenceClassification": TEXT_CLASSES, "BertForTokenClassification": TAGS}

IMAGE_CLASSIFIERS = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)
IMAGE_MODELS = (*IMAGE_CLASSIFIERS, "ViTModel", "DeiTModel")
TEXT_MODELS = ("BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM", "BertModel")
ARRANGED_MODELS = ("BertForQuestionAnswering", "BertForMultipleChoice")
"""Whose samples are more than running text."""
ARCHITECTURES = (*IMAGE_MODELS, *TEXT_MODELS)
PLAIN = tuple(name for name in ARCHITECTURES if name != "BertForTokenClassification")
"""Those that read an image or a text, and one label."""


def build(name: str, seed: int = 0, **entries: Any) -> PreTrainedModel:
    """The architecture ``name`` in evaluation mode: 2 blocks, hidden 32, no weight left at zero or one.

    ``entries`` of the config take the place of these.
    """
    labels = _LABELS.get(name, IMAGE_CLASSES)
    config_class = getattr(transformers, name.partition("For")[0].removesuffix("Model") + "Config")
    config = config_class(
        **_BLOCKS
        | (_TEXT if name in (*TEXT_MODELS, *ARRANGED_MODELS) else _IMAGE)
        | {
            "initializer_range": 0.1,
        }
        | ({} if name in ARRANGED_MODELS else _named(labels))
        | entries
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _named(labels: tuple[str, ...]) -> dict[str, Any]:
    indices = {label: index for index, label in enumerate(labels)}
    return {"id2label": dict(enumerate(labels)), "label2id": indices}


def write(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **entries: Any) -> Path:
    """A complete checkpoint directory: weights, config, and the image processor or tokenizer that belongs to it."""
    model = build(name, seed, **entries).to(dtype)
    model.save_pretrained(directory)
    if name in (*TEXT_MODELS, *ARRANGED_MODELS):
        write_tokenizer(directory)
    else:
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        write_processor(directory, height, width, model.config.num_channels)
    return directory


def write_processor(directory: Path, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, channels: int = 3) -> None:
    """The preprocessor_config.json of a ViT: squash to 32 × 32, scale to [-1, 1]."""
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def write_tokenizer(directory: Path) -> None:
    """A WordPiece tokenizer that spells any lower-case text: vocab.txt, tokenizer.json and its config."""
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    tokenizer().save_pretrained(directory)


def tokenizer(model_max_length: int = 64) -> transformers.BertTokenizer:
    """WordPiece over ``VOCABULARY``."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=model_max_length)


def write_sentence_encoder(directory: Path, *modules: tuple[str, dict[str, object], torch.nn.Module | None]) -> Path:
    """A BertModel with the modules of sentence-transformers after it: kinds, settings and what holds their weights."""
    write("BertModel", directory)
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (kind, settings, weights) in enumerate(modules, 1):
        folder = f"{number}_{kind.rpartition('.')[2]}"
        full = kind if "." in kind else f"sentence_transformers.models.{kind}"
        entries.append({"idx": number, "name": str(number), "path": folder, "type": full})
        (directory / folder).mkdir()
        (directory / folder / "config.json").write_text(json.dumps(settings))
        if weights is not None:
            save_file(weights.state_dict(), directory / folder / "model.safetensors")
    (directory / "modules.json").write_text(json.dumps(entries))
    return directory


def inputs(name: str, batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pixels (batch, 3, 32, 32), or tokens and attention mask (batch, 10) with the last row padded."""
    generator = torch.Generator().manual_seed(seed)
    if name in IMAGE_MODELS:
        return {"pixel_values": torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    tokens = torch.randint(len(SPECIAL_TOKENS), len(VOCABULARY), (batch, 10), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[-1, 6:], mask[-1, 6:] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def low_rank(linear: torch.nn.Linear, rank: int) -> LowRankLinear:
    """The best rank-``rank`` approximation of a layer, by SVD of its weight."""
    U, S, Vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    bias = None if linear.bias is None else linear.bias.detach()
    return LowRankLinear.from_factors(U[:, :rank] * S[:rank], Vh[:rank], bias, dtype=linear.weight.dtype)


def write_images(directory: Path, count: int, seed: int = 0) -> Path:
    """``count`` small random RGB images of differing sizes, as PNG. Returns ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        height, width = generator.integers(24, 48, size=2)
        pixels = generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{index:03d}.png")
    return directory


def write_text(path: Path, lines: int, seed: int = 0) -> Path:
    """A text file of ``lines`` random sentences of 3 to 12 known words. Returns ``path``."""
    generator = np.random.default_rng(seed)
    sentences = (" ".join(generator.choice(WORDS, size=generator.integers(3, 13))) for _ in range(lines))
    path.write_text("\n".join(sentences) + "\n")
    return path


def loads_without_vitshrink(directory: Path) -> str:
    """What a ViT's ``from_pretrained`` says in a process that does not import vitshrink: "loaded", or "mismatch"."""
    program = (
        "import sys, transformers\n"
        "try: transformers.ViTForImageClassification.from_pretrained(sys.argv[1])\n"
        "except RuntimeError as error: print('mismatch' if 'mismatch' in str(error) else error)\n"
        "else: print('loaded')"
    )
    command = [sys.executable, "-c", program, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout.strip()


def write_sweep(file: Path, model: Path, images: Path, method: str) -> Path:
    """A sweep of two sizes, of which one misses its bound, and a job that fails."""
    document: dict[str, Any] = {
        "defaults": {"model": str(model), "calibration": str(images), "samples": 8, "holdout": 4},
        "matrix": {"method": [method], "keep": [0.9, 0.7]},
        "include": [{"name": "lost", "model": "no/such-model", "keep": 0.5, "method": "svd"}],
        "gates": {"max_size": "80kB"},
    }
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file
