"""The hook by which transformers loads compressed checkpoints, through its registry of quantisation methods.

transformers builds the dense model on the meta device, calls the hook, which puts structures (low-rank layers, mostly)
where the checkpoint's ``quantization_config`` lists them, and then fills the model from the files as it always does.

Modules are listed by their module names relative to the base model (``layers.0.attention.q_proj``), so that a
classifier's checkpoint also opens without its head.
"""

from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from vitshrink import __version__
from vitshrink.errors import CheckpointError
from vitshrink.structures.registry import connect, kind_of, read

QUANT_METHOD = "vitshrink"
FORMAT_VERSION = 1

# Importing this module again (importlib.reload) must not fail: the new classes take the place of the old.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)


def base_prefix(model: PreTrainedModel) -> str:
    """What a model's module names have before those of its base model: ``"vit."``; nothing for the base."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


@register_quantization_config(QUANT_METHOD)
class VitshrinkConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a compressed checkpoint: which modules are replaced, and by what.

    Args:
        layers: module name relative to the base model -> its structure, see ``structures``.
        metadata: anything JSON about how the checkpoint came about; not needed to load it.

    Raises CheckpointError for an entry this version cannot read.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        *,
        metadata: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        format_version: int = FORMAT_VERSION,
        vitshrink_version: str = __version__,
        transformers_version: str = transformers.__version__,
        **unknown: Any,
    ) -> None:
        if type(format_version) is not int or format_version > FORMAT_VERSION or unknown:
            raise CheckpointError(
                f"the checkpoint was written by vitshrink {vitshrink_version} in format {format_version!r}; "
                f"this is vitshrink {__version__}, which reads formats up to {FORMAT_VERSION}"
                f"{f' (unknown entries: {sorted(unknown)})' if unknown else ''}. Upgrade vitshrink."
            )
        if not isinstance(layers, dict):
            raise CheckpointError("the quantization_config of the checkpoint lists no layers: it is damaged.")
        for entry in layers.values():
            read(entry)
        self.quant_method = quant_method
        self.format_version = format_version
        self.vitshrink_version = vitshrink_version
        self.transformers_version = transformers_version
        self.layers = layers
        self.metadata = metadata or {}


@register_quantizer(QUANT_METHOD)
class VitshrinkQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty structures where the config lists them, before the weights are read."""

    quantization_config: VitshrinkConfig
    is_qat_trainable = True
    is_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        prefix = base_prefix(model)
        for name, entry in sorted(self.quantization_config.layers.items()):  # a module before what lies in it
            module = dict(model.named_modules()).get(prefix + name)
            structure = read(entry)
            if module is None or not structure.fits(module):
                found = "no such module" if module is None else f"a {type(module).__name__} there"
                raise CheckpointError(
                    f"the checkpoint lists a {kind_of(entry)} module {name!r}; {type(model).__name__} has {found}. "
                    f"It was written with transformers {self.quantization_config.transformers_version}, and "
                    f"this is {transformers.__version__}, whose modules may have other names: install that "
                    "version, or open the checkpoint with the architecture it was made from."
                )
            model.set_submodule(prefix + name, structure.build(module))
        connect(model.base_model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        model.is_quantized = False  # the layers are plain floating point: .half(), .float() and training all work
        return model
