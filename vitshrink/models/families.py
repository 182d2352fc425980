"""The model families that vitshrink knows: their classes, and where the linear layers of a block are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from vitshrink.errors import CheckpointError
from vitshrink.models.tasks import architecture_of

Role = Literal["query", "key", "value", "output", "fc1", "fc2"]


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers: its classes, and where the linear layers of a block are."""

    model_type: str
    modality: Literal["image", "text"]
    architectures: tuple[str, ...]
    """Names of the supported classes; ``tasks`` says what each is for."""
    blocks: str
    """The list of transformer blocks, relative to the base model."""
    modules: Mapping[Role, str]
    """The linear layers of a block, relative to the block."""
    norm: Literal["before", "after"]
    """Whether the blocks normalise what their layers read, or the residual stream after they wrote to it."""


_VIT_BLOCK: dict[Role, str] = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


_BERT_BLOCK: dict[Role, str] = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


FAMILIES = (
    Family(
        "vit",
        "image",
        ("ViTForImageClassification", "ViTModel"),
        "layers",
        _VIT_BLOCK,
        "before",
    ),
    Family(
        "deit",
        "image",
        ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "DeiTModel"),
        "layers",
        _VIT_BLOCK,
        "before",
    ),
    Family(
        "bert",
        "text",
        (
            "BertForSequenceClassification",
            "BertForTokenClassification",
            "BertForQuestionAnswering",
            "BertForMaskedLM",
            "BertModel",
        ),
        "encoder.layer",
        _BERT_BLOCK,
        "after",
    ),
)


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model. Raises CheckpointError when its class is not supported."""
    return family_named(model.config.model_type, architecture_of(model), "this model")


def family_named(model_type: str, architecture: str, where: str) -> Family:
    """The family of an architecture. Raises CheckpointError, which names ``where`` it was read."""
    for family in FAMILIES:
        if family.model_type == model_type and architecture in family.architectures:
            return family
    raise CheckpointError(
        f"{where}: the architecture {architecture} (model type {model_type!r}) is not supported. "
        f"Supported are {_supported()}."
    )


def _supported() -> str:
    return ", ".join(architecture for family in FAMILIES for architecture in family.architectures)
