"""Refinement: factors for what the compressed model shows, and ranks by what brings its outputs closest."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vitshrink.compression import effort
from vitshrink.compression import estimation as module
from vitshrink.compression.choices import Choices
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.shrinking import Shrinking
from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import CalibrationData, open_data, read_calibration
from vitshrink.models.loading import LoadedModel, load_dense
from vitshrink.runtime.observer import Job, Silent
from vitshrink.statistics.effects import losses
from vitshrink.statistics.reference import DenseOutputs


def prepared(
    directory: Path, images: Path, keep: float, **entries: Any
) -> tuple[LoadedModel, Compressor, CalibrationData, int]:
    """A dense model, what compresses it, its calibration data, and a budget."""
    config = CompressConfig(str(directory), "out", keep=(keep,), calibration=str(images), samples=16, **entries)
    source = load_dense(str(directory), offline=True)
    preprocessor = Preprocessor.from_checkpoint(directory, "image")
    job = Job(Silent())
    samples = open_data(DataConfig(str(images)), source, offline=True)
    calibration = read_calibration(samples, preprocessor, job, samples=16, seed=0, batch_size=8)
    choices = Choices.of(config)
    shrinking = Shrinking.of(choices, source.model, source.source_dtype)
    compression = choices.compressor(source.model, shrinking.targets, source.source_dtype, calibration)
    return source, compression, calibration, shrinking.sizes[0].budget


@pytest.mark.parametrize("keep", [0.6, 0.9])
def test_ranks_go_by_the_measurement_that_brings_the_outputs_closest(
    keep: float, vit_directory: Path, flat_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, compression, calibration, budget = prepared(vit_directory, flat_images, keep, thorough=True)
    assert isinstance(compression.estimator, module.LayerEstimator)
    job = Job(Silent())
    first = compression.learn(job)
    plan = compression.plan(first, budget)

    def lacks() -> float:
        refined = compression.refine(first, plan, job)
        size = compression.size(plan)
        model = compression.truncate(refined, compression.plan(refined, size), job)
        dense = DenseOutputs(source.model, compression.estimator.passes)
        lost, spread = losses(model, dense, calibration.batches, passes=compression.estimator.passes).sum(0)
        return float(lost / spread)

    chosen = lacks()
    each = []
    for share in module.SHARES_MEASURED_AGAIN:
        monkeypatch.setattr(module, "SHARES_MEASURED_AGAIN", (share,))
        each.append(lacks())
    assert len(set(each)) > 1
    assert chosen == pytest.approx(min(each), rel=1e-4)


@pytest.mark.parametrize("light", [True, False])
def test_a_light_cut_is_not_refined_and_few_samples_repair_it(
    light: bool, vit_directory: Path, flat_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, compression, calibration, budget = prepared(vit_directory, flat_images, 0.8)
    assert isinstance(compression.estimator, module.LayerEstimator)
    job = Job(Silent())
    first = compression.learn(job)
    plan = compression.plan(first, budget)
    lost = compression.estimator.missing(compression.replaced(first, plan))
    assert 0 < lost < compression.estimator.missing(compression.replaced(first, compression.plan(first, budget // 2)))
    few = effort.Repairs(samples=9, rescaled=8)
    weak = replace(effort.DEFAULT, light=lost * (1.01 if light else 0.99), light_repairs=few)
    monkeypatch.setattr(effort, "DEFAULT", weak)
    found = compression.refine(first, plan, job)
    assert found.light == light
    assert (found.layers == first.layers) == light
    whole = len(calibration.batches)
    assert len(compression.estimator.to_repair(found)) == (2 if light else whole)
    assert len(compression.estimator.to_rescale(found)) == (1 if light else whole)
    again = compression.refine(replace(found, light=False), plan, job)
    assert again.light == light


def test_token_weights_are_those_of_the_pass_that_measures_components(vit_directory: Path, flat_images: Path) -> None:
    estimator, unasked = (prepared(vit_directory, flat_images, 0.9)[1].estimator for _ in range(2))
    assert isinstance(estimator, module.LayerEstimator)
    assert isinstance(unasked, module.LayerEstimator)
    estimator.learn(Job(Silent()))
    one, other = estimator.token_weights(), unasked.token_weights()
    assert len(one) == len(other) == 2
    for found, again in zip(one, other, strict=True):
        assert found.keys() == again.keys()
        assert len(found) == 4, "the writers of two blocks"
        assert all(torch.equal(weights, again[name]) for name, weights in found.items())


def test_a_thorough_job_refines_a_light_cut(compressed: Any) -> None:
    stages = {
        thorough: compressed("ViTForImageClassification", keep=(0.9,), thorough=thorough).report.timings
        for thorough in (False, True)
    }
    assert "weigh" in stages[False]
    assert "choose" not in stages[False]
    assert "choose" in stages[True]
    assert "weigh" not in stages[True]
