"""NNCF on OpenVINO: weights of 8 and 4 bits, the latter with what it learns from samples, and int8 throughout."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peers.registry import Built, Material, Row, peer
from vitshrink.models.onnx_model import OnnxModel
from vitshrink.models.openvino_model import IR_FILE, ir_bytes, open_ir
from vitshrink.models.tracing import quiet, trace_inputs

LEARNED: Mapping[str, Mapping[str, bool]] = {
    "AWQ": {"awq": True},
    "scale estimation": {"scale_estimation": True},
    "GPTQ": {"gptq": True},
    "GPTQ, scale estimation": {"gptq": True, "scale_estimation": True},
}
"""What it offers for 4 bits and samples."""


@peer("nncf", "nncf", "openvino")
def nncf_rows(_sizes: Sequence[str]) -> Iterator[Row]:
    for mode in ("int8_asym", "int8_sym"):
        yield _weights(mode, mode, {}, calibrated=False)
    for mode in ("int4_sym", "int4_asym"):
        for group in (64, 32):
            yield _weights(f"{mode}, {group}", mode, {"group_size": group}, calibrated=False)
    for name, options in LEARNED.items():
        yield _weights(f"int4_asym, 32, {name}", "int4_asym", {"group_size": 32, **options}, calibrated=True)
    yield Row("NNCF, post-training: int8", "int8 weights and activations; OpenVINO .bin and .xml", _post_training)


def _weights(name: str, mode: str, options: Mapping[str, Any], *, calibrated: bool) -> Row:
    backup = "" if mode.startswith("int8") else ", head and embeddings int8"
    stored = f"{mode}{backup}, rest float16; OpenVINO .bin and .xml"
    return Row(f"NNCF, weights: {name}", stored, partial(_compressed, mode, options, calibrated), calibrated)


def _compressed(
    mode: str, options: Mapping[str, Any], calibrated: bool, material: Material, seed: int, folder: Path
) -> Built:
    import nncf

    samples = {"dataset": _samples(material, seed), "subset_size": material.samples} if calibrated else {}
    model = nncf.compress_weights(_converted(material), mode=nncf.CompressWeightsMode(mode), **options, **samples)
    return _read_back(material, model, folder)


def _post_training(material: Material, seed: int, folder: Path) -> Built:
    return _read_back(material, post_training(_converted(material), material, seed), folder)


def post_training(converted: Any, material: Material, seed: int) -> Any:
    """An OpenVINO model with int8 weights and activations."""
    import nncf

    return nncf.quantize(
        converted, _samples(material, seed), subset_size=material.samples, model_type=nncf.ModelType.TRANSFORMER
    )


def _converted(material: Material) -> Any:
    import openvino

    model = material.source.model
    with quiet():
        return openvino.convert_model(model, example_input=trace_inputs(model, 2))


def _samples(material: Material, seed: int) -> Any:
    import nncf

    return nncf.Dataset(singles(material, seed))


def singles(material: Material, seed: int) -> list[dict[str, Any]]:
    """The inputs of the calibration, one sample at a time, without padding."""
    names = set(trace_inputs(material.source.model, 2))
    found = []
    for batch in material.calibrations[seed].batches:
        for index in range(len(batch.keys)):
            real = slice(None) if batch.mask is None else batch.mask[index]
            inputs = {name: tensor[index : index + 1] for name, tensor in batch.inputs.items() if name in names}
            real_only = {name: each if batch.mask is None else each[:, real] for name, each in inputs.items()}
            found.append({name: each.numpy() for name, each in real_only.items()})
    return found


def _read_back(material: Material, model: Any, folder: Path) -> Built:
    """Written, read and compiled, so that the file is judged."""
    import openvino

    file = folder / IR_FILE
    openvino.save_model(model, file)
    dense = material.source.model
    return Built(OnnxModel(open_ir(file), dense.config, type(dense).__name__).eval(), ir_bytes(file))
