"""One tiny compress job, watched from outside: which files it reads, and how often it copies or builds the model.

``__main__.py`` runs this in a process of its own, with the tree to measure first on the path; it writes JSON to a file.
"""

import collections
import copy
import functools
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

IMAGES = 12
OPTIONS = (
    "--keep 0.6 --samples 8 --holdout 4 --method curvature --refine 1 --save-every 0 --device cpu --offline --quiet"
)
CLASS = "ViTForImageClassification"
STATE = "*state*"
"""What the folder beside the output is called that keeps the state of a running job."""


class Watch:
    """Notes what happens between ``started`` and the end of the process; has to be made before torch is imported."""

    def __init__(self, tree: Path, source: Path, output: Path) -> None:
        self.package, self.source, self.output = tree / "vitshrink", source, output
        self.events: list[dict[str, Any]] = []
        self.state: dict[str, int] = {}
        """Bytes of the files in the folder of the state, when they were most."""
        self.last: Path | None = None
        """The file that the last event is about."""
        self.started = False
        sys.addaudithook(self._audited)
        self._watch_files()
        self._watch_models()

    def _watch_files(self) -> None:
        import safetensors

        opened = safetensors.safe_open

        def safe_open(filename: Any, *arguments: Any, **options: Any) -> Any:
            self._read(filename)
            return opened(filename, *arguments, **options)

        safetensors.safe_open = safe_open  # it opens files in Rust, which no audit hook hears of
        synced = os.fsync

        def fsync(descriptor: Any) -> None:
            if self.last is not None and os.path.samestat(os.stat(descriptor), os.stat(self.last)):
                self.events.pop()  # opened to be written to the disk: not read
            self.last = None
            synced(descriptor)

        os.fsync = fsync

    def _watch_models(self) -> None:
        import torch

        copied = copy.deepcopy

        def deepcopy(x: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(x, torch.nn.Module):
                self._note("copy of the model" if type(x).__name__ == CLASS else "copy of a part of the model")
            return copied(x, *arguments, **options)

        copy.deepcopy = deepcopy  # before the package or transformers take the name from there
        from transformers import PreTrainedModel

        made = PreTrainedModel.__init__

        @functools.wraps(made)  # transformers reads its signature
        def init(model: Any, *arguments: Any, **options: Any) -> None:
            if type(model).__name__ == CLASS:
                self._note("construction of the model")
            made(model, *arguments, **options)

        PreTrainedModel.__init__ = init
        self._watch_views()

    def _watch_views(self) -> None:
        """Where the tree has views of models: one is copied whole when it gets tensors of its own."""
        try:
            from vitshrink.models import views
        except ImportError:
            return
        owned = views.own

        def own(module: Any) -> Any:
            if type(module).__name__ == CLASS:
                self._note("copy of the model")
            return owned(module)

        views.own = own

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.started:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and not flags & (os.O_WRONLY | os.O_RDWR):
                self._read(path)
        if event in ("os.rename", "os.remove", "shutil.rmtree"):  # before it is done: both old and new are there
            self._weigh()

    def _read(self, path: Any) -> None:
        full = Path(os.path.realpath(os.fsdecode(path)))
        if not self.started or full.is_dir():
            return
        if self.source in full.parents:
            self._note(f"source {full.relative_to(self.source)}")
        elif self.output.parent in full.parents and not full.parent.match(STATE):
            self._note(f"output {full.name}")  # the folder it is staged in has another name
        else:
            return
        self.last = full

    def _note(self, what: str) -> None:
        self.last = None
        if self.started:
            self.events.append({"what": what, "who": list(self._callers(sys._getframe(1)))})

    def _callers(self, frame: FrameType | None) -> Iterator[str]:
        """Lines of the package on the stack, the innermost first."""
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if self.package in file.parents:
                yield f"{file.relative_to(self.package)}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back

    def _weigh(self) -> None:
        files = {}
        for folder in self.output.parent.glob(STATE):
            files |= {entry.name: entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()}
        if sum(files.values()) > sum(self.state.values()):
            self.state = files


def write_model(directory: Path, layers: int) -> None:
    """A ViT with the proportions of the published ones and random weights, by stock transformers alone."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3, "num_hidden_layers": layers}
    config = ViTConfig(image_size=32, patch_size=8, num_labels=4, initializer_range=0.1, **shape)
    ViTForImageClassification(config).save_pretrained(directory)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)


def write_images(directory: Path) -> None:
    import numpy as np
    from PIL import Image

    directory.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(directory / f"{number}.png")


def main(tree: Path, work: Path, layers: int) -> None:
    source, images, output = work / "source", work / "images", work / "outputs" / "small"
    output.parent.mkdir()
    watch = Watch(tree, source, output)
    write_model(source, layers)
    write_images(images)
    sys.argv = ["vitshrink", "compress", str(source), str(output), "--calibration", str(images), *OPTIONS.split()]
    watch.started = True
    try:
        runpy.run_module("vitshrink", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        if end.code:
            raise
    watch.started = False
    used = Path(sys.modules["vitshrink"].__file__ or "").parent
    assert used == watch.package, f"{used} was run, not {watch.package}"
    stored = (source / "model.safetensors").stat().st_size
    counts = collections.Counter(event["what"] for event in watch.events)
    state = {name: size / stored for name, size in watch.state.items()}
    facts = {"layers": layers, "counts": counts, "state": state, "events": watch.events}
    (work / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3]))
