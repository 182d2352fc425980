"""onnxruntime: its dynamic int8 and its blocks of a few bits, from the file that ``vitshrink export`` writes."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peers.registry import Built, Material, Row, peer
from vitshrink.models.onnx_model import OnnxFile, OnnxModel, onnx_bytes

BLOCKS = ((8, 64), (4, 64), (4, 32), (2, 32))
"""Bits, and weights that share a scale."""


@peer("onnxruntime", "onnxruntime", "onnx")
def onnxruntime_rows(_sizes: Sequence[str]) -> Iterator[Row]:
    stored = "int8 a channel and uint8 activations; rest float32"
    yield Row("onnxruntime, dynamic: int8", stored, partial(_built, write_dynamic), calibrated=False)
    for bits, block in BLOCKS:
        name = f"onnxruntime, MatMulNBits: {bits} bits in blocks of {block}"
        stored = f"{bits}-bit codes, scales and zeros of the products; rest float32"
        yield Row(name, stored, partial(_built, partial(_blocks, bits, block)), calibrated=False)


def _built(write: Callable[[Path, Path], None], material: Material, _seed: int, folder: Path) -> Built:
    """What ``write`` makes of the exported model, opened. The export is not part of the time."""
    exported, file = material.onnx, folder / "model.onnx"
    started = time.perf_counter()
    write(exported, file)
    seconds = time.perf_counter() - started
    dense = material.source.model
    model = OnnxModel(OnnxFile.open(file), dense.config, type(dense).__name__).eval()
    return Built(model, onnx_bytes(file), seconds)


def write_dynamic(exported: Path, file: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    bare = onnx.load(exported)
    del bare.graph.value_info[:]  # it infers shapes of its own, by names that it gives anew
    quantize_dynamic(bare, file, per_channel=True, weight_type=QuantType.QInt8)


def write_static(exported: Path, file: Path, samples: Iterable[dict[str, Any]]) -> None:
    """int8 weights a channel and activations, by what was met in samples, as its guide for transformers says: QDQ."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    prepared = file.with_name("prepared.onnx")
    quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(file),
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
    )


def _blocks(bits: int, block: int, exported: Path, file: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(str(exported), bits=bits, block_size=block, is_symmetric=False)
    quantizer.process()
    quantizer.model.save_model_to_file(str(file))
