"""Programs traced from models: what they are traced with, and how they become ONNX files."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitshrink.errors import OutputError, VitshrinkError
from vitshrink.models.example import example_inputs
from vitshrink.models.exported_attention import exported_attention


def write_onnx(
    model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], file: Path, dynamic: Mapping[str, Any]
) -> Path:
    """Write the program that a model runs for ``inputs``; ``dynamic`` are the dimensions of them that may differ.

    Raises OutputError.
    """
    with quiet(), torch.no_grad(), exported_attention(model):
        program = torch.onnx.export(
            model,
            (),
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dict(dynamic),
            dynamo=True,
            custom_translation_table=_missing_operators(),
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            # lines of the source files on this machine, once for each node: nobody else's business, and half the file
            # of a small model
            for key in [key for key in node.metadata_props if key != "namespace"]:
                del node.metadata_props[key]
        program.save(file)
    return file


def _missing_operators() -> dict[Any, Callable[..., Any]]:
    """Operators that ONNX has and the exporter does not know."""
    from onnxscript import INT32, ir
    from onnxscript import opset18 as op

    def product(left: Any, right: Any) -> Any:
        return op.MatMulInteger(left, right)

    def stable_sort(values: Any, *, dim: int = -1, descending: bool = False, **_stable: Any) -> Any:
        # TopK puts the lower index first among equals, as a stable sort does
        length: Any = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))  # type: ignore[type-var]
        if values.dtype in (ir.DataType.UINT8, ir.DataType.BOOL):  # onnxruntime has no TopK of bytes
            values = op.Cast(values, to=INT32.dtype)
        return op.TopK(values, length, axis=dim, largest=int(descending))

    return {torch.ops.aten._int_mm.default: product, torch.ops.aten.sort.stable: stable_sort}


def trace_inputs(model: PreTrainedModel, batch_size: int) -> dict[str, Tensor]:
    """Random inputs, texts with padding: what is exported must not depend on its absence."""
    inputs = example_inputs(model, batch_size)
    if "input_ids" in inputs:
        tokens, generator = inputs["input_ids"], torch.Generator().manual_seed(batch_size)
        length = max(2, tokens.shape[-1] // batch_size)  # another length for every batch size
        tokens = tokens[..., :length].clone()  # a view would leave its base in the guards of torch.export
        mask = torch.ones_like(tokens)
        mask[-1, ..., length // 2 :] = 0
        images = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
        inputs = {"input_ids": tokens, "attention_mask": mask, **images}
        kinds = getattr(model.config, "type_vocab_size", 0)
        if kinds and "token_type_ids" in signature(model.forward).parameters:
            inputs["token_type_ids"] = torch.randint(kinds, tokens.shape, generator=generator)
    return inputs


def dynamic_dimensions(inputs: Mapping[str, Tensor], batch: Any, sequence: Any) -> dict[str, dict[int, Any]]:
    """The dimensions that may differ from call to call, as the exporter wants them written; ``batch``: None if not."""
    choices = "choices" if isinstance(sequence, str) else sequence
    dimensions = (batch, choices, sequence) if inputs.get("input_ids", torch.empty(0)).ndim == 3 else (batch, sequence)
    free = {number: each for number, each in enumerate(dimensions) if each is not None}
    first = {} if batch is None else {0: batch}
    return dict.fromkeys(inputs, free if "input_ids" in inputs else first)


def outputs_of(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a model gives, by name."""
    with torch.no_grad():
        found = model(**inputs)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes of the exporters on their own progress; what they raise becomes an OutputError."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (VitshrinkError, MemoryError, OSError):
        raise
    except Exception as error:  # of any class there is, from several libraries
        first: BaseException = error
        while first.__cause__ is not None:  # the exporter wraps it in advice to those who develop the exporter
            first = first.__cause__
        reason = next(iter(str(first).strip().splitlines()), "")
        raise OutputError(
            f"the exporter of torch {torch.__version__} failed: {type(first).__name__}: {reason}"
        ) from error
    finally:
        logging.disable(disabled)
