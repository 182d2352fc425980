"""A model in PyTorch, onnxruntime and OpenVINO: how far apart the outputs are, and how long a batch takes.

python benchmarks/export.py --model MODEL SMALLER_MODEL

All that stands in a column of times is timed in turn. A model with pivots has a second row, with pivots as they are
stored: what the exporter makes of it without ``plain_view``. OpenVINO is left out where it is not installed.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from tables import print_circumstances, print_head, print_row
from torch import nn

from vitshrink.jobs import export_forms
from vitshrink.jobs.export import Export, export
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.exported import load_exported
from vitshrink.models.loading import load_dense
from vitshrink.models.onnx_model import OnnxModel
from vitshrink.models.openvino_model import open_ir
from vitshrink.models.structures.coded import decode_all
from vitshrink.models.structures.low_rank import LowRankLinear
from vitshrink.models.views import view_of


@dataclass(frozen=True)
class Entry:
    """A row of the table: ``models`` by runtime."""

    name: str
    exported: Export
    models: dict[str, nn.Module]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row a model; ``--model`` is dense or compressed."""
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model", required=True, nargs="+")
    known.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    known.add_argument("--repeats", type=int, default=20)
    known.add_argument("--length", type=int, default=32, help="tokens of the texts that are timed")
    given = known.parse_args(arguments)
    with TemporaryDirectory() as folder:
        entries = [entry for path in given.model for entry in _entries(path, Path(folder))]
        print_circumstances("ONNX and OpenVINO", unit="milliseconds a batch, median", repeats=given.repeats)
        runtimes = list(entries[0].models)
        timed = [f"{runtime}, {batch}" for batch in given.batches for runtime in runtimes]
        print_head(["model", "parameters", "ONNX MB", "difference", *timed])
        times = [_times(entries, batch, given) for batch in given.batches]
        for entry in entries:
            found, torch_model = entry.exported, entry.models["PyTorch"]
            cells = [entry.name, f"{cost.parameters(torch_model):,}", f"{found.bytes / 1e6:.1f}"]
            cells += [f"{found.difference:.1e}"]
            print_row(cells + [f"{at[entry.name, runtime]:.1f}" for at in times for runtime in runtimes])


def _entries(path: str, folder: Path) -> Iterator[Entry]:
    """The model as it is exported, and before that with pivots as they are stored, where it has any."""
    model, name = load_dense(path, allow_compressed=True).model, Path(path).name
    if any(isinstance(layer, LowRankLinear) and layer.spec.pivot is not None for layer in model.modules()):
        with patch.object(export_forms, "plain_view", lambda each: decode_all(view_of(each))):
            yield _entry(path, f"{name}, pivots", model, folder)
    yield _entry(path, name, model, folder)


def _entry(path: str, name: str, model: Any, folder: Path) -> Entry:
    found = export(path, str(folder / f"{name}-onnx"), "onnx", offline=True)
    models = {"PyTorch": model, "onnxruntime": load_exported(found.directory / found.file).model}
    if find_spec("openvino"):
        other = export(path, str(folder / f"{name}-openvino"), "openvino", offline=True)
        opened = open_ir(other.directory / other.file)
        models["OpenVINO"] = OnnxModel(opened, model.config, type(model).__name__).eval()
    return Entry(name, found, models)


def _times(entries: Sequence[Entry], batch: int, given: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Milliseconds by model and runtime, of all that take the same inputs in turn."""
    found = {}
    for kind in {entry.models["PyTorch"].main_input_name for entry in entries}:
        alike = [entry for entry in entries if entry.models["PyTorch"].main_input_name == kind]
        inputs = example_inputs(alike[0].models["PyTorch"], batch)
        if "input_ids" in inputs:
            inputs = {name: tensor[:, : given.length] for name, tensor in inputs.items()}
        keys = {f"{entry.name}/{runtime}": (entry.name, runtime) for entry in alike for runtime in entry.models}
        models = {
            key: next(e for e in alike if e.name == name).models[runtime] for key, (name, runtime) in keys.items()
        }
        for key, latency in cost.latency(models, inputs, repeats=given.repeats).items():
            found[keys[key]] = 1000 * latency.median
    return found


if __name__ == "__main__":
    main()
