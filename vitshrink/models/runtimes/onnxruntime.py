"""onnxruntime, on the CPU."""

from vitshrink.models.onnx_model import SUFFIX, OnnxFile
from vitshrink.models.runtimes.registry import Runtime, enter, through_file

enter(
    Runtime(
        "onnxruntime",
        lambda program: through_file(program, OnnxFile.open),
        "onnxruntime",
        extra="onnx",
        opens={SUFFIX: OnnxFile.open},
        integers=True,
    )
)
