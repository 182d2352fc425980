"""A model in PyTorch and in onnxruntime: how far apart the outputs are, and how long a batch takes.

python benchmarks/export.py --model MODEL SMALLER_MODEL
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tables import print_circumstances, print_head, print_row

from vitshrink.jobs.export import export
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.loading import load_dense
from vitshrink.models.onnx_model import load_onnx


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row a model; ``--model`` is dense or compressed."""
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--model", required=True, nargs="+")
    known.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    known.add_argument("--repeats", type=int, default=20)
    known.add_argument("--length", type=int, default=32, help="tokens of the texts that are timed")
    given = known.parse_args(arguments)
    print_circumstances("ONNX", unit="milliseconds a batch, median", repeats=given.repeats)
    timed = [f"{what}, {batch}" for batch in given.batches for what in ("PyTorch", "onnxruntime")]
    print_head(["model", "parameters", "ONNX MB", "difference", *timed])
    for path in given.model:
        with TemporaryDirectory() as folder:
            found = export(path, f"{folder}/onnx", "onnx", offline=True)
            models = {
                "PyTorch": load_dense(path, allow_compressed=True).model,
                "onnxruntime": load_onnx(found.directory / found.file).model,
            }
            cells = [
                Path(path).name,
                f"{cost.parameters(models['PyTorch']):,}",
                f"{found.bytes / 1e6:.1f}",
                f"{found.difference:.1e}",
            ]
            for batch in given.batches:
                inputs = example_inputs(models["PyTorch"], batch)
                if "input_ids" in inputs:
                    inputs = {name: tensor[:, : given.length] for name, tensor in inputs.items()}
                latency = cost.latency(models, inputs, repeats=given.repeats)
                cells += [f"{1000 * latency[name].median:.1f}" for name in models]
            print_row(cells)


if __name__ == "__main__":
    main()
