"""``python -m tests.outside``: run many cases, or one that is named."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from random import Random

from .case import Case, draw, plain, singles
from .judgment import Verdict
from .oddity import ODDITIES
from .zygote import Zygotes


@dataclass(frozen=True)
class Failure:
    """A case that fails, and the smallest one that fails in the same way."""

    verdict: Verdict
    smallest: Verdict

    def __str__(self) -> str:
        return (
            f"{self.smallest.said}\n"
            f"reproduce: python -m tests.outside --case '{self.smallest.case}'\n"
            f"found by:  python -m tests.outside --case '{self.verdict.case}'"
        )


def shrink(verdict: Verdict, zygotes: Zygotes) -> Verdict:
    """Drop one oddity after the other, as long as it fails in the same way."""
    for name in Case.parse(verdict.case).oddities:
        smaller = zygotes.judge(Case.parse(verdict.case).without(name))
        if smaller.kinds & verdict.kinds:
            verdict = smaller
    return verdict


def run(cases: Iterable[Case], zygotes: Zygotes, jobs: int) -> Generator[Verdict | Failure, None, None]:
    """What came of each, as they end; where the caller stops, no other case begins."""

    def one(case: Case) -> Verdict | Failure:
        verdict = zygotes.judge(case)
        return Failure(verdict, shrink(verdict, zygotes)) if verdict.problems else verdict

    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(one, case) for case in cases]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def chosen(arguments: argparse.Namespace) -> list[Case]:
    if arguments.case:
        return [Case.parse(text) for text in arguments.case]
    cases = [*plain(), *singles(arguments.seed)] if arguments.singles else []
    cases += [draw(number) for number in range(arguments.seed, arguments.seed + arguments.count)]
    return [case for case in cases if arguments.only in str(case)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.outside", description=__doc__)
    parser.add_argument("--case", action="append", help="a number, or ARCHITECTURE COMMAND ODDITY …; repeatable")
    parser.add_argument("--count", type=int, default=300, help="cases drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="number of the first of them")
    parser.add_argument("--singles", action="store_true", help="every command alone and every oddity alone as well")
    parser.add_argument("--only", default="", help="cases whose text holds this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="cases at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after this time")
    parser.add_argument("--list", action="store_true", help="show the cases, run none")
    arguments = parser.parse_args()
    cases = chosen(arguments)
    if arguments.list:
        print(*cases, sep="\n")
        return 0
    Random(arguments.seed).shuffle(cases)  # what takes long is spread
    began = time.monotonic()
    outcomes: Counter[str] = Counter()
    failures: dict[tuple[str, ...], list[Failure]] = {}
    with Zygotes() as zygotes:
        results = run(cases, zygotes, arguments.jobs)
        for number, result in enumerate(results, start=1):
            if isinstance(result, Failure):
                outcomes["failed"] += 1
                alike = failures.setdefault((*sorted(result.smallest.kinds), *_oddities(result)), [])
                if not alike:
                    print(f"\n[{number}/{len(cases)}] {result}", flush=True)
                alike.append(result)
            else:
                outcomes[result.outcome] += 1
                if arguments.case or result.outcome == "unbuilt":
                    print(f"{result.outcome}: {result.case} ({result.said})", flush=True)
            if time.monotonic() - began > 60 * arguments.minutes:
                break
        results.close()
    seconds = f"{time.monotonic() - began:.0f} s"
    print(f"\n{outcomes.total()} of {len(cases)} combinations of {len(ODDITIES)} oddities in {seconds}")
    for outcome in ("works", "refused", "unbuilt", "failed"):
        print(f"{outcome:>8}  {outcomes[outcome]}")
    for key, alike in sorted(failures.items()):
        print(f"{len(alike):>8}  {', '.join(key)}")
    return 1 if failures else 0


def _oddities(failure: Failure) -> tuple[str, ...]:
    return Case.parse(failure.smallest.case).oddities or (Case.parse(failure.smallest.case).command,)


if __name__ == "__main__":
    sys.exit(main())
