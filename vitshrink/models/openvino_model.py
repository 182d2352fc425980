"""An OpenVINO IR: written from an ONNX file, and run like the model it came from."""

import math
from pathlib import Path
from typing import Any

import torch

from vitshrink.errors import CheckpointError
from vitshrink.models.onnx_model import OnnxFile, described

IR_FILE = "model.xml"
SUFFIX = ".xml"

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""So that the weights that are stored decide, and no half precision that a CPU may have."""


def convert(onnx_file: Path, directory: Path) -> Path:
    """Write ``model.xml`` and ``model.bin``, in the types of the ONNX file, into a directory; return the former."""
    import openvino

    file = directory / IR_FILE
    openvino.save_model(openvino.convert_model(onnx_file), file, compress_to_fp16=False)
    return file


def open_ir(file: Path) -> OnnxFile:
    """The model in OpenVINO, on the CPU, with as many threads as torch uses. Raises CheckpointError."""
    import openvino

    options = EXACT | {"INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    try:
        compiled = openvino.Core().compile_model(file, "CPU", options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"{file} cannot be opened by OpenVINO: {reason}") from error
    outputs = [output.get_any_name() for output in compiled.outputs]

    def run(_wanted: None, feed: dict[str, Any]) -> list[Any]:
        answers = compiled(feed)
        return [answers[name].copy() for name in outputs]

    inputs = {each.get_any_name(): each.get_element_type().get_type_name() for each in compiled.inputs}
    first = compiled.inputs[0].get_partial_shape()[0]
    return OnnxFile(file, run, inputs, outputs, described("openvino"), first.get_length() if first.is_static else None)


def ir_files(file: Path) -> tuple[Path, ...]:
    """The graph, and its numbers."""
    return tuple(each for suffix in (SUFFIX, ".bin") if (each := file.with_suffix(suffix)).is_file())


def ir_bytes(file: Path) -> int:
    """Bytes of both files."""
    return sum(each.stat().st_size for each in ir_files(file))


def ir_numbers(file: Path) -> int:
    """How many numbers the file stores."""
    import openvino

    constants = [each for each in openvino.Core().read_model(file).get_ops() if each.get_type_name() == "Constant"]
    return sum(math.prod(each.shape) for each in constants)
