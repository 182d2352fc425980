"""An exported ONNX file that is run like the model it came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.generic import ModelOutput

from vitshrink.config.names import is_portable, unportable
from vitshrink.errors import CheckpointError
from vitshrink.models.companions import companions_of
from vitshrink.models.families import family_named
from vitshrink.models.loading import LoadedModel, embedding_of
from vitshrink.models.source import CONFIG, Source, read_config
from vitshrink.runtime.extras import require

SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxFile:
    """A file in onnxruntime, on the CPU."""

    path: Path
    run: Any
    inputs: dict[str, str]
    """Names of the inputs and their types, such as ``tensor(float)``."""
    outputs: list[str]

    @classmethod
    def open(cls, path: Path) -> "OnnxFile":
        """As many threads as torch uses, so that times can be compared. Raises CheckpointError."""
        import onnxruntime

        if not is_portable(path):
            raise CheckpointError(unportable(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the classes are those of the bindings, and differ between versions
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path} cannot be opened by onnxruntime: {reason}") from error
        inputs = {entry.name: entry.type for entry in session.get_inputs()}
        return cls(path, session.run, inputs, [entry.name for entry in session.get_outputs()])


class OnnxModel(nn.Module):
    """Takes and returns what the transformers model does; inputs that the file does not have are left out.

    ``config`` and ``architecture`` are those of the model that was exported.
    """

    def __init__(self, file: OnnxFile, config: PretrainedConfig, architecture: str) -> None:
        super().__init__()
        self.file = file
        self.config = config
        self.architecture = architecture
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        """Nothing, on the CPU and in float32: where and in which type inputs are wanted."""

    @property
    def main_input_name(self) -> str:
        return "pixel_values" if "pixel_values" in self.file.inputs else "input_ids"

    def forward(self, **inputs: Tensor) -> ModelOutput:
        feed = {name: self._array(name, inputs) for name in self.file.inputs}
        values = self.file.run(None, feed)
        return ModelOutput(dict(zip(self.file.outputs, map(torch.from_numpy, values), strict=True)))

    def _array(self, name: str, inputs: dict[str, Tensor]) -> Any:
        if name in inputs:
            return np.ascontiguousarray(inputs[name].cpu().numpy())
        tokens = inputs["input_ids"]
        return (torch.zeros_like(tokens) if name == "token_type_ids" else torch.ones_like(tokens)).numpy()


def load_onnx(path: Path) -> LoadedModel:
    """A file that ``vitshrink export`` wrote, with the configuration and processor files beside it.

    Raises:
        DependencyError: onnxruntime is missing.
        CheckpointError: the file is damaged, or stands alone.
    """
    require("onnx", f"{path.name}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if not (path.parent / CONFIG).is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG} beside it, which says what its outputs mean: keep the directory that "
            "`vitshrink export` wrote together, or copy the files of the checkpoint there."
        )
    entries = read_config(path.parent)
    architecture = str((entries.get("architectures") or ["none"])[0])
    family = family_named(entries["model_type"], architecture, str(path.parent / CONFIG))
    try:
        config = CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
    except Exception as error:
        raise CheckpointError(f"{path.parent / CONFIG} cannot be read by transformers: {error}") from error
    session = OnnxFile.open(path)
    needed = "pixel_values" if family.modality == "image" else "input_ids"
    if needed not in session.inputs or not {"logits", "last_hidden_state"} & set(session.outputs):
        raise CheckpointError(
            f"{path} takes {', '.join(session.inputs)} and gives {', '.join(session.outputs)}: it is not a file that "
            "`vitshrink export` wrote for this architecture."
        )
    model: Any = OnnxModel(session, config, architecture).eval()
    source = Source(path.parent, entries, _files(path), tensors={})
    companions = companions_of(path.parent, [path])
    return LoadedModel(model, source, torch.float32, family, companions, embedding_of(path.parent, model))


def onnx_numbers(path: Path) -> int:
    """How many numbers the file stores."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)


def onnx_bytes(path: Path) -> int:
    """Bytes of the file and of its external data."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> tuple[Path, ...]:
    return tuple(file for file in path.parent.glob(f"{path.name}*") if file.is_file())
