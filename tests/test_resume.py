"""Real jobs that are killed with SIGKILL while they calibrate, factorize, refine, train and evaluate, and go on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from killing import attribute, compress_until, compress_with_little_room

from vitshrink.compression import effort
from vitshrink.config.options import CompressConfig
from vitshrink.errors import GateError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.runtime import checksums
from vitshrink.runtime.observer import Observer, Silent
from vitshrink.runtime.state import PARTS, Progress, state_directory


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)


@pytest.fixture(autouse=True)
def always_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the processes that are killed."""
    monkeypatch.setattr(effort, "DEFAULT", tiny.REFINES_ALWAYS)


@pytest.fixture
def entries(vit_directory: Path, flat_images: Path, tmp_path: Path) -> dict[str, Any]:
    """Two sizes, two rounds, four batches, and everything saved at once."""
    return {
        "model": str(vit_directory),
        "output": str(tmp_path / "out"),
        "keep": [0.8, 0.6],
        "calibration": str(flat_images),
        "samples": 16,
        "holdout": 8,
        "batch_size": 4,
        "save_every": 0,
    }


def weights(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.safetensors"))}


Counted = dict[str, int]

BATCH = ("vitshrink.statistics.curvature", "CurvatureCollector.run")
LAYER = ("vitshrink.methods", "Factorization.check_finite")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """How often this process runs a batch, and decomposes a layer."""
    counts = {"batches": 0, "layers": 0}

    def count(module: str, path: str, what: str) -> None:
        owner, name = attribute(module, path)
        original = getattr(owner, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            counts[what] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, counted)

    count(*BATCH, "batches")
    count(*LAYER, "layers")
    return counts


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., dict[str, bytes]]:
    """The weights of a job that nobody kills; one that saves nothing on the way."""
    known: dict[str, dict[str, bytes]] = {}

    def run(entries: dict[str, Any]) -> dict[str, bytes]:
        key = json.dumps({name: value for name, value in entries.items() if name != "output"})
        if key not in known:
            output = tmp_path_factory.mktemp("undisturbed") / "out"
            compress(CompressConfig.from_mapping(entries | {"output": str(output), "save_every": 3600}))
            known[key] = weights(output)
        return known[key]

    return run


ALL = {"batches": 4 * 5, "layers": 12 * 5}
"""Of the dense model, and in two rounds of each size. Factors are not kept: they follow from statistics, quickly.
Those of the dense model are not needed once the last size was refined."""

MOMENTS = {
    "while calibrating": (*BATCH, 3, {"batches": ALL["batches"] - 3}),
    "while saving sums": (
        "vitshrink.runtime.state",
        "write_tensors",
        2 * PARTS + 5,
        {"batches": 20 - 2},
    ),
    "while factorizing": (*LAYER, 7, {"batches": ALL["batches"] - 4, "layers": 60}),
    "while measuring": ("vitshrink.compression.estimation", "shared_effects", 0, {"batches": 16, "layers": 60}),
    "in the first round": (*BATCH, 4 + 2, {"batches": 20 - 6, "layers": 60}),
    "in the second round": (*LAYER, 12 + 12 + 5, {"batches": 8, "layers": 60}),
    "while repairing": ("vitshrink.compression.repairs.layers", "rescale_components", 0, {"batches": 8, "layers": 48}),
    "in the second size": (*LAYER, 12 + 24 + 12 + 1, {"batches": 0, "layers": 36}),
    "while evaluating": ("vitshrink.jobs.session", "measure_each", 0, {"batches": 0, "layers": 24}),
    "while writing the report": ("vitshrink.jobs.compress", "write", 1, {"batches": 0, "layers": 24}),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_job_goes_on_where_it_was_and_ends_in_the_same_bytes(
    moment: str,
    entries: dict[str, Any],
    work: Counted,
    undisturbed: Callable[..., dict[str, bytes]],
    tmp_path: Path,
) -> None:
    wanted = undisturbed(entries)
    work.update(batches=0, layers=0)
    module, name, calls, left = MOMENTS[moment]
    compress_until(entries, module, name, calls)
    assert not (tmp_path / "out").exists()
    assert state_directory(tmp_path / "out").is_dir()
    compress(CompressConfig.from_mapping(entries))
    assert weights(tmp_path / "out") == wanted
    assert work == ALL | left
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no state is left"
    assert not any(checksums.broken_files(part) for part in (tmp_path / "out").glob("keep-*"))


@pytest.mark.slow
def test_a_job_that_is_killed_again_and_again_still_goes_on(
    entries: dict[str, Any], work: Counted, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    wanted = undisturbed(entries)
    work.update(batches=0, layers=0)
    for place, calls in ((BATCH, 2), (LAYER, 5), (BATCH, 3), (LAYER, 40)):
        compress_until(entries, *place, calls)
    compress(CompressConfig.from_mapping(entries))
    assert weights(tmp_path / "out") == wanted
    assert work["batches"] <= ALL["batches"] - 5


@pytest.mark.slow
def test_training_goes_on_after_a_kill_and_is_not_lost_with_one_in_the_evaluation(
    entries: dict[str, Any],
    undisturbed: Callable[..., dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries |= {"keep": [0.6], "samples": 24, "holdout": 0, "refine": 0}
    entries["finetune"] = {"objective": "distill", "epochs": 3, "batch_size": 8}
    wanted = undisturbed(entries)
    steps = []
    original = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        steps.append(1)
        return original(self, *arguments, **keywords)

    compress_until(entries, "vitshrink.recovery.training", "Loop._step", 5)  # two steps an epoch
    compress_until(entries, "vitshrink.jobs.result", "save", 0)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    compress(CompressConfig.from_mapping(entries))
    assert weights(tmp_path / "out") == wanted
    assert len(steps) == 2, "the last epoch alone"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recovery"]["settings"]["checkpoints"] is None
    assert any("training continues from step 4" in warning for warning in report["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("keep", [0.8, 0.5]),
        ("seed", 1),
        ("samples", 12),
        ("refine", 1),
        ("batch_size", 8),
        ("weights", "model"),
        ("calibration data", "images"),
    ],
)
def test_the_state_of_another_job_is_not_used_and_it_says_so(
    name: str, other: Any, entries: dict[str, Any], work: Counted, interrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(interrupted / ".out.vitshrink-state", state_directory(tmp_path / "out"))
    if name == "weights":
        entries["model"] = str(tiny.write("ViTForImageClassification", tmp_path / "model", seed=5))
    elif name == "calibration data":
        entries["calibration"] = str(tiny.write_images(tmp_path / "images", 24, seed=3))
    else:
        entries[name] = other
    said: list[str] = []
    entries["keep"] = entries["keep"][:1] if name != "keep" else other
    stop_at_first_layer(entries, said)
    (warning,) = [each for each in said if "state of an interrupted job" in each]
    assert name in warning
    assert "it is not used, and it is removed" in warning
    assert work["batches"] >= 1, "nothing of it was used"


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["class map", "processor"])
def test_what_training_reads_beside_the_samples_is_not_taken_for_the_same(
    changed: str, vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    """The paths stay, the contents do not."""
    model, images = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (vit_directory, learned_images))
    classes = {name: index for index, name in enumerate(tiny.IMAGE_CLASSES)}
    class_map = tmp_path / "classes.json"
    class_map.write_text(json.dumps(classes))
    entries: dict[str, Any] = {
        "model": str(model),
        "output": str(tmp_path / "out"),
        "keep": [0.8],
        "method": "svd",
        "compensation": "none",
        "class_map": str(class_map),
        "finetune": {"objective": "supervised", "data": str(images), "epochs": 2, "batch_size": 8},
        "save_every": 0,
    }
    compress_until(entries, "vitshrink.recovery.training", "Loop._step", 1)
    assert state_directory(tmp_path / "out").is_dir()
    if changed == "class map":
        first, second, *_ = classes
        class_map.write_text(json.dumps(classes | {first: classes[second], second: classes[first]}))
    else:
        file = model / "preprocessor_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    said: list[str] = []
    stop_at_first_layer(entries, said)
    (warning,) = [each for each in said if "state of an interrupted job" in each]
    assert ("preprocessing" if changed == "processor" else "training data") in warning


def stop_at_first_layer(entries: dict[str, Any], said: list[str]) -> None:
    """Run a job up to its first decomposition."""

    class Stopped(Exception):  # noqa: N818
        pass

    class Listening(Silent):
        def warn(self, message: str) -> None:
            said.append(message)

        def stage(self, title: str, total: int | None = None) -> Any:
            if title == "Factorizing":
                raise Stopped
            return super().stage(title, total)

    listening: Observer = Listening()
    with pytest.raises(Stopped):
        compress(CompressConfig.from_mapping(entries), listening)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, vit_directory: Path, flat_images: Path) -> Path:
    """A folder with the state of a job that was killed while it factorized."""
    folder = tmp_path_factory.mktemp("interrupted")
    job = {"model": str(vit_directory), "calibration": str(flat_images), "output": str(folder / "out")}
    job |= {"keep": [0.8, 0.6], "samples": 16, "holdout": 8, "batch_size": 4, "save_every": 0}
    compress_until(job, *LAYER, 7)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["job", "step"])
def test_a_damaged_state_is_named_and_computed_again(
    damage: str,
    entries: dict[str, Any],
    interrupted: Path,
    undisturbed: Callable[..., dict[str, bytes]],
    tmp_path: Path,
) -> None:
    wanted = undisturbed(entries)
    state = Path(shutil.copytree(interrupted / ".out.vitshrink-state", state_directory(tmp_path / "out")))
    file = state / ("job.json" if damage == "job" else "dense-statistics.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    results = compress(CompressConfig.from_mapping(entries))
    (warning,) = [each for each in results[0].report.warnings if str(file.parent) in each]
    assert "damaged" in warning if damage == "job" else "is computed again" in warning
    assert weights(tmp_path / "out") == wanted


def test_a_quick_job_saves_nothing_on_the_way(entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "prepared", lambda _self: pytest.fail("the state was written"))
    compress(CompressConfig.from_mapping(entries | {"save_every": 3600, "keep": [0.6], "refine": 0}))


def test_where_the_state_cannot_be_written_the_job_goes_on_without(
    entries: dict[str, Any], undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    wanted = undisturbed(entries)
    state_directory(tmp_path / "out").write_text("a file in its place")
    results = compress(CompressConfig.from_mapping(entries))
    assert weights(tmp_path / "out") == wanted
    (warning,) = [each for each in results[0].report.warnings if "cannot be saved" in each]
    assert "so a kill would lose it" in warning


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_midst_of_a_job_leaves_nothing(entries: dict[str, Any], tmp_path: Path) -> None:
    said, warnings = compress_with_little_room(entries | {"keep": [0.6], "refine": 0}, 20_000)
    assert said.startswith("OutputError: cannot write the checkpoint to")
    assert "free space" in said
    assert any("cannot be saved" in warning for warning in warnings)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_would_fail_again_leaves_no_state(entries: dict[str, Any], tmp_path: Path) -> None:
    del entries["keep"]
    with pytest.raises(GateError):
        compress(CompressConfig.from_mapping(entries | {"max_kl": 0, "refine": 0}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_training_keeps_its_state_where_it_is_told_to(entries: dict[str, Any], tmp_path: Path) -> None:
    """With ``checkpoints`` of one's own, which are cleared once the model is there."""
    entries |= {"keep": [0.6], "samples": 24, "holdout": 0, "refine": 0}
    entries["finetune"] = {"epochs": 2, "batch_size": 8, "checkpoints": str(tmp_path / "mine")}
    compress_until(entries, "vitshrink.jobs.result", "save", 0)
    assert (tmp_path / "mine" / "state" / "job.json").exists()
    results: list[CompressionResult] = compress(CompressConfig.from_mapping(entries))
    assert any("training continues" in warning for warning in results[0].report.warnings)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_nothing_is_kept_without_a_directory() -> None:
    progress = Progress()
    progress.keep_sums("dense", 1, lambda: pytest.fail("was asked for"))
    assert progress.sums("dense") == {}
    assert progress.prepared() is None
    assert not progress.open()
