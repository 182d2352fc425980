"""An exported ONNX file that is run like the model it came from."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from vitshrink.config.names import is_portable, unportable
from vitshrink.errors import CheckpointError

SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxFile:
    """A file in onnxruntime, on the CPU."""

    path: Path
    run: Any
    inputs: dict[str, str]
    """Names of the inputs and their types, such as ``tensor(float)``."""
    outputs: list[str]
    runtime: str
    """What runs it, as ``described`` says it."""
    batch: int | None = None
    """Samples that it takes, if it takes no other number."""

    @classmethod
    def open(cls, path: Path) -> "OnnxFile":
        """As many threads as torch uses, so that times can be compared. Raises CheckpointError."""
        import onnxruntime

        if not is_portable(path):
            raise CheckpointError(unportable(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the classes are those of the bindings, and differ between versions
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path} cannot be opened by onnxruntime: {reason}") from error
        inputs = {entry.name: entry.type for entry in session.get_inputs()}
        outputs = [entry.name for entry in session.get_outputs()]
        first = session.get_inputs()[0].shape[0]
        batch = first if isinstance(first, int) else None
        return cls(path, session.run, inputs, outputs, described("onnxruntime"), batch)


def described(package: str, name: str | None = None) -> str:
    """A runtime as a report names it: with the version of its package, and the type that it computes in."""
    return f"{name or package} {importlib.metadata.version(package)}, float32"


class Opened(nn.Module):
    """An opened file: takes inputs and gives outputs by name; inputs that the file does not have are left out."""

    def __init__(self, file: OnnxFile) -> None:
        super().__init__()
        self.file = file
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        """Nothing, on the CPU and in float32: where and in which type inputs are wanted."""

    @property
    def runtime(self) -> str:
        return self.file.runtime

    def forward(self, **inputs: Tensor) -> ModelOutput:
        feed = {name: self._array(name, inputs) for name in self.file.inputs}
        values = self._run(feed)
        return ModelOutput(dict(zip(self.file.outputs, map(torch.from_numpy, values), strict=True)))

    def _run(self, feed: dict[str, Any]) -> Sequence[Any]:
        """In batches of the size that the file takes, of which the last is filled up with its last sample."""
        size, samples = self.file.batch, len(next(iter(feed.values())))
        if size in (None, samples):
            return self.file.run(None, feed)  # type: ignore[no-any-return]
        pieces = []
        for start in range(0, samples, size):
            places = np.arange(start, start + size).clip(max=samples - 1)
            pieces.append(self.file.run(None, {name: x[places] for name, x in feed.items()}))
        return [np.concatenate(each)[:samples] for each in zip(*pieces, strict=True)]

    def _array(self, name: str, inputs: dict[str, Tensor]) -> Any:
        if name in inputs:
            return np.ascontiguousarray(inputs[name].cpu().numpy())
        tokens = inputs["input_ids"]
        return (torch.zeros_like(tokens) if name == "token_type_ids" else torch.ones_like(tokens)).numpy()


class OnnxModel(Opened):
    """Takes and returns what the transformers model does.

    ``config`` and ``architecture`` are those of the model that was exported.
    """

    def __init__(self, file: OnnxFile, config: PretrainedConfig, architecture: str) -> None:
        super().__init__(file)
        self.config = config
        self.architecture = architecture

    @property
    def main_input_name(self) -> str:
        return "pixel_values" if "pixel_values" in self.file.inputs else "input_ids"


def onnx_numbers(path: Path) -> int:
    """How many numbers the file stores."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)


def onnx_bytes(path: Path) -> int:
    """Bytes of the file and of its external data."""
    return sum(file.stat().st_size for file in onnx_files(path))


def onnx_files(path: Path) -> tuple[Path, ...]:
    """The file, and that of its external data."""
    return tuple(file for file in path.parent.glob(f"{path.name}*") if file.is_file())
