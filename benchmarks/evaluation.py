"""What an evaluation takes beside the bare forward passes of its model, as a Markdown table.

``passes`` runs the model over batches that lie ready in memory; ``evaluation`` does what ``vitshrink eval`` does from
the opened data set on: reading, decoding and preprocessing, the same passes, scores, intervals and the fingerprint of
the data. They are run in turn, since a machine is not equally fast all the time.

    python benchmarks/evaluation.py --model deit-tiny --data imagenet-val/ --limit 650
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from tables import print_circumstances, print_head, print_row

from vitshrink.config.options import DataConfig
from vitshrink.data import Batch, Preprocessor
from vitshrink.data.opening import open_data
from vitshrink.errors import VitshrinkError
from vitshrink.evaluation.measurement import measure
from vitshrink.models.loading import LoadedModel, load_dense
from vitshrink.models.tasks import task_of
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Silent


@torch.inference_mode()
def passes(loaded: LoadedModel, batches: Sequence[Batch], device: torch.device) -> float:
    """Seconds of the model alone."""
    start = time.perf_counter()
    for batch in batches:
        loaded.model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()})
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, help="samples; all if not given")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, help="threads that decode images; one a core if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    device = find_device(args.device)
    loaded = load_dense(args.model)
    loaded.model.to(device)
    preprocessor = Preprocessor.from_checkpoint(loaded.directory, loaded.family.modality)
    samples = open_data(DataConfig(args.data), loaded, offline=False).at_most(args.limit, 0)
    batches = list(preprocessor.batches(samples, args.batch_size))
    print_circumstances(
        "Evaluation beside bare forward passes",
        model=args.model,
        data=f"{args.data}, {len(samples)} samples",
        batch_size=args.batch_size,
    )
    print_head(["run", "passes, s", "evaluation, s", "overhead"])
    bare, whole = [], []
    passes(loaded, batches[:1], device)  # warm-up
    for run in range(args.repeats):
        bare.append(passes(loaded, batches, device))
        samples = replace(samples)  # one that has not been read yet
        start = time.perf_counter()
        measure(
            loaded.model,
            samples,
            preprocessor,
            Job(Silent()),
            task=task_of(loaded.model),
            baseline=None,
            device=device,
            batch_size=args.batch_size,
            workers=args.workers,
        )
        whole.append(time.perf_counter() - start)
        print_row([str(run + 1), f"{bare[-1]:.2f}", f"{whole[-1]:.2f}", f"{whole[-1] / bare[-1] - 1:.1%}"])
    print_row(["median", f"{median(bare):.2f}", f"{median(whole):.2f}", f"{median(whole) / median(bare) - 1:.1%}"])


if __name__ == "__main__":
    try:
        main()
    except VitshrinkError as error:
        sys.exit(f"error: {error}")
