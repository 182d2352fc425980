"""Jobs that ask for a bound instead of a size."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.compression import search
from vitshrink.compression.compressor import Compressor
from vitshrink.config.options import CompressConfig, DataConfig, read_recipe
from vitshrink.errors import DataError, GateError, UsageError
from vitshrink.evaluation.quality import Fidelity
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.report import figures

CLASSIFIER = "ViTForImageClassification"


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("photos"), 96)


@pytest.fixture
def bounded(checkpoint: Callable[[str], Path], photos: Path, tmp_path: Path) -> Callable[..., CompressionResult]:
    def job(name: str = CLASSIFIER, output: str = "out", **entries: Any) -> CompressionResult:
        entries = {"calibration": str(photos), "samples": 48, "holdout": 48, "forms": "rank"} | entries
        (result,) = compress(CompressConfig(str(checkpoint(name)), str(tmp_path / output), **entries))
        return result

    return job


Bounded = Callable[..., CompressionResult]


def kept(result: CompressionResult) -> float:
    return float(result.report.parameters.kept)


def fidelity(result: CompressionResult) -> Fidelity:
    assert result.report.evaluation is not None
    assert result.report.evaluation.fidelity is not None
    return result.report.evaluation.fidelity


@pytest.mark.parametrize("refine", [0, 1])
def test_the_written_model_keeps_within_the_divergence(bounded: Bounded, refine: int) -> None:
    result = bounded(max_kl=0.001, refine=refine)
    assert 0 < fidelity(result).kl <= 0.001
    assert 0.2 < kept(result) < 0.95
    assert "search" in result.report.timings
    assert result.report.recipe["max_kl"] == 0.001


@pytest.mark.parametrize(
    "options", [{}, {"method": "svd", "storage": "gauge"}, {"method": "mixed-rank", "compensation": "residual"}]
)
def test_a_tighter_bound_needs_a_larger_model(bounded: Bounded, options: dict[str, Any]) -> None:
    loose, tight = (bounded(output=f"{limit}", max_kl=limit, **options) for limit in (0.05, 0.003))
    assert kept(loose) < kept(tight) < 1
    assert fidelity(loose).kl <= 0.05
    assert fidelity(tight).kl <= 0.003


def test_the_size_is_the_smallest_up_to_the_resolution(bounded: Bounded) -> None:
    found = bounded(max_kl=0.002, refine=0)
    smaller = bounded(output="smaller", keep=(kept(found) - 2 * search.RESOLUTION,), refine=0)
    assert fidelity(smaller).kl > 0.002


def test_a_drop_is_the_share_of_predictions_that_change(bounded: Bounded) -> None:
    result = bounded(max_changed=10.0)
    assert 100 * (1 - fidelity(result).agreement) <= 10
    assert kept(result) < 0.9


def test_a_bound_that_everything_keeps_gives_the_smallest_model_there_is(bounded: Bounded) -> None:
    result = bounded(max_changed=100.0)
    assert all(layer.rank == 1 for layer in result.report.layers)


def test_refinement_does_not_make_it_larger(bounded: Bounded) -> None:
    plain, refined = (bounded(output=f"{refine}", max_kl=0.002, refine=refine) for refine in (0, 1))
    assert kept(refined) <= kept(plain)


def test_a_masked_language_model_is_searched_too(bounded: Bounded, tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "sentences.txt", 96)
    result = bounded("BertForMaskedLM", calibration=str(text), max_kl=0.05)
    assert fidelity(result).kl <= 0.05
    assert kept(result) < 0.95


def test_the_bound_holds_for_the_weights_as_they_are_stored(bounded: Bounded) -> None:
    result = bounded(max_kl=0.001, dtype="bfloat16")
    assert fidelity(result).kl <= 0.001


def test_a_larger_candidate_is_taken_where_storing_costs_too_much(
    bounded: Bounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "REPAIRED", 0.0)  # what a repair gains is not spent on a smaller one
    plain = bounded(output="plain", max_kl=0.002, refine=0)
    build, spoilt = Compressor.build, []

    def spoil_the_first(self: Compressor, *arguments: Any) -> Any:
        model = build(self, *arguments)
        if not spoilt:
            spoilt.append(model)
            with torch.no_grad():
                model.classifier.weight.neg_()
        return model

    monkeypatch.setattr(Compressor, "build", spoil_the_first)
    result = bounded(output="larger", max_kl=0.002, refine=0)
    assert kept(result) > kept(plain)
    assert fidelity(result).kl <= 0.002
    assert any("a larger size is used" in warning for warning in result.report.warnings)


def test_the_dense_model_runs_once_on_each_held_out_batch(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, losses = [], []
    loss = search.Search._loss

    def counted(self: search.Search, model: Any) -> float:
        handle = self.compressor.dense.register_forward_hook(lambda *_: runs.append(1))
        losses.append(loss(self, model))
        handle.remove()
        return losses[-1]

    monkeypatch.setattr(search.Search, "_loss", counted)
    bounded(max_kl=0.002, refine=0, batch_size=16)
    assert len(losses) > 5
    assert len(runs) == 48 / 16


def test_repairs_that_come_with_storing_are_spent_on_a_smaller_model(
    bounded: Bounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = bounded(output="plain", max_kl=0.002, refine=0)
    total = plain.report.parameters.dense
    judged = []

    def worth_a_tenth(self: search.Search, findings: Any, plan: Any) -> Any:
        judged.append(self.compressor.size(plan))
        larger = min(judged[-1] + total // 10, total - 1)
        return self._truncated(findings, self.compressor.plan(findings, larger))

    monkeypatch.setattr(search.Search, "_stored", worth_a_tenth)
    repaired = bounded(output="repaired", max_kl=0.002, refine=0)
    planned, before = (result.report.layers_parameters.compressed for result in (repaired, plain))
    assert planned == pytest.approx(before - total / 10, abs=3 * search.RESOLUTION * total)
    assert len(judged) < 10


# What stops a search


def test_a_bound_that_nothing_keeps_stops_the_job_with_the_best_that_was_found(
    bounded: Bounded, tmp_path: Path
) -> None:
    with pytest.raises(GateError, match=r"--max-kl 0.001: the best of 1 .*--keep 0\.\d+, loses .* nats on 48 held-out"):
        bounded(max_kl=0.001, method="svd")
    assert list(tmp_path.iterdir()) == []


def test_a_bound_missed_by_storing_names_what_was_judged(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated models keep it, so that their losses would contradict the message."""
    build = Compressor.build

    def spoil(self: Compressor, *arguments: Any) -> Any:
        model = build(self, *arguments)
        with torch.no_grad():
            model.classifier.weight.neg_()
        return model

    monkeypatch.setattr(Compressor, "build", spoil)
    with pytest.raises(GateError, match=r"sizes that keep it before storing, --keep [01]\.\d+, loses ") as missed:
        bounded(max_kl=0.01, refine=0)
    lost = re.search(r"loses ([\d.]+) nats as it is stored on 48", str(missed.value))
    assert lost is not None
    assert float(lost[1]) > 0.01


def test_a_search_without_held_out_samples_says_how_to_get_them(bounded: Bounded, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--max-kl .*fewer --samples"):
        bounded(max_kl=0.1, samples=96)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "bound", "said"),
    [
        ("ViTModel", {"max_kl": 0.1}, "--max-kl cannot be used .*scores or features.*--max-error"),
        ("ViTModel", {"max_changed": 1.0}, "--max-changed cannot be used .*--max-error"),
        (CLASSIFIER, {"max_error": 0.1}, "--max-error cannot be used .*probabilities.*--max-kl"),
    ],
)
def test_a_bound_that_the_head_does_not_have_is_refused_before_any_work(
    bounded: Bounded, name: str, bound: dict[str, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compressor, "learn", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=said):
        bounded(name, **bound)


def test_features_keep_within_a_relative_error(bounded: Bounded) -> None:
    result = bounded("ViTModel", max_error=0.02, refine=0)
    assert 0 < fidelity(result).relative_error <= 0.02
    assert 0.2 < kept(result) < 0.98


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"max_kl": -0.1}, "--max-kl -0.1: give the largest divergence"),
        ({"max_kl": float("nan")}, "--max-kl nan"),
        ({"max_error": 2.0}, "--max-error 2.0: give the squared error as a fraction .*such as --max-error 0.01"),
        ({"max_changed": 101.0}, "--max-changed 101.0: give the percentage"),
        ({"max_kl": 0.1, "calibration": None}, "--max-kl is checked on .*--calibration"),
        ({"max_changed": 1.0, "holdout": 0}, "--max-changed is checked on .*--holdout above 0"),
        ({"max_changed": 1.0, "max_kl": 0.1}, "--max-changed and --max-kl were given"),
        ({"max_changed": 1.0, "keep": (0.5,)}, "--keep and --max-changed were given"),
    ],
)
def test_a_bound_that_makes_no_sense_is_refused(entries: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CompressConfig(**({"model": "m", "output": "o", "calibration": "c"} | entries))


# What is checked on what


def test_with_data_to_evaluate_on_the_size_is_chosen_without_them(
    bounded: Bounded, photos: Path, learned_images: Path
) -> None:
    blind = bounded(output="blind", max_kl=0.002)
    seen = bounded(output="seen", max_kl=0.002, eval=str(learned_images))
    assert kept(blind) == kept(seen)
    assert seen.report.evaluation is not None
    assert seen.report.evaluation.source == str(learned_images)
    assert any("too good" in warning for warning in blind.report.warnings)
    assert not any("chose the size" in warning for warning in seen.report.warnings)
    assert seen.directory is not None
    model = evaluate_checkpoint(str(seen.directory), DataConfig(str(photos)), baseline=seen.report.model)
    assert model.measurement.evaluation.fidelity is not None


def test_a_bound_finer_than_one_sample_is_warned_about(bounded: Bounded) -> None:
    result = bounded(max_changed=1.0)
    assert any("one of the 48 held-out samples is already 2.1 percent" in w for w in result.report.warnings)


def test_a_dry_run_searches_and_writes_nothing(bounded: Bounded, tmp_path: Path) -> None:
    result = bounded(max_kl=0.002, dry_run=True)
    assert result.directory is None
    assert 0 < kept(result) < 1
    assert list(tmp_path.iterdir()) == []


def test_layers_that_cannot_be_factorized_stay_dense(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    least = Compressor.least_budget
    budgets = []

    def spy(self: Compressor, findings: Any = None) -> int:
        if findings is None:
            return least(self)
        name = next(iter(findings.layers))
        del findings.layers[name]
        findings.failures[name] = "it did not converge"
        budgets.append(least(self, findings))
        return budgets[-1]

    monkeypatch.setattr(Compressor, "least_budget", spy)
    result = bounded(max_changed=100.0, refine=0)
    assert [layer.rank for layer in result.report.layers].count(None) == 1
    assert result.report.parameters.compressed == budgets[0]


# The command line and recipes


def test_the_command_line_takes_a_bound(checkpoint: Callable[[str], Path], photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["compress", str(checkpoint(CLASSIFIER)), str(output), "--calibration", str(photos), "--samples", "48"]
    done = CliRunner().invoke(app, [*words, "--holdout", "40", "--max-kl", "0.01", "--quiet"])
    assert done.exit_code == 0, done.stderr
    assert read_recipe(output / "recipe.yaml")["max_kl"] == 0.01
    failed = CliRunner().invoke(app, [*words[:2], str(tmp_path / "other"), *words[3:], "--max-kl", "0", "--quiet"])
    assert failed.exit_code == 3
    assert "--max-kl 0" in failed.stderr
    assert not (tmp_path / "other").exists()


def test_a_bound_on_the_command_line_replaces_the_size_of_a_recipe(
    checkpoint: Callable[[str], Path], photos: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "job.yaml"
    recipe.write_text(
        f"model: {checkpoint(CLASSIFIER)}\noutput: {tmp_path / 'out'}\nkeep: 0.5\nholdout: 40\nsamples: 40"
    )
    words = ["compress", "--config", str(recipe), "--calibration", str(photos), "--max-changed", "20", "--quiet"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert (recipe["keep"], recipe["max_changed"]) == ([], 20.0)
