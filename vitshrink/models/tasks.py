"""What the head of a model is for, told by the name of its class: ``RobertaForMaskedLM``, say."""

from collections.abc import Mapping
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from vitshrink.errors import CheckpointError
from vitshrink.models.duals import DUALS
from vitshrink.models.fidelity import Head, head_for

Task = Literal[
    "image-classification",
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "masked-lm",
    "features",
    "image-text",
]

TASKS: Mapping[str, Task] = {
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "masked-lm",
    "Model": "features",
    "ModelWithProjection": "features",
}
"""By how the name of a class of transformers ends: what its outputs are for, whatever family it is of."""


def architecture_of(model: nn.Module) -> str:
    """The class of transformers that a model is; an exported one says which it was."""
    return str(getattr(model, "architecture", type(model).__name__))


def task_named(architecture: str, where: str) -> Task:
    """What a class of this name is for. Raises CheckpointError, which names ``where`` it was read."""
    if architecture in DUALS:
        return "image-text"
    for ending, task in TASKS.items():
        if architecture.endswith(ending):
            return task
    raise CheckpointError(
        f"{where}: the architecture {architecture} is not supported. Supported are models with a class name like "
        f"{', '.join(f'…{ending}' for ending in TASKS)}."
    )


def task_of(model: PreTrainedModel) -> Task:
    """What the head of a model is for. Raises CheckpointError when its class is not supported."""
    return task_named(architecture_of(model), "this model")


def head_of(model: PreTrainedModel) -> Head:
    """What the outputs of a model mean. Raises CheckpointError when its class is not supported."""
    return head_for(task_of(model), model.config, model.config.num_labels or 0)
