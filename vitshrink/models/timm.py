"""Models of timm, which transformers runs in a wrapper. Their config.json may be that of timm, as the Hub has it."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vitshrink.errors import CheckpointError, DependencyError
from vitshrink.models.files import first_line

TIMM = "timm_wrapper"


def as_wrapped(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A config of timm with what transformers makes of it; any other is left as it is.

    Raises CheckpointError where timm would open a file, or fetch a model, that the checkpoint chooses.
    """
    own = "model_type" not in config and isinstance(config.get("pretrained_cfg"), dict) and "architecture" in config
    if own:
        classes = config.get("num_classes", config["pretrained_cfg"].get("num_classes"))
        wrapper = "TimmWrapperForImageClassification" if classes else "TimmWrapperModel"
        config = config | {"model_type": TIMM, "architectures": [wrapper]}
    if config.get("model_type") == TIMM:
        _refuse_places(config, path)
    return config


def _refuse_places(config: dict[str, Any], path: Path) -> None:
    name, arguments = config.get("architecture", "resnet50"), config.get("model_args") or {}
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise CheckpointError(f"{path} has the architecture {name!r}, which is not the name of a timm model.")
    if not isinstance(arguments, dict) or "checkpoint_path" in arguments:
        raise CheckpointError(f"{path} has model_args with a file for timm to open, or damaged ones: refused.")
    if "num_classes" in arguments:
        raise CheckpointError(
            f"{path} has num_classes in model_args, where transformers gives it as well: remove this entry in a copy; "
            "the one outside of model_args stays."
        )


def require_timm(architecture: str, where: str) -> None:
    """Raises DependencyError where timm cannot be imported."""
    needs = f"{where}: {architecture} runs a timm model, and"
    missing = [name for name in ("timm", "torchvision") if find_spec(name) is None]
    if missing:
        raise DependencyError(f"{needs} {' and '.join(missing)} cannot be imported: pip install {' '.join(missing)}.")
    try:
        import_module("timm")
    except Exception as error:  # a torchvision that was built for another torch fails in its own ways
        raise DependencyError(
            f"{needs} timm cannot be imported ({first_line(error)}): install the torchvision that was built for torch "
            f"{torch.__version__}."
        ) from error
