"""Whether a change of the code leaves the results as they were: the same weights, to the byte, as an older commit.

    python benchmarks/same_bytes.py --against main
    python benchmarks/same_bytes.py --against HEAD~3 --jobs 'vit curvature*' bert*
    python benchmarks/same_bytes.py --against main --real MODEL --calibration DATA

The commit's code and that of the working tree run the same jobs by the command line, on tiny models with seeded
weights, with one thread on the CPU. Exits with 1 where a job gives other weights, other structures, or fails.
``--against HEAD`` in a clean tree tells which jobs do not give the same twice.
"""

import argparse
import fnmatch
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LABELS: dict[str, Any] = {"num_labels": 4, "initializer_range": 0.1}
WORDS = ("a", "and", "bad", "film", "good", "is", "it", "not", "of", "so", "that", "the", "this", "was")

COMPRESS = "compress --samples 16 --holdout 8 --batch-size 8 --device cpu --calibration"
"""Of every job that compresses; the samples come next."""

WORKER = """
import contextlib, importlib, json, os, runpy, sys
sys.modules["matplotlib"] = None  # figures of reports would take half of the time
import transformers.models.bert.modeling_bert, transformers.models.vit.modeling_vit, vitshrink
answers, silence = os.dup(1), os.open(os.devnull, os.O_WRONLY)
def answer(text):
    os.write(answers, f"{text}\\n".encode())
def run(words, output):
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = ["vitshrink", *words]
    runpy.run_module("vitshrink", run_name="__main__")
try:
    run(["methods"], silence)  # for what it imports, in older commits
except SystemExit:
    pass
for job in ("compress", "finetune", "quantize", "export"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"vitshrink.jobs.{job}")
answer(os.path.dirname(vitshrink.__file__))
for line in sys.stdin:
    words, log = json.loads(line)
    child = os.fork()
    if not child:
        run(words, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        os._exit(0)
    answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""What a tree's process does: it imports once, and runs each job in a copy of itself that no job before has touched."""


@dataclass(frozen=True)
class Job:
    """A command of vitshrink: words before the model, and flags after the output."""

    name: str
    model: str
    command: Sequence[str]

    @property
    def words(self) -> list[str]:
        verb, *flags = self.command
        return [verb, self.model, self.name.replace(" ", "-"), *flags, "--offline", "--quiet"]


FLAGS = {
    "svd": "--method svd --keep 0.8",
    "asvd": "--method asvd --keep 0.8",
    "whitened": "--method whitened --keep 0.8",
    "mixed-rank": "--method mixed-rank --keep 0.8",
    "curvature": "--keep 0.8",
    "curvature refine-0": "--keep 0.8 --refine 0",
    "curvature int8": "--keep 0.8 --quantize int8",
    "heads-joint": "--method heads-joint --keep 0.9",
    "max-kl": "--max-kl 0.01",
    "distill": "--method svd --keep 0.8 --finetune distill --finetune-option epochs=1 --finetune-option batch-size=4",
}
"""Of jobs that compress, by name."""

QUANTIZE = {"quantize int8": "--weights int8", "quantize int4": "--weights int4"}


def tiny_jobs(folder: Path) -> list[Job]:
    """Those on the two models of ``write_models``."""
    found = []
    for kind, samples in (("vit", "images"), ("bert", "texts.txt")):
        model = str(folder / kind)
        for name, flags in FLAGS.items():
            command = [*COMPRESS.split(), str(folder / samples), *flags.split()]
            found.append(Job(f"{kind} {name}", model, command))
        found += [Job(f"{kind} {name}", model, ["quantize", *flags.split()]) for name, flags in QUANTIZE.items()]
    return found


def write_models(folder: Path) -> None:
    """``vit`` and ``bert``, classifiers with seeded weights, and ``images`` and ``texts.txt`` to calibrate them on."""
    image = transformers.ViTConfig(**SIZES, **LABELS, image_size=32, patch_size=8)
    _write_weights(transformers.ViTForImageClassification, image, folder / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    processor |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))

    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    text = transformers.BertConfig(**SIZES, **LABELS, vocab_size=len(vocabulary), max_position_embeddings=32)
    _write_weights(transformers.BertForSequenceClassification, text, folder / "bert")
    transformers.BertTokenizer(vocab=vocabulary, model_max_length=32).save_pretrained(folder / "bert")

    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(32):
        pixels = generator.integers(0, 256, size=(40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:02d}.png")
    lines = (" ".join(generator.choice(WORDS, size=generator.integers(3, 13))) for _ in range(32))
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")


def _write_weights(kind: Any, config: Any, directory: Path) -> None:
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: no weight is left at zero or one
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)


class Tree:
    """One version of the code, in a process of its own, which writes its results into ``folder``."""

    def __init__(self, code: Path, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        env = os.environ | one | {"PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = self._answer()
        if Path(found).parent != code:
            raise RuntimeError(f"the code of {found or 'no folder'} was imported instead of that of {code}")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, job: Job) -> str:
        """A digest of the weights and structures that a job gives; empty where it fails, and its log is shown."""
        assert self._process.stdin is not None
        log = self.folder / "log.txt"
        log.unlink(missing_ok=True)
        self._process.stdin.write(json.dumps([job.words, str(log)]) + "\n")
        self._process.stdin.flush()
        if self._answer() == "0":
            return digest(self.folder / job.words[2])
        print(f"{job.name} failed:\n{log.read_text()[-2000:]}", file=sys.stderr)
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def digest(directory: Path) -> str:
    """SHA-256 of ``model.safetensors``, and of the structures in the config where they are others."""
    weights = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()[:12]
    config = json.loads((directory / "config.json").read_text())
    layers = json.dumps(config["quantization_config"]["layers"], sort_keys=True)
    return f"{weights} {hashlib.sha256(layers.encode()).hexdigest()[:6]}"


def check_out(commit: str, folder: Path) -> Path:
    """The package as it was at ``commit``, in ``folder``."""
    command = ["git", "-C", str(ROOT), "archive", commit, "vitshrink"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"--against {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def compare(jobs: Sequence[Job], old: Tree, new: Tree) -> list[str]:
    """Print a row a job; the names of those that differ or fail."""
    different = []
    print("| job | old weights, structures | new weights, structures | |\n| --- | --- | --- | --- |")
    for job in jobs:
        before, after = old.run(job), new.run(job)
        same = before == after != ""
        if not same:
            different.append(job.name)
        verdict = "same" if same else "DIFFERENT" if before and after else "FAILED"
        print(f"| {job.name} | {before or '–'} | {after or '–'} | {verdict} |", flush=True)
    return different


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--against", required=True, metavar="COMMIT", help="what to compare the working tree with")
    known.add_argument("--jobs", nargs="+", default=["*"], metavar="PATTERN", help="only jobs of such names")
    known.add_argument("--list", action="store_true", help="print the names of the jobs and run none")
    known.add_argument("--real", metavar="MODEL", help="one job on this checkpoint instead")
    known.add_argument("--calibration", metavar="DATA", help="its samples")
    known.add_argument("--flags", default="--keep 0.7 --samples 64 --holdout 16", help="its flags (%(default)s)")
    return known


def chosen_jobs(args: argparse.Namespace, folder: Path) -> list[Job]:
    if args.real:
        data, model = (str(Path(path).absolute()) for path in (args.calibration, args.real))
        return [Job("real", model, [*COMPRESS.split(), data, *args.flags.split()])]
    return [job for job in tiny_jobs(folder) if any(fnmatch.fnmatch(job.name, pattern) for pattern in args.jobs)]


def main(arguments: Sequence[str] | None = None) -> None:
    known = parser()
    args = known.parse_args(arguments)
    if bool(args.real) != bool(args.calibration):
        known.error("--real and --calibration go together")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        jobs = chosen_jobs(args, folder)
        if args.list or not jobs:
            print("\n".join(job.name for job in jobs or tiny_jobs(folder)))
            sys.exit(None if jobs else f"no job is called {' or '.join(args.jobs)}")
        code = check_out(args.against, folder / "code")
        if not args.real:
            write_models(folder)
        with Tree(code, folder / "old") as old, Tree(ROOT, folder / "new") as new:
            different = compare(jobs, old, new)
    if different:
        sys.exit(f"{len(different)} of {len(jobs)} jobs differ: {', '.join(different)}")
    print(f"\nAll {len(jobs)} the same.")


if __name__ == "__main__":
    main()
