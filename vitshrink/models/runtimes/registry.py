"""What a runtime is: it compiles a model, or opens a file of one, and runs batches of it.

All of them compute in float32, multiply integers where weights and activations are integers, and take as many threads
as torch does, so that times can be compared.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.config.choosing import choose
from vitshrink.errors import UsageError
from vitshrink.models.onnx_model import OnnxFile, OnnxModel, Opened, described
from vitshrink.models.plain import plain_view
from vitshrink.models.tracing import dynamic_dimensions, outputs_of, quiet, trace_inputs, write_onnx
from vitshrink.runtime.extras import require


@dataclass(frozen=True, eq=False)
class Program:
    """A model in float32, or a part of one, and what it is traced with."""

    model: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    dynamic: Mapping[str, Any]
    """The dimensions of inputs that may differ from call to call."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """A whole model, for batches of any size."""
        inputs = trace_inputs(model, 2)
        there = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        return cls(model, inputs, list(outputs_of(model, there)), dynamic_dimensions(inputs, "batch", "sequence"))

    def write(self, file: Path) -> Path:
        """As ONNX, a whole model as ``vitshrink export`` writes it. Raises OutputError."""
        model = plain_view(self.model) if isinstance(self.model, PreTrainedModel) else self.model
        if any(tensor.device.type != "cpu" for tensor in model.parameters()):
            model = copy.deepcopy(model).cpu()
        return write_onnx(model, self.inputs, self.outputs, file, self.dynamic)


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        compile: what runs a program; it takes and gives what the program's model does, by name.
        package: whose version tells what ran.
        extra: the extra of vitshrink that installs it, where one is needed.
        opens: what opens files, by their suffix.
        factors: whether products of two matrices are run as they are stored, pivots and all.
        integers: whether 8-bit integers on fixed grids are multiplied as such, faster than other numbers.
    """

    name: str
    compile: Callable[[Program], nn.Module]
    package: str
    extra: str | None = None
    opens: Mapping[str, Callable[[Path], OnnxFile]] = field(default_factory=dict)
    factors: bool = False
    integers: bool = False

    def require(self, purpose: str) -> None:
        """Raises DependencyError where a package is missing."""
        if self.extra is not None:
            require(self.extra, purpose)

    @property
    def described(self) -> str:
        """Name, version and precision, as a report says them."""
        return described(self.package, self.name)


RUNTIMES: dict[str, Runtime] = {}


def enter(runtime: Runtime) -> Runtime:
    """Make a runtime known by its name."""
    RUNTIMES[runtime.name] = runtime
    return runtime


def find_runtime(name: str) -> Runtime:
    """Raises UsageError for a name that none has, and DependencyError where its packages are missing."""
    runtime = choose(name, RUNTIMES, "runtime")
    runtime.require(f"--runtime {name}")
    return runtime


def require_running(model: nn.Module, runtime: Runtime) -> None:
    """Raises UsageError for an opened file that the runtime cannot open."""
    if isinstance(model, OnnxModel) and (file := model.file.path).suffix not in runtime.opens:
        able = " or ".join(name for name, each in RUNTIMES.items() if file.suffix in each.opens)
        raise UsageError(
            f"--runtime {runtime.name}: {file} is for {able}; pass the checkpoint that it was exported from."
        )


def running(model: nn.Module, runtime: Runtime) -> nn.Module:
    """A model, in memory or an opened file, in a runtime. Raises as ``require_running``."""
    require_running(model, runtime)
    if isinstance(model, OnnxModel):
        same = model.file.runtime == runtime.described
        return model if same else Opened(runtime.opens[model.file.path.suffix](model.file.path)).eval()
    assert isinstance(model, PreTrainedModel)
    return runtime.compile(Program.of(model))


def through_file(program: Program, opened: Callable[[Path], OnnxFile]) -> nn.Module:
    """A program in a runtime that reads ONNX."""
    with TemporaryDirectory() as folder, quiet():
        return Opened(opened(program.write(Path(folder) / "model.onnx"))).eval()
