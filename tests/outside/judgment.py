"""Whether what a command did is what a user may expect."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitshrink.runtime.checksums import broken_files

from .case import Case
from .checkpoint import Checkpoint
from .commands import COMMANDS, Command, Job
from .data import Data
from .images import Images
from .place import Place
from .process import Ended, alone, new_directory, run
from .table import Table

DOCUMENTED = (0, 1, 2, 3)
"""Exit codes of docs/exit-codes.md, but those of a process that somebody ended."""
_NAMED = re.compile(
    r"--[a-z]|[/\\]|\.\w{2,12}\b|\b(row|line|sample|layer|tensor|column)s? |'[^']+'|standard (output|error)|\d"
)
_EXCUSES = re.compile(r"cannot reach|could not be reached|has no rank for heads")
"""Reasons for which a job that should work may be refused: the sizes of the commands do not fit every model."""
_LEFT_BY_OTHERS = {".ses"}
"""What onnxruntime leaves in the temporary directory."""
_NOISE = re.compile(r"Exception ignored|ResourceWarning|DeprecationWarning|FutureWarning|UserWarning|RuntimeWarning")


@dataclass(frozen=True)
class Verdict:
    """``outcome`` is works, refused, failed, or unbuilt where the case itself cannot be made."""

    case: str
    outcome: str
    problems: tuple[str, ...]
    """What is wrong, each beginning with its kind and a colon."""
    said: str
    """The last thing that the commands said."""
    seconds: float

    @property
    def kinds(self) -> set[str]:
        return {problem.partition(":")[0] for problem in self.problems}


def judge(case: Case) -> Verdict:
    """Make a case, run it and look at what came of it."""
    with new_directory() as root:
        place = Place(root)
        try:
            job = _prepare(case, place)
        except Exception as error:
            return Verdict(str(case), "unbuilt", (), f"{type(error).__name__}: {error}", 0.0)
        try:
            return _judge(case, job)
        finally:
            for undo in place.after:
                undo(place)


def _prepare(case: Case, place: Place) -> Job:
    for directory in (place.inputs, place.work, place.root / "tmp"):
        directory.mkdir()
    place.environment["TMPDIR"] = str(place.root / "tmp")
    checkpoint = Checkpoint(case.architecture)
    for part, kind in ((checkpoint, Checkpoint), (place, Place)):
        for each in case.changes(kind):
            each.change(part)
    samples = (Table if checkpoint.reads == "text" else Images)(checkpoint)
    for each in case.changes(type(samples)):
        each.change(samples)
    reference = checkpoint.write(place.inside(b"written"))  # not every library writes under every name
    place.inside(b"written").rename(place.inside(place.model))
    place.inside(place.data).mkdir()
    data = samples.write(place.inside(place.data), reference)
    for prepare in place.before:
        prepare(place)
    return Job(checkpoint, place, data)


def _judge(case: Case, job: Job) -> Verdict:
    command, place = COMMANDS[case.command], job.place
    inputs, before = dict(_tree(place.inputs)), dict(_tree(place.work))
    steps = _run(command, job)
    last = steps[-1]
    works = last.status == 0
    problems = [problem for step in steps for problem in process_problems(step, place)]
    if works and case.must == "refused":
        problems.append("accepted: it should have been refused")
    if not works and case.must == "works" and not problems and not _EXCUSES.search(_message(last)):
        problems.append(f"refused: {_message(last)}")
    if dict(_tree(place.inputs)) != inputs:
        changed = _difference(inputs, dict(_tree(place.inputs)))
        problems.append(f"inputs changed: {changed}")
    problems += _leftovers(job, command, before, works)
    if works and not problems:
        problems += _of_figures(command, job, last)
        problems += _of_output(command, job)
        problems += _of_repetition(command, job)
    outcome = "failed" if problems else "works" if works else "refused"
    said = _message(last) if not problems else "\n".join([*problems, *(_shown(step) for step in steps)])
    return Verdict(str(case), outcome, tuple(problems), said, sum(step.seconds for step in steps))


def _run(command: Command, job: Job) -> list[Ended]:
    """The command lines one after the other, as far as they work."""
    steps: list[Ended] = []
    for line in command.lines(job):
        steps.append(run(line, job.place))
        if steps[-1].status != 0:
            break
    return steps


def process_problems(step: Ended, place: Place) -> Iterator[str]:
    """What one command did, whatever it was."""
    text = step.stdout + step.stderr
    if step.status is None:
        yield "hangs: it was stopped after a long time"
    elif place.ended is not None and step.status in (-place.ended[0], 128 + place.ended[0]):
        return  # it could not even start, or it says that it was ended
    elif step.status < 0:
        yield f"killed: by signal {-step.status}"
    elif step.status not in DOCUMENTED:
        yield f"exit code: {step.status} is not documented"
    if "Traceback (most recent call last)" in text:
        yield f"traceback: {text.strip().splitlines()[-1]}"
    if "this is a bug" in text.lower():
        yield f"called a bug: {_message(step)}"
    if noise := _NOISE.search(step.stderr):
        yield f"noise: {next(line for line in step.stderr.splitlines() if noise[0] in line)}"
    if step.status and place.complained:
        if "error" not in step.stderr.lower() and place.stdout != "gone":  # then nobody is left to tell
            yield f"silent: it ended with {step.status} and said nothing of it"
        elif place.columns >= 80 and not _NAMED.search(_message(step)):
            yield f"vague: {_message(step)}"


def _message(step: Ended) -> str:
    """The error, or the last line."""
    found = re.search(r"error: (.*)", step.stderr, re.DOTALL | re.IGNORECASE)
    lines = step.stderr.strip().splitlines() or step.stdout.strip().splitlines() or [""]
    return found[1].strip() if found else lines[-1]


def _shown(step: Ended) -> str:
    line = " ".join(ascii(word)[1:-1] for word in step.line)
    output = step.stdout[-600:] if len(step.stdout) < 3000 else "…"
    return f"$ vitshrink {line}\n{output}{step.stderr[-3000:]}[{step.status}]"


def _tree(directory: Path) -> Iterator[tuple[str, str]]:
    """What lies below a directory, by name."""
    for where, folders, files in os.walk(directory):
        for name in [*folders, *files]:
            path = Path(where, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                content = f"link to {os.readlink(path)}"
            elif stat.S_ISREG(mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                content = stat.filemode(mode)
            yield os.path.relpath(path, directory), content


def _difference(before: dict[str, str], after: dict[str, str]) -> str:
    names = sorted(ascii(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return ", ".join(names[:5])


def _leftovers(job: Job, command: Command, before: dict[str, str], works: bool) -> Iterator[str]:
    """What lies where nothing should."""
    place = job.place
    after = dict(_tree(place.work))
    expected = [job.beside("small"), job.beside("sweep.yaml")]
    in_time = place.ended is not None and not broken_files(job.output)  # published before the signal came
    if works or in_time or command.may_leave or not place.printed:  # what is done stays done
        expected += [job.output, job.output.with_name(job.output.name + ".html")]
    if place.scarce or place.ended is not None:  # what was computed is kept for the next time
        expected.append(job.output.with_name(f".{job.output.name}.vitshrink-state"))
    roots = [os.path.relpath(path, place.work) for path in expected]

    def ours(name: str) -> bool:
        return any(name == root or name.startswith(f"{root}/") or root.startswith(f"{name}/") for root in roots)

    left = {name for name in after if before.get(name) != after[name] and not ours(name)}
    gone = {name for name in before if name not in after and not ours(name)}
    if left or gone:
        yield f"left behind: {', '.join(sorted(map(ascii, left | gone))[:5])}"
    if temporary := sorted(map(ascii, {*os.listdir(place.root / "tmp")} - _LEFT_BY_OTHERS)):
        yield f"left in the temporary directory: {', '.join(temporary[:5])}"
    if works and command.writes in ("compressed", "dense", "other") and not _written(job):
        yield "nothing written: it ended with 0"


def _written(job: Job) -> bool:
    return job.output.is_dir() or job.output.with_name(job.output.name + ".html").exists()


def _of_figures(command: Command, job: Job, last: Ended) -> Iterator[str]:
    if not (command.evaluates and job.data.counted) or (command.writes == "nothing" and job.place.stdout != "file"):
        return
    try:
        report = json.loads(last.stdout if command.writes == "nothing" else (job.output / "report.json").read_bytes())
    except ValueError as error:
        yield f"figures: not JSON ({error})"
    else:
        yield from figure_problems(report, job.data)


def figure_problems(report: dict[str, Any], data: Data) -> Iterator[str]:
    """Whether a report counts the samples that there are, and finds the model right where it is."""
    found = report["evaluation"]
    bad = report.get("bad_samples", found.get("bad_samples", {}))
    if found["samples"] != data.good:
        yield f"samples: {found['samples']} are counted, {data.good} can be used"
    if len(bad) != data.bad:
        yield f"bad samples: {len(bad)} are counted, there are {data.bad}"
    scores = found["dense"] or {}
    if data.labeled and found["metric"] is None:
        yield "labels: they are there, and nothing is said of them"
    if data.labeled and data.right and found["metric"] == "top1" and scores.get("top1") != 1:
        yield f"accuracy: the labels are the model's own answers, and it is said to have {scores.get('top1')} right"


def _of_output(command: Command, job: Job) -> Iterator[str]:
    """Whether the output verifies, and what is made of it by those who load it."""
    if command.writes == "compressed":
        with new_directory() as elsewhere:
            place = Place(elsewhere)
            place.work.mkdir()
            verified = run(["verify", str(job.output)], place)
        if verified.status != 0:
            yield f"verify: {_message(verified)}"
    if command.writes in ("compressed", "dense"):
        said = alone(lambda: _loaded(job))
        if said != "loaded":
            yield f"reload: {said}"


def _loaded(job: Job) -> str:
    import transformers

    import vitshrink  # noqa: F401 - transformers learns the format from it

    directory = job.output
    names = json.loads((directory / "config.json").read_bytes()).get("architectures") or [job.checkpoint.architecture]
    transformers.logging.set_verbosity_error()
    model = getattr(transformers, names[0]).from_pretrained(directory)
    return "loaded" if not model.training else "the model is in training mode"


def _of_repetition(command: Command, job: Job) -> Iterator[str]:
    """Whether the same command writes the same weights again."""
    if command.writes != "compressed" or job.place.scarce or job.place.ended is not None:
        return
    again = Job(job.checkpoint, job.place, job.data, number=job.number + 1)
    last = _run(command, again)[-1]
    if last.status != 0:
        yield f"repetition: the second time it ended with {last.status}: {_message(last)}"
    elif _weights(job) != _weights(again):
        yield "repetition: the second time the weights were others"


def _weights(job: Job) -> list[str]:
    return sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in job.output.glob("*.safetensors"))
