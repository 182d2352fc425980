"""What several processes save of a job: the processor time of every stage, of one process and of each of several.

Time of the processor, with one thread a process, hardly depends on what else the machine does. Waiting for each other
takes none, so that several processes are as fast as the slowest of them, and no faster than ``share`` tells.

    python benchmarks/processes.py FOLDER --make --blocks 4 --samples 32
    OMP_NUM_THREADS=1 python benchmarks/processes.py FOLDER
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/processes.py FOLDER
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from job import write_images
from tables import print_circumstances, print_head, print_row
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitshrink.config.options import CompressConfig
from vitshrink.jobs.compress import compress
from vitshrink.models.loading import quiet_transformers
from vitshrink.runtime import processes
from vitshrink.runtime.observer import Silent

WHOLE = "whole job"


class Spent(Silent):
    """The seconds of the processor that each stage took in this process."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, _total: int | None = None) -> Iterator[Callable[[int], None]]:
        started = time.process_time()
        yield lambda _steps: None
        self.stages[title] = self.stages.get(title, 0.0) + time.process_time() - started


def write_vit_s(directory: Path, blocks: int) -> None:
    """The shapes of ViT-S/16 at 224 pixels, with random weights."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=blocks, num_labels=1000
    )
    with quiet_transformers():
        ViTForImageClassification(config).save_pretrained(directory)
        ViTImageProcessorPil(do_resize=True, size={"height": 224, "width": 224}).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true", help="write a ViT-S of random weights and images, run nothing")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--method", default="curvature")
    parser.add_argument("--refine", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.make:
        write_vit_s(arguments.folder / "model", arguments.blocks)
        write_images(arguments.folder / "images", 2 * arguments.samples)
        return
    torch.set_num_threads(1)
    processes.join("cpu")
    with tempfile.TemporaryDirectory() as output:
        refine = {} if arguments.refine is None else {"refine": arguments.refine}
        config = CompressConfig(
            str(arguments.folder / "model"),
            f"{output}/out",
            keep=(0.6,),
            method=arguments.method,
            calibration=str(arguments.folder / "images"),
            samples=arguments.samples,
            holdout=0,
            batch_size=arguments.batch_size,
            device="cpu",
            offline=True,
            **refine,
        )
        spent, started = Spent(), time.process_time()
        compress(config, spent)
        spent.stages[WHOLE] = time.process_time() - started
    shares = processes.gather(spent.stages)
    if processes.is_main():
        print_circumstances(
            "Processor time of a job", processes=len(shares), method=config.method, samples=config.samples
        )
        print_head(["stage", *(f"process {number}, s" for number in range(len(shares))), "longest"])
        critical = 0.0
        for title in spent.stages:
            each = [share.get(title, 0.0) for share in shares]
            critical += max(each) if title != WHOLE else 0
            print_row([title, *(f"{seconds:.1f}" for seconds in each), f"{max(each):.1f}"])
        print_row(["longest of all stages", *("" for _ in shares), f"{critical:.1f}"])
    processes.leave()


if __name__ == "__main__":
    main()
