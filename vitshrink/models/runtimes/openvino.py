"""OpenVINO, on the CPU."""

from vitshrink.models import onnx_model, openvino_model
from vitshrink.models.openvino_model import open_ir
from vitshrink.models.runtimes.registry import Runtime, enter, through_file

enter(
    Runtime(
        "openvino",
        lambda program: through_file(program, open_ir),
        "openvino",
        extra="openvino",
        opens={openvino_model.SUFFIX: open_ir, onnx_model.SUFFIX: open_ir},
        integers=True,
    )
)
