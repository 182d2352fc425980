"""The hook by which transformers loads compressed checkpoints, through its registry of quantization methods.

transformers builds the dense model on the meta device, calls the hook, which puts structures (low-rank layers, mostly)
where the checkpoint's ``quantization_config`` lists them, and then fills the model from the files as it always does.

Modules are listed by their module names relative to the base model (``layers.0.attention.q_proj``), so that a
classifier's checkpoint also opens without its head.
"""

from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vitshrink._version import __version__
from vitshrink.errors import CheckpointError
from vitshrink.models.format import FORMAT_VERSION, QUANT_METHOD
from vitshrink.models.structures.coded import Coded, decode_ahead
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.structures.registry import Connected, connect, describe, kind_of, read, structure_of


def base_prefix(model: PreTrainedModel) -> str:
    """What a model's module names have before those of its base model: ``"vit."``; nothing for the base."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


class VitshrinkConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed checkpoint: which modules are replaced by which structures.

    Args:
        layers: module name relative to the base model -> its structure, see ``structures``.
        head: the same for modules outside the base model, by their whole names; the base model opens without them.
        stored_dtype: type of the floating-point tensors in the files, where the model runs in a wider one (``dtype`` of
            config.json): half the bytes on disk, and the speed of float32 on a CPU.
        metadata: anything JSON about how the checkpoint came about; not needed to load it.

    Raises CheckpointError for an entry this version cannot read.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        *,
        head: dict[str, dict[str, Any]] | None = None,
        stored_dtype: str | None = None,
        metadata: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        format_version: int = FORMAT_VERSION,
        vitshrink_version: str = __version__,
        transformers_version: str = transformers.__version__,
        **unknown: Any,
    ) -> None:
        if type(format_version) is not int or format_version > FORMAT_VERSION or unknown:
            raise CheckpointError(
                f"the checkpoint was written by vitshrink {vitshrink_version} in format {format_version!r}, but "
                f"this is vitshrink {__version__}, which reads formats up to "
                f"{FORMAT_VERSION}{f' (unknown entries: {sorted(unknown)})' if unknown else ''}. Upgrade "
                "vitshrink."
            )
        if not isinstance(layers, dict):
            raise CheckpointError("quantization_config in config.json lists no layers: the checkpoint is damaged.")
        for entry in [*layers.values(), *(head or {}).values()]:
            read(entry)
        self.quant_method = quant_method  # type: ignore[assignment] # theirs are a closed enumeration
        self.format_version = format_version
        self.vitshrink_version = vitshrink_version
        self.transformers_version = transformers_version
        self.layers = layers
        if head:
            self.head = head
        if stored_dtype is not None:
            if not isinstance(getattr(torch, str(stored_dtype), None), torch.dtype):
                raise CheckpointError(
                    f"quantization_config in config.json has stored_dtype {stored_dtype!r}, which is no type of torch."
                )
            self.stored_dtype = stored_dtype
        self.metadata = metadata or {}


class VitshrinkQuantizer(HfQuantizer):
    """Puts empty structures into the model, as the config lists them, before the weights are loaded."""

    quantization_config: VitshrinkConfig
    is_qat_trainable = True
    is_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        prefix = base_prefix(model)
        entries = {prefix + name: entry for name, entry in self.quantization_config.layers.items()}
        if prefix:  # a model with another head leaves this one out, as its base does
            modules = dict(model.named_modules())
            head = getattr(self.quantization_config, "head", {})
            entries |= {name: entry for name, entry in head.items() if name in modules}
        for name, entry in sorted(entries.items()):  # a module before what lies in it
            module, structure = _found(model, name), read(entry)
            if module is None or not structure.fits(module):
                found = "no such module" if module is None else f"a {type(module).__name__} there"
                raise CheckpointError(
                    f"the checkpoint lists a {kind_of(entry)} module {name.removeprefix(prefix)!r}; "
                    f"{type(model).__name__} has {found}. " + self._why_missing(name, model)
                )
            built = structure.build(module)
            if isinstance(built, Coded):
                built.where = name
            model.set_submodule(name, built)
        connect(model.base_model)

    def _why_missing(self, name: str, model: PreTrainedModel) -> str:
        blocks = getattr(model.config, "num_hidden_layers", None)
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if isinstance(blocks, int) and numbers and numbers[0] >= blocks:
            return (
                f"Its config has {blocks} blocks, and this module is in block {numbers[0]}, counted from 0. If "
                "blocks were removed after compression, save the model again from memory with this version, or "
                "remove the missing modules from quantization_config in config.json."
            )
        written = self.quantization_config.transformers_version
        if written != transformers.__version__:
            return (
                f"It was written with transformers {written}, and this is {transformers.__version__}, whose "
                "modules may have other names: install that version, or open the checkpoint with its original "
                "architecture."
            )
        return "Open the checkpoint with its original architecture; otherwise its config.json is damaged."

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Called by ``save_pretrained`` before it writes the config: blocks may have been removed or replaced."""
        if getattr(model, "_hf_peft_config_loaded", False):  # then only the adapter is saved
            return None, {}
        list_structures(model)
        keep_names(model)
        stored = getattr(getattr(model.config, "quantization_config", None), "stored_dtype", None)
        return None if stored is None else _narrowed(model, getattr(torch, stored)), {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        decode_ahead(model)
        vars(model)["is_quantized"] = (
            False  # the layers are plain floating point: .half(), .float() and training all work
        )
        return model


def _found(model: PreTrainedModel, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _narrowed(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The state in a narrower type where that loses nothing. None, for the state as it is, after training.

    Tensors that share their memory share it again: ``save_pretrained`` writes them once.
    """
    if torch.promote_types(model.dtype, dtype) is not model.dtype or model.dtype is dtype:
        return None
    state, made = model.state_dict(), dict[tuple[Any, ...], Tensor]()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        narrow = made.setdefault(key, tensor.to(dtype))
        if not torch.equal(narrow.to(tensor.dtype), tensor):
            return None
        state[name] = narrow
    return state


def register() -> None:
    """Enter both classes into transformers' tables, in the place of whatever has their name there.

    Not with its decorators, which refuse a name that is taken: this module may be imported again (importlib.reload).
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = VitshrinkConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = VitshrinkQuantizer


register()


def keep_names(model: PreTrainedModel) -> None:
    """Let a model with structures be written without joining tensors to what they were in older files.

    transformers does so for two layers that used to be one, and cannot where they are of other shapes now. It reads
    both kinds of files.
    """
    if not any(structure_of(module) is not None for module in model.modules()):
        return
    known = getattr(model, "_weight_conversions", None)
    if known is None:
        known = [
            each for each in get_model_conversion_mapping(model, add_legacy=False) if type(each) is not PrefixChange
        ]
    if any(isinstance(each, WeightConverter) for each in known):
        vars(model)["_weight_conversions"] = [each for each in known if not isinstance(each, WeightConverter)]


def list_structures(
    model: PreTrainedModel,
    metadata: Mapping[str, Any] | None = None,
    stored: torch.dtype | EllipsisType | None = ...,
) -> None:
    """Make the model's config list its structures, so that whatever saves the model saves it whole.

    ``stored`` is the type of the files where it is not the model's; by default it stays as it is.

    Raises CheckpointError where it would not load again.
    """
    prefix = base_prefix(model)
    layers: dict[str, dict[str, Any]] = {}
    head: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        found = structure_of(layer)
        if found is None:
            continue
        if not name.startswith(prefix) and not isinstance(layer, LowRankLinear):
            head[name] = describe(found)
            continue
        if not name.startswith(prefix):
            raise CheckpointError(f"{name} is outside the base model ({prefix}), so it cannot be stored as low-rank.")
        if isinstance(layer, LowRankLinear) and layer.weight.shape == (layer.out_features, layer.in_features):
            # It is the wrong shape of this tensor that stops transformers without vitshrink from loading it.
            raise CheckpointError(f"{name} has rank {layer.rank}, which is its full rank: keep it dense.")
        if isinstance(found, Connected) and not found.finds_its_source(layer, model.base_model):
            raise CheckpointError(
                f"{name} reads another module, {found.source}, which was removed or moved, so the model would "
                "not load again. Keep all blocks up to the last one that shares a tensor."
            )
        layers[name.removeprefix(prefix)] = describe(found)
    if layers or head:
        known = getattr(model.config, "quantization_config", None)
        if metadata is None:
            metadata = getattr(known, "metadata", {})
        narrow = getattr(known, "stored_dtype", None)
        if not isinstance(stored, EllipsisType):
            narrow = None if stored is None else str(stored).removeprefix("torch.")
        listed = VitshrinkConfig(layers, head=head, stored_dtype=narrow, metadata=dict(metadata))
        model.config.quantization_config = listed
        vars(model)["hf_quantizer"] = VitshrinkQuantizer(
            model.config.quantization_config
        )  # asked when the model is saved
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
