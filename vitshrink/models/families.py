"""What vitshrink knows of families of models, one ``model_type`` of transformers each, beyond what it sees in a model.

Blocks, linear layers, and which of them read the same input are found by looking: a family without an entry works too.
An entry adds what each layer is for, and with that the methods that need to know: see ``Family``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from vitshrink.errors import CheckpointError, UsageError
from vitshrink.models.blocks import find_blocks
from vitshrink.models.duals import DUALS
from vitshrink.models.tasks import TASKS, architecture_of
from vitshrink.models.timm import TIMM, require_timm
from vitshrink.runtime.offloading import device_of_passes
from vitshrink.runtime.precision import Passes, passes_in

Role = Literal["query", "key", "value", "qkv", "output", "fc1", "gate", "up", "gated", "fc2", "other"]
"""What a linear layer of a block is for. ``qkv`` and ``gated`` are one layer for several; the hidden units of ``gate``,
``up`` and ``gated`` belong together, so that they keep their order. ``other``: nobody knows."""

Modality = Literal["image", "text", "image-text"]
"""What a model reads; ``image-text``: either, each by a tower of its own."""

Modules = Mapping[Role, str]
"""The linear layers of a block by role, relative to the block."""

INPUTS: Mapping[str, Modality] = {"pixel_values": "image", "input_ids": "text"}
"""What models read, by the name of their main input."""

NAFLEX = ("siglip2", "siglip2_vision_model")
"""Types of models that read lists of patches and the shapes of the images that these are from."""


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers, and what is known of it."""

    model_type: str
    modality: Modality
    layouts: tuple[Modules, ...] = ()
    """The kinds of blocks that there are; none where nobody knows."""
    norm: Literal["before", "after"] | None = None
    """Whether blocks normalize what their layers read, or the residual stream after they wrote to it. None where more
    happens on the way to the stream, or nobody knows."""
    plain: bool = False
    """Whether attention is softmax(QKᵀ) V over all tokens, and nothing else: no rotation, bias of positions or window.
    Methods that make attentions anew need that."""
    grid: bool = False
    """Whether it is a ViT whose tokens are special ones and a grid of patches, with positions of their own."""
    any_size: bool = False
    """Whether it reads images of any size, so that the image processor says which."""
    mixed: bool = True
    """Whether it runs in mixed precision: some fill masks with numbers that narrow types do not have."""
    left: tuple[str, ...] = ()
    """Parts of the names of linear layers that stay: they read no tokens."""
    same_input: tuple[tuple[Role, ...], ...] = (("query", "key", "value"), ("gate", "up"))
    """The roles of a block that read the same tensor."""

    @property
    def modules(self) -> Modules:
        """Of a model: see ``family_of``."""
        return self.layouts[0] if self.layouts else {}


_VIT: dict[Role, str] = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_BERT: dict[Role, str] = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_DATA2VEC_VISION: dict[Role, str] = _BERT | {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
}
_CLIP: dict[Role, str] = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_DISTILBERT: dict[Role, str] = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "output": "attention.out_lin",
    "fc1": "ffn.lin1",
    "fc2": "ffn.lin2",
}
_MPNET: dict[Role, str] = {
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "output": "attention.attn.o",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_ALBERT: dict[Role, str] = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.dense",
    "fc1": "ffn",
    "fc2": "ffn_output",
}
_DEBERTA: dict[Role, str] = _BERT | {
    "query": "attention.self.query_proj",
    "key": "attention.self.key_proj",
    "value": "attention.self.value_proj",
}
_DEBERTA_FUSED: dict[Role, str] = {
    "qkv": "attention.self.in_proj",
    "output": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_MODERNBERT: dict[Role, str] = {"qkv": "attn.Wqkv", "output": "attn.Wo", "gated": "mlp.Wi", "fc2": "mlp.Wo"}
_NOMIC: dict[Role, str] = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}

_ATTENTION: dict[Role, str] = {role: path for role, path in _VIT.items() if role not in ("fc1", "fc2")}
_DINO3: dict[Role, str] = _ATTENTION | {"fc1": "mlp.up_proj", "fc2": "mlp.down_proj"}
_DINO_GATED: dict[Role, str] = _ATTENTION | {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "fc2": "mlp.down_proj"}

FAMILIES = (
    Family("vit", "image", (_VIT,), "before", plain=True, grid=True),
    Family("deit", "image", (_VIT,), "before", plain=True, grid=True),
    Family("vit_msn", "image", (_VIT,), "before", plain=True),
    Family("vit_mae", "image", (_VIT,), "before", plain=True),
    Family("dinov2", "image", (_DINO_GATED, _VIT), plain=True, any_size=True),
    Family("dinov2_with_registers", "image", (_DINO_GATED, _VIT), plain=True, any_size=True),
    Family("dinov3_vit", "image", (_DINO_GATED, _DINO3), any_size=True),
    Family("beit", "image", (_VIT,)),
    Family("data2vec-vision", "image", (_DATA2VEC_VISION,)),
    Family("swin", "image", (_VIT,)),
    Family("swinv2", "image", (_BERT,), left=("continuous_position_bias_mlp",)),
    Family("clip_vision_model", "image", (_CLIP,), "before"),
    Family("clip", "image", (_CLIP,), "before"),
    Family("siglip_vision_model", "image", (_CLIP,), "before"),
    Family("siglip", "image", (_CLIP,), "before"),
    Family("bert", "text", (_BERT,), "after", plain=True),
    Family("roberta", "text", (_BERT,), "after", plain=True),
    Family("xlm-roberta", "text", (_BERT,), "after", plain=True),
    Family("camembert", "text", (_BERT,), "after", plain=True),
    Family("electra", "text", (_BERT,), "after", plain=True),
    Family("data2vec-text", "text", (_BERT,), "after", plain=True),
    Family("distilbert", "text", (_DISTILBERT,), "after"),
    Family("mpnet", "text", (_MPNET,), "after"),
    Family("albert", "text", (_ALBERT,), "after"),
    Family("deberta", "text", (_DEBERTA_FUSED,), "after", mixed=False),
    Family("deberta-v2", "text", (_DEBERTA,), "after", same_input=(("query", "key"),)),
    Family("modernbert", "text", (_MODERNBERT,), "before"),
    Family("nomic_bert", "text", (_NOMIC,), "after"),
    Family("clip_text_model", "text", (_CLIP,), "before"),
    Family("siglip_text_model", "text", (_CLIP,), "before"),
)
"""A new family needs no entry; with one it can be compressed by more methods."""


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model, with that layout alone which its blocks have.

    Raises CheckpointError, and DependencyError, as ``family_named``.
    """
    family = family_named(model.config.model_type, architecture_of(model), "this model")
    if len(family.layouts) > 1 and isinstance(model, nn.Module) and hasattr(model, "base_model"):
        block = next(iter(find_blocks(model.base_model).values()))
        names = {name for name, _ in block.named_modules()}
        fitting = tuple(layout for layout in family.layouts if names.issuperset(layout.values()))
        return replace(family, layouts=fitting[:1])
    return family


def precision_for(model: PreTrainedModel, wanted: str) -> str:
    """``wanted``, but ``no`` in the place of ``auto`` for a model that does not run in mixed precision."""
    return "no" if wanted == "auto" and not family_of(model).mixed else wanted


def passes_of(model: PreTrainedModel, wanted: str) -> Passes:
    """The arithmetic of passes over a model, where its blocks run."""
    return passes_in(device_of_passes(model), precision_for(model, wanted))


def require_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises CheckpointError for a model that does not run in ``dtype``."""
    if dtype in (torch.float16, torch.bfloat16) and not family_of(model).mixed:
        raise CheckpointError(
            f"{type(model).__name__} does not run in half precision: transformers {transformers.__version__} reads a "
            "part of it as float32. Pass --dtype float32."
        )


def reads_any_size(model_type: str) -> bool:
    """Whether models of this type read images of any size."""
    return any(family.model_type == model_type and family.any_size for family in FAMILIES)


def require_grid(model: PreTrainedModel, flag: str) -> None:
    """Raises UsageError where the tokens of an image model are not special ones and a grid of patches, as ViT's are."""
    family = family_of(model)
    if not family.grid:
        known = ", ".join(each.model_type for each in FAMILIES if each.grid)
        raise UsageError(
            f"{flag} needs the positions of the patches among the tokens, which vitshrink knows for {known}; "
            f"{type(model).__name__} is {family.model_type}."
        )


@cache
def family_named(model_type: str, architecture: str, where: str) -> Family:
    """The family of an architecture.

    Raises:
        CheckpointError: vitshrink cannot handle it; says why, what is nearest, and ``where`` it was read.
        DependencyError: it needs timm.
    """
    if model_type == TIMM:
        require_timm(architecture, where)
    problem = _problem(model_type, architecture)
    if problem is not None:
        raise CheckpointError(
            f"{where}: the architecture {architecture} (model type {model_type!r}) is not supported: {problem}"
        )
    known = {family.model_type: family for family in FAMILIES}
    if architecture in DUALS:
        return replace(known[model_type], modality="image-text", norm=None)
    return known.get(model_type) or Family(model_type, INPUTS[_class(architecture).main_input_name])


def _class(architecture: str) -> type[PreTrainedModel]:
    """Raises CheckpointError where transformers has none of this name."""
    found = getattr(transformers, architecture, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise CheckpointError(f"transformers {transformers.__version__} has no model {architecture}.")
    return found


def _problem(model_type: str, architecture: str) -> str | None:
    """Why an architecture cannot be handled, and the nearest thing that can; None where it can."""
    try:
        kind = _class(architecture)
    except CheckpointError as error:
        return f"{error} vitshrink never runs code from a checkpoint."
    own = getattr(kind.config_class, "model_type", None)
    if own != model_type:
        return f"it is a model of type {own!r}. Correct architectures or model_type in config.json."
    if (
        model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    ):
        return "it is a decoder, which generates one token after another; vitshrink compresses encoders such as BERT."
    if model_type in NAFLEX:
        return (
            "it reads images of any shape as lists of patches (NaFlex). Use a SigLIP 2 checkpoint with a fixed "
            "image size, such as google/siglip2-base-patch16-224, which is a SiglipModel."
        )
    if not architecture.endswith(tuple(TASKS)):
        return f"vitshrink does not know its kind of output. {_nearest(architecture)}"
    if kind.main_input_name not in INPUTS:
        return f"it reads {kind.main_input_name}, but vitshrink supports only images and texts ({', '.join(INPUTS)})."
    towers = {"text_config", "vision_config"} <= set(getattr(kind.config_class, "sub_configs", ()))
    if architecture.endswith("Model") and towers and architecture not in DUALS:
        return (
            f"it is a pair of encoders. Save one of them, as {architecture.removesuffix('Model')}VisionModel or "
            f"{architecture.removesuffix('Model')}TextModel: from_pretrained, then save_pretrained."
        )
    return None


def _nearest(architecture: str) -> str:
    """What else transformers makes of the same weights."""
    stem = architecture.partition("For")[0].removesuffix("Model").removesuffix("LMHead")
    others = [name for ending in TASKS if hasattr(transformers, name := f"{stem}{ending}")]
    if not others:
        return f"Supported are classes with names like {', '.join(f'…{ending}' for ending in TASKS)}."
    return (
        f"Supported are {', '.join(others)}: load it as one of these with from_pretrained, then save it with "
        "save_pretrained."
    )
