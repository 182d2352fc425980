"""Tiny models of all families that vitshrink is tested with, in the manner of ``tiny``: random, but reproducible."""

import json
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

from vitshrink.models.families import FAMILIES
from vitshrink.models.tasks import TASKS
from vitshrink.models.whole_images import whole_images

_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TOKENS = {name: tiny.VOCABULARY.index(token) for name, token in (("pad", "[PAD]"), ("cls", "[CLS]"), ("sep", "[SEP]"))}
_TEXT: dict[str, Any] = {
    "vocab_size": len(tiny.VOCABULARY),
    "max_position_embeddings": 64,
    "pad_token_id": _TOKENS["pad"],
    "bos_token_id": _TOKENS["cls"],
    "cls_token_id": _TOKENS["cls"],
    "eos_token_id": _TOKENS["sep"],
    "sep_token_id": _TOKENS["sep"],
}
_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
_WINDOWS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "mlp_ratio": 2.0,
}

TEXT: dict[str, dict[str, Any]] = {
    "Roberta": _SIZES | _TEXT | {"type_vocab_size": 1},
    "XLMRoberta": _SIZES | _TEXT | {"type_vocab_size": 1},
    "Camembert": _SIZES | _TEXT | {"type_vocab_size": 1},
    "Data2VecText": _SIZES | _TEXT | {"type_vocab_size": 1},
    "DistilBert": _TEXT | {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "MPNet": _SIZES | _TEXT,
    "Electra": _SIZES | _TEXT | {"embedding_size": 16},
    "Albert": _SIZES | _TEXT | {"embedding_size": 16},
    "Deberta": _SIZES | _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2": _SIZES
    | _TEXT
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8},
    "ModernBert": _SIZES | _TEXT | {"local_attention": 8, "num_hidden_layers": 3},
    "NomicBert": _SIZES | _TEXT,
    "CLIPText": _SIZES | _TEXT,
    "SiglipText": _SIZES | _TEXT,
}
"""Entries of their configs, by how their classes begin."""

IMAGE: dict[str, dict[str, Any]] = {
    "ViTMAE": _SIZES | _IMAGE,
    "ViTMSN": _SIZES | _IMAGE,
    "Dinov2": _SIZES | _IMAGE | {"mlp_ratio": 2},
    "Dinov2WithRegisters": _SIZES | _IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True},
    "DINOv3ViT": _SIZES | _IMAGE | {"num_register_tokens": 2},
    "Beit": _SIZES | _IMAGE | {"use_relative_position_bias": True},
    "Data2VecVision": _SIZES | _IMAGE | {"use_relative_position_bias": True},
    "Swin": _WINDOWS,
    "Swinv2": _WINDOWS,
    "CLIPVision": _SIZES | _IMAGE,
    "SiglipVision": _SIZES | _IMAGE,
    "CLIP": {"vision_config": _SIZES | _IMAGE, "text_config": _SIZES | _TEXT, "projection_dim": 16},
    "Siglip": {"vision_config": _SIZES | _IMAGE, "text_config": _SIZES | _TEXT},
}

DUALS = ("CLIPModel", "SiglipModel")
"""Both towers at once."""

BYTES_VOCABULARY = 290
"""Bytes, special tokens, and merges that end in whole words."""

ARRANGED = ("ForQuestionAnswering", "ForMultipleChoice")
"""How classes end whose samples are more than running text."""

_HEADS = ("ForSequenceClassification", "ForImageClassification", *TASKS)
"""The first of them that a family has stands for it."""

ARCHITECTURES = tuple(
    dict.fromkeys(
        name
        for stem in (*TEXT, *IMAGE)
        for name in (f"{stem}{head}" for head in _HEADS)
        if hasattr(transformers, name) and name not in DUALS
    )
)


ONE_OF_EACH = tuple(
    next(name for name in ARCHITECTURES if name.removeprefix(stem) in _HEADS) for stem in (*TEXT, *IMAGE)
)


def stem_of(name: str) -> str:
    return name.partition("For")[0].removesuffix("WithProjection").removesuffix("Model")


def is_text(name: str) -> bool:
    return stem_of(name) in TEXT


def is_plain(name: str) -> bool:
    """Whether the table of families says that its attentions are plain."""
    kind = getattr(transformers, name).config_class.model_type
    return any(family.model_type == kind and family.plain for family in FAMILIES)


def build(name: str, seed: int = 0, **entries: Any) -> PreTrainedModel:
    """The architecture ``name`` in evaluation mode, with no weight left at zero or one."""
    labels = tiny.IMAGE_CLASSES if "Image" in name else tiny.TEXT_CLASSES
    config = getattr(transformers, f"{stem_of(name)}Config")(
        **(TEXT | IMAGE)[stem_of(name)] | entries,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, **entries: Any) -> Path:
    """A complete checkpoint directory: weights, config, and the image processor or tokenizer that belongs to it."""
    build(name, **entries).to(dtype).save_pretrained(directory)
    if is_text(name) or name in DUALS:
        write_tokenizer(name, directory)
    if not is_text(name):
        tiny.write_processor(directory)
    return directory


def write_bytes_tokenizer(directory: Path, *, add_prefix_space: bool) -> Path:
    """A byte-level BPE tokenizer as RoBERTa's, which tells words at the beginning of a text from others."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES_VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator([" ".join(tiny.WORDS)] * 3, trainer)
    made = json.loads(learned.to_str())["model"]
    transformers.RobertaTokenizer(
        vocab=made["vocab"],
        merges=[tuple(merge) for merge in made["merges"]],
        add_prefix_space=add_prefix_space,
        model_max_length=48,
    ).save_pretrained(directory)
    return directory


def write_captions(directory: Path, count: int = 24, column: str = "caption") -> Path:
    """Images, and a table with a text for each."""
    images = sorted(tiny.write_images(directory / "images", count).iterdir())
    lines = tiny.write_text(directory / "lines.txt", count).read_text().splitlines()
    rows = (f"images/{image.name},{line}\n" for image, line in zip(images, lines, strict=True))
    (directory / "captions.csv").write_text(f"file_name,{column}\n" + "".join(rows))
    return directory / "captions.csv"


def write_tokenizer(name: str, directory: Path) -> None:
    """The tokenizer of ``tiny``, which gives what models of this kind take."""
    typed = stem_of(name) in ("Electra", "Albert")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer,
        model_max_length=48,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"],
    ).save_pretrained(directory)


def write_samples(name: str, directory: Path, count: int = 24) -> Path:
    """Unlabeled samples that a model can be calibrated on: images, lines of text, or questions with their contexts."""
    if not is_text(name):
        return tiny.write_images(directory / "images", count)
    if not name.endswith(ARRANGED):
        return tiny.write_text(directory / "lines.txt", count)
    lines = tiny.write_text(directory / "lines.txt", 3 * count).read_text().splitlines()
    rows = [{"question": one, "context": two} for one, two in zip(lines[::3], lines[1::3], strict=True)]
    if name.endswith("ForMultipleChoice"):
        texts = zip(lines[::3], lines[1::3], lines[2::3], strict=True)
        rows = [{"question": one, "choices": others} for one, *others in texts]  # type: ignore[dict-item]
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return directory / "rows.jsonl"


def inputs(name: str, batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pixels (batch, 3, 32, 32), or tokens and attention mask (batch, 10) with the last row padded; of one, choices."""
    found = tiny.inputs("BertModel" if is_text(name) else "ViTModel", batch, seed)
    return {key: each[None] for key, each in found.items()} if name.endswith("ForMultipleChoice") else found


def whole(model: PreTrainedModel) -> PreTrainedModel:
    """A masked autoencoder's encoder reads all patches then, as vitshrink has it do."""
    whole_images(model)
    return model
