"""How well a job foretells when it ends: what it says is left, beside what was.

    python benchmarks/left.py --model MODEL --calibration DATA --samples 128 --jobs keep=0.7 bits=3

A job is options of ``vitshrink compress`` as they stand in a recipe. What it says is kept at every step; the ratio is
of what it says to what is left indeed, at a quarter, a half and three quarters of its time, and the largest and the
smallest between a tenth and nine tenths.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from job import write_images, write_random_vit
from stages import config_of, job_parser
from tables import print_circumstances, print_head, print_row

from vitshrink.errors import VitshrinkError
from vitshrink.jobs.compress import compress
from vitshrink.runtime.observer import Silent

SHARES = 0.25, 0.5, 0.75


class Foretold(Silent):
    """Keeps what a job says is left, (seconds since it could say anything, seconds left)."""

    def __init__(self) -> None:
        self.left: Callable[[], float | None] = lambda: None
        self.said: list[tuple[float, float]] = []

    def foresee(self, left: Callable[[], float | None]) -> None:
        self.left = left

    def look(self) -> None:
        if (left := self.left()) is not None:
            self.said.append((time.perf_counter(), left))

    @contextmanager
    def stage(self, _title: str, _total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.look()
        yield lambda _steps: self.look()
        self.look()


def ratios(said: Sequence[tuple[float, float]], began: float, ended: float) -> list[tuple[float, float]]:
    """Share of the time that has passed, and what was said to be left over what was."""
    whole = ended - began
    return [((now - began) / whole, left / (ended - now)) for now, left in said if now < ended]


def at(found: Sequence[tuple[float, float]], share: float) -> float:
    """The ratio that was said last before a share of the time had passed."""
    return [ratio for passed, ratio in found if passed <= share][-1]


def main(arguments: Sequence[str] | None = None) -> None:
    known = job_parser(__doc__, 128, ["keep=0.7", "bits=3"])
    known.set_defaults(holdout=0, device="cpu")
    known.add_argument("--threads", type=int)
    args = known.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if args.random:
            write_random_vit(Path(scratch) / "model", args.blocks, args.random)
        if not args.calibration:
            write_images(Path(scratch) / "images", args.samples)
        model = args.model or f"ViT-{args.random.upper()} shapes"
        print_circumstances("Time left, as it is said, over what is left", model=model, samples=args.samples)
        print_head(["job", "seconds", *(f"at {share:.0%}" for share in SHARES), "least", "most"])
        for job in args.jobs:
            observer, began = Foretold(), time.perf_counter()
            try:
                compress(config_of(job, args, Path(scratch)), observer)
            except VitshrinkError as error:
                sys.exit(str(error))
            ended = time.perf_counter()
            found = ratios(observer.said, began, ended)
            middle = [ratio for passed, ratio in found if 0.1 <= passed <= 0.9]
            figures = [*(at(found, share) for share in SHARES), min(middle), max(middle)]
            print_row([job, f"{ended - began:.0f}", *(f"{figure:.2f}" for figure in figures)])


if __name__ == "__main__":
    main()
