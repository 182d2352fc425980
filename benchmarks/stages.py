"""What compressing a model costs, stage by stage, beside its bare passes over the same samples, and its memory.

    python benchmarks/stages.py --model MODEL --calibration DATA --samples 128
    python benchmarks/stages.py --model MODEL --calibration DATA --jobs keep=0.7 'keep=0.7 refine=0' target-size=4MB
    python benchmarks/stages.py --random l --samples 16 --jobs bits=3        # ViT-L shapes, random weights and images

A job is options of ``vitshrink compress`` as they stand in a recipe, ``name=value``. Every job runs in a process of its
own, and the passes before all jobs, which count, and again after them: a busy machine shows in the difference. Times
are of the processor, so that other work on the machine hardly counts; on a GPU they are those of the clock. ``over
passes`` is a multiple of one forward and one backward pass over the samples, in the arithmetic of the job. On a machine
with other work pass ``--threads 1``: threads that wait for each other take processor time, too.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from job import SHAPES, Passed, Ran, Taken, pass_over, run, write_images, write_random_vit
from tables import print_circumstances, print_head, print_row

from vitshrink.config.options import CompressConfig
from vitshrink.errors import VitshrinkError
from vitshrink.runtime.device import find_device

ALLOWED = 2.5, 2**30
"""Memory that a job may take: so many times the model in float32, and so many bytes."""

Result = TypeVar("Result")


def alone(work: Callable[[CompressConfig], Result], config: CompressConfig, threads: int | None) -> Result:
    """In a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, get_context("spawn"), partial(_start, threads)) as pool:
        return pool.submit(work, config).result()


def _start(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def config_of(job: str, args: argparse.Namespace, scratch: Path) -> CompressConfig:
    """A job of the command line. Raises UsageError."""
    entries: dict[str, Any] = {
        "model": args.model or str(scratch / "model"),
        "output": str(scratch / "compressed"),
        "calibration": args.calibration or str(scratch / "images"),
        "samples": args.samples,
        "holdout": args.holdout,
        "batch_size": args.batch_size,
        "device": args.device,
        "offline": True,
        "overwrite": True,
    }
    for each in job.split():
        name, _, value = each.partition("=")
        entries[name.replace("-", "_")] = yaml.safe_load(value)
    return CompressConfig.from_mapping(entries, f"--jobs {job!r}")


@dataclass(frozen=True)
class Table:
    """Prints a row a stage, as soon as its job is done; those of several sizes come one after the other."""

    passed: Passed
    processor: bool
    """Whether the time of the processor counts, or that of the clock."""

    def counted(self, taken: Taken) -> float:
        return taken.processor if self.processor else taken.wall

    def row(self, job: str, stage: str, taken: Taken) -> None:
        counted = self.counted(taken)
        shares = f"{counted:.1f}", f"{counted / self.counted(self.passed.both):.2f}"
        memory = f"{taken.peak / 1e9:.2f}" if taken.peak else "–"
        print_row([job, stage, f"{taken.wall:.1f}", *shares, memory])

    def passes(self, name: str, passed: Passed) -> None:
        self.row(name, "forward", passed.forward)
        self.row(name, "forward and backward", passed.both)
        self.row(name, "forward and backward, float32", passed.exact)

    def job(self, name: str, ran: Ran) -> None:
        for stage, taken in ran.stages:
            self.row(name, stage, taken)
        self.row(name, "between stages", ran.between)
        self.row(name, "**the whole job**", ran.whole)


def print_memory(jobs: Sequence[tuple[str, Ran]], passed: Passed) -> None:
    times, more = ALLOWED
    allowed = times * passed.model_bytes + more
    print(f"\nPeak memory; allowed are {times:g} models and {more >> 30} GiB, {allowed / 1e9:.2f} GB:\n")
    print_head(["job", "GB", "of the float32 model", "of what is allowed"])
    for name, peak in (("passes", passed.peak), *((name, ran.peak) for name, ran in jobs)):
        print_row([name, f"{peak / 1e9:.2f}", f"{peak / passed.model_bytes:.2f}", f"{peak / allowed:.2f}"])


def job_parser(description: str | None, samples: int, jobs: Sequence[str]) -> argparse.ArgumentParser:
    """The model, its samples and the jobs, as ``config_of`` reads them; with the defaults of a script."""
    known = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = known.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="a checkpoint")
    model.add_argument("--random", choices=SHAPES, help="random weights in the shapes of a ViT")
    known.add_argument("--blocks", type=int, help="blocks of the random model, if not all")
    known.add_argument("--calibration", help="samples; random images if not given")
    known.add_argument("--samples", type=int, default=samples)
    known.add_argument("--batch-size", type=int, help="by the model if not given")
    known.add_argument("--jobs", nargs="+", default=jobs, metavar="'NAME=VALUE …'")
    return known


def parser() -> argparse.ArgumentParser:
    known = job_parser(__doc__, 128, ["keep=0.7", "bits=3"])
    known.add_argument("--holdout", type=int, default=0)
    known.add_argument("--device", default="auto")
    known.add_argument("--threads", type=int)
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    device = find_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            configs = {job: config_of(job, args, Path(scratch)) for job in args.jobs}
            if args.random:
                write_random_vit(Path(scratch) / "model", args.blocks, args.random)
            if not args.calibration:
                write_images(Path(scratch) / "images", args.samples + args.holdout)
            first = next(iter(configs.values()))
            facts: dict[str, Any] = {"model": args.model or f"ViT-{args.random.upper()} shapes", "device": device}
            facts["batch_size"] = args.batch_size or "by the model"
            print_circumstances("Stages of a job", **facts, samples=args.samples)
            passed = alone(pass_over, first, args.threads)
            table, ran = Table(passed, device.type == "cpu"), list[tuple[str, Ran]]()
            print_head(["job", "stage", "seconds", "counted", "over passes", "GB at most"], texts=2)
            table.passes("passes", passed)
            for job, config in configs.items():
                ran.append((job, alone(run, config, args.threads)))
                table.job(*ran[-1])
            table.passes("passes, again", alone(pass_over, first, args.threads))
        except VitshrinkError as error:
            sys.exit(str(error))
    print_memory(ran, passed)


if __name__ == "__main__":
    main()
