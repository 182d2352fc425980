"""Jobs that share a cache directory: what they need not do again, and what they must."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitshrink.compression import effort, estimation, sensitivity_estimation
from vitshrink.compression.estimation import LayerEstimator
from vitshrink.config.options import CompressConfig
from vitshrink.data import Batch
from vitshrink.errors import NumericsError, OutputError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.methods import Factorization, available_methods
from vitshrink.report import figures
from vitshrink.runtime.cache import Cache
from vitshrink.statistics.digests import data_digest, model_digest
from vitshrink.statistics.stats import LinearStats

CLASSIFIER = "ViTForImageClassification"


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed, in order: ``statistics`` and ``factors``."""
    done: list[str] = []

    def count(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            done.append(what)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, counted)

    count(estimation, "collect", "statistics")
    count(estimation, "collect_curvature", "statistics")
    count(LayerEstimator, "_factorize", "factors")
    return done


Job = Callable[..., CompressionResult]


@pytest.fixture
def job(vit_directory: Path, flat_images: Path, tmp_path: Path) -> Job:
    outputs = iter(range(100))

    def run(model: Path = vit_directory, **entries: Any) -> CompressionResult:
        entries = {"keep": (0.7,), "samples": 8, "holdout": 4, "refine": 0, "batch_size": 4} | entries
        entries = {"calibration": str(flat_images), "cache": str(tmp_path / "cache")} | entries
        (result,) = compress(CompressConfig(str(model), str(tmp_path / f"out-{next(outputs)}"), **entries))
        return result

    return run


def weights(result: CompressionResult) -> bytes:
    assert result.directory is not None
    return (result.directory / "model.safetensors").read_bytes()


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("method", available_methods())
def test_a_second_job_computes_nothing_again_and_gives_the_same_weights(job: Job, work: list[str], method: str) -> None:
    plain = job(method=method, cache=None)
    work.clear()
    first, after = job(method=method), list(work)
    second = job(method=method)
    assert after == work == (["factors"] if method == "svd" else ["statistics", "factors"])
    assert weights(first) == weights(second)
    assert second.report.parameters == plain.report.parameters
    found, want = load_file(second.directory / "model.safetensors"), load_file(plain.directory / "model.safetensors")
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_integers_of_another_size_do_not_run_the_model_on_the_calibration_data(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"keep": (), "refine": 2, "bits": 4.0}
    plain = job(**asked, cache=None)
    first = job(**asked)
    monkeypatch.setattr(
        sensitivity_estimation, "collect_sensitivity", lambda *_, **__: pytest.fail("the model was run")
    )
    assert weights(first) == weights(job(**asked)) == weights(plain)
    smaller = job(**asked | {"bits": 3.0})
    assert len(weights(smaller)) < len(weights(first))
    with pytest.raises(pytest.fail.Exception, match="the model was run"):
        job(**asked, seed=1)


def test_a_second_job_never_runs_the_model_on_the_calibration_data(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job()
    monkeypatch.setattr(estimation, "collect_curvature", lambda *_, **__: pytest.fail("the model was run"))
    job(keep=(0.5,))


def test_another_size_reads_the_cache_and_equals_a_job_of_its_own(job: Job, work: list[str], tmp_path: Path) -> None:
    job()
    work.clear()
    other = job(keep=(0.5,))
    assert work == []
    alone = job(keep=(0.5,), cache=str(tmp_path / "another"))
    assert weights(other) == weights(alone)


def test_refinement_runs_for_every_size_on_top_of_cached_statistics(
    job: Job, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "DEFAULT", tiny.REFINES_ALWAYS)
    first = job(refine=1)
    assert work == ["statistics", "factors"] * 2
    work.clear()
    second = job(refine=1)
    assert work == ["statistics", "factors"]  # those of the compressed model
    assert weights(first) == weights(second)


@pytest.mark.parametrize("entries", [{"seed": 1}, {"samples": 12}, {"batch_size": 8}, {"probes": 2}, {"layers": "mlp"}])
def test_whatever_the_statistics_depend_on_misses(job: Job, work: list[str], entries: dict[str, Any]) -> None:
    job()
    work.clear()
    job(**entries)
    assert work == ["statistics", "factors"]


def test_other_data_miss(job: Job, work: list[str], tmp_path: Path) -> None:
    job()
    work.clear()
    job(calibration=str(tiny.write_images(tmp_path / "others", 16, seed=9)))
    assert work == ["statistics", "factors"]


def test_other_weights_miss_and_the_same_elsewhere_hit(
    job: Job, work: list[str], vit_directory: Path, tmp_path: Path
) -> None:
    job()
    work.clear()
    job(shutil.copytree(vit_directory, tmp_path / "copy"))
    assert work == []
    job(tiny.write(CLASSIFIER, tmp_path / "other", seed=1))
    assert work == ["statistics", "factors"]


def test_another_option_keeps_the_statistics(job: Job, work: list[str]) -> None:
    job()
    work.clear()
    job(options={"shrinkage": 0.3})
    job(compensation="none")
    assert work == ["factors", "factors"]


def test_several_sizes_and_a_search_share_the_cache(job: Job, work: list[str]) -> None:
    job()
    work.clear()
    job(keep=(), max_changed=100.0)
    assert work == []


# What may lie in the directory


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other job", "layer missing"])
def test_a_file_that_cannot_be_used_is_written_again_with_a_warning(
    job: Job, work: list[str], tmp_path: Path, damage: str
) -> None:
    first = job()
    before = {path: path.read_bytes() for path in files(tmp_path)}
    for path in before:
        if damage == "truncated":
            path.write_bytes(before[path][:-100])
        elif damage in ("empty", "text"):
            path.write_bytes(b"" if damage == "empty" else b"not a tensor in sight")
        else:
            tensors = load_file(path)
            kept = {k: v for k, v in tensors.items() if damage == "other job" or "layers.0" in k}
            save_file(kept, path, metadata=metadata(path) if damage == "layer missing" else {"key": "{}"})
    work.clear()
    second = job()
    assert work == ["statistics", "factors"]
    assert weights(first) == weights(second)
    warned = [warning for warning in second.report.warnings if "cannot be used and is computed again" in warning]
    assert len(warned) == 2
    assert all(str(path) in " ".join(warned) for path in before)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def test_only_whole_files_appear(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_tensors: dict[str, Tensor], path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half of a file")
        raise OSError("No space left on device")

    monkeypatch.setattr("vitshrink.runtime.entries.save_file", full)
    result = job()
    assert files(tmp_path) == []
    assert any("could not be written" in w and "No space left" in w for w in result.report.warnings)


def test_a_directory_that_cannot_be_made_is_named(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"--cache .*file/cache: .*file is not a writable folder"):
        job(cache=str(tmp_path / "file" / "cache"))


def test_factors_with_a_failure_are_not_kept(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check, calls = Factorization.check_finite, []

    def fail_once(self: Factorization) -> Factorization:
        calls.append(self)
        if len(calls) == 1:
            raise NumericsError("it did not converge.")
        return check(self)

    monkeypatch.setattr(Factorization, "check_finite", fail_once)
    failed = job()
    assert any("did not converge" in warning for warning in failed.report.warnings)
    assert [path.name.partition("-")[0] for path in files(tmp_path)] == ["linearstats"]
    assert not any("did not converge" in warning for warning in job().report.warnings)


def test_two_jobs_at_once_leave_one_good_cache(tmp_path: Path) -> None:
    key = {"layers": ["a", "b"]}
    stats = LinearStats(tokens=3, mean=torch.randn(500).double(), gram=torch.randn(500, 500).double())
    caches = [Cache(tmp_path, torch.device("cpu"), pytest.fail) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        for _ in range(5):
            list(pool.map(lambda cache: cache.write(key, {"a": stats, "b": stats}), caches))
            assert all(cache.read(LinearStats, key) is not None for cache in caches)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_from_before_a_field_was_added_is_not_read(
    job: Job, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job()
    work.clear()
    monkeypatch.setattr("vitshrink.runtime.cache.fields", lambda kind: [f for f in fields(kind) if f.name != "abs_max"])
    result = job()
    assert work == ["statistics"]  # the factors have no such field
    assert not result.report.warnings


# Entries and digests


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    cache = Cache(tmp_path, torch.device("cpu"), pytest.fail)
    shared = torch.randn(4, 6, dtype=torch.float64)
    written = {
        "z": LinearStats(tokens=7, mean=shared[0], gram=shared.T @ shared, gradient_power=0.1 + 0.2),
        "a": LinearStats(tokens=2**40, mean=shared[0], output_gram=shared.T),
    }
    key = {"layers": ["z", "a"]}
    assert cache.read(LinearStats, key) is None
    cache.write(key, written)
    found = cache.read(LinearStats, key)
    assert found is not None
    assert list(found) == ["z", "a"]
    for name, entry in written.items():
        for field in fields(entry):
            got, want = getattr(found[name], field.name), getattr(entry, field.name)
            assert torch.equal(got, want) if isinstance(want, Tensor) else (got, type(got)) == (want, type(want))


def test_digests_tell_models_and_data_apart() -> None:
    model = tiny.build(CLASSIFIER)
    assert model_digest(model) == model_digest(tiny.build(CLASSIFIER))
    assert model_digest(model) != model_digest(tiny.build(CLASSIFIER, seed=1))
    other = tiny.build(CLASSIFIER)
    other.config.layer_norm_eps = 0.1
    assert model_digest(model) != model_digest(other)

    def batch(mask: Tensor | None = None, shape: tuple[int, ...] = (2, 3)) -> Batch:
        return Batch({"input_ids": torch.arange(6).reshape(shape)}, mask, [], [])

    ones = torch.ones(2, 3, dtype=torch.bool)
    digests = [
        data_digest(batches)
        for batches in ([batch()], [batch(ones)], [batch(~ones)], [batch(shape=(3, 2))], [batch(), batch()], [])
    ]
    assert len(set(digests)) == len(digests)


def test_what_a_killed_run_had_half_written_is_removed_after_a_day(tmp_path: Path) -> None:
    stem = f".linearstats-{'0a' * 16}"
    young, aged, foreign = (tmp_path / name for name in (f"{stem}-young.tmp", f"{stem}-aged.tmp", ".notes-of-mine.tmp"))
    for file in (young, aged, foreign):
        file.write_bytes(b"half")
    for file in (aged, foreign):
        os.utime(file, (0, 0))
    Cache(tmp_path, torch.device("cpu"), pytest.fail)
    assert set(tmp_path.iterdir()) == {young, foreign}
