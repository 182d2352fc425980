"""Whether two devices agree: what they plan for one model from the same samples, and what the plans are to lose.

    python benchmarks/agreement.py --model MODEL --calibration DATA
    python benchmarks/agreement.py --random b --samples 32           # ViT-B shapes, random weights and images
    python benchmarks/agreement.py --random tiny --devices cpu cpu   # a device with itself

Passes are in float32 on both, and nothing is refined. A row a job: the share of the layers that get the same form, how
far ranks or bits differ at most and on average, as a share of the larger, and what the plans are to lose on either.
Exits with 1 where ranks or bits differ by more than ``--tolerance`` on average, or losses by more than that.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from job import write_images, write_random_vit
from stages import config_of, job_parser
from tables import print_circumstances, print_head, print_row

from vitshrink.compression.choices import Choices
from vitshrink.compression.shrinking import Shrinking
from vitshrink.config.options import CompressConfig
from vitshrink.errors import VitshrinkError
from vitshrink.jobs.inputs import Inputs
from vitshrink.jobs.session import Session, Settings
from vitshrink.models.loading import moved
from vitshrink.runtime.device import find_device
from vitshrink.runtime.observer import Job, Silent


@dataclass(frozen=True)
class Planned:
    """Of every layer its rank, or its bits, and the losses of all together."""

    sizes: Mapping[str, float]
    loss: float


def planned(config: CompressConfig) -> Planned:
    """What a job chooses before anything is refined or repaired."""
    job, choices = Job(Silent()), Choices.of(config)
    session = Session.open(config.model, Settings.of(config), job, allow_compressed=False)
    dense = moved(session.source.model, session.device)
    shrinking = Shrinking.of(choices, dense, session.dtype(config.stored_dtype))
    calibration = Inputs.open(config, session, shrinking).calibration
    compressor = choices.compressor(shrinking.base, shrinking.targets, shrinking.dtype, calibration)
    plan = compressor.plan(compressor.learn(job), shrinking.sizes[0].budget)
    sizes = {
        name: float((0 if each.form is None else each.form.rank or each.form.bits) or 0) for name, each in plan.items()
    }
    return Planned(sizes, sum(each.loss for each in plan.values()))


def differences(one: Planned, other: Planned) -> list[float]:
    """Of the sizes of each layer, as shares of the larger."""
    pairs = [(one.sizes[name], other.sizes[name]) for name in one.sizes]
    return [abs(a - b) / max(a, b, 1e-30) for a, b in pairs]


def print_agreement(jobs: Sequence[tuple[str, Planned, Planned]], devices: Sequence[str], tolerance: float) -> bool:
    """One row a job. Returns whether all agree."""
    print_head(["job", "same form", "differ at most", "on average", *(f"loss, {device}" for device in devices)])
    agree = True
    for name, one, other in jobs:
        found = differences(one, other)
        same = sum(each == 0 for each in found) / len(found)
        print_row(
            [name, f"{same:.3f}", f"{max(found):.4f}", f"{mean(found):.4f}", f"{one.loss:.6g}", f"{other.loss:.6g}"]
        )
        apart = abs(one.loss - other.loss) / max(abs(one.loss), abs(other.loss), 1e-30)
        agree = agree and mean(found) <= tolerance and apart <= tolerance
    return agree


def parser() -> argparse.ArgumentParser:
    known = job_parser(__doc__, 32, ["keep=0.7", "keep=0.5", "bits=3"])
    known.add_argument("--devices", nargs=2, default=["cpu", "cuda"], metavar="DEVICE")
    known.add_argument("--tolerance", type=float, default=0.02)
    return known


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    args.holdout, args.device = 0, "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for device in args.devices:
                find_device(device)
            if args.random:
                write_random_vit(Path(scratch) / "model", args.blocks, args.random)
            if not args.calibration:
                write_images(Path(scratch) / "images", args.samples)
            configs = {job: replace(config_of(job, args, Path(scratch)), precision="no") for job in args.jobs}
            facts = {"model": args.model or f"ViT-{args.random.upper()} shapes", "samples": args.samples}
            print_circumstances("Agreement of devices", **facts, devices=" and ".join(args.devices))
            found = [
                (job, *(planned(replace(config, device=device)) for device in args.devices))
                for job, config in configs.items()
            ]
        except VitshrinkError as error:
            sys.exit(str(error))
    if not print_agreement(found, args.devices, args.tolerance):
        sys.exit(f"{' and '.join(args.devices)} differ by more than {args.tolerance:g}.")


if __name__ == "__main__":
    main()
