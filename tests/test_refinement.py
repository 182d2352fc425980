"""Refinement: factors for what the compressed model shows, and ranks by what brings its outputs closest."""

from pathlib import Path

import pytest

from vitshrink.compression import estimation as module
from vitshrink.compression.choices import Choices
from vitshrink.compression.shrinking import Shrinking
from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import open_data, read_calibration
from vitshrink.models.loading import load_dense
from vitshrink.runtime.observer import Job, Silent
from vitshrink.statistics.effects import shortfall
from vitshrink.statistics.reference import DenseOutputs


@pytest.mark.parametrize("keep", [0.6, 0.9])
def test_ranks_go_by_the_measurement_that_brings_the_outputs_closest(
    keep: float, vit_directory: Path, flat_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompressConfig(str(vit_directory), "out", keep=(keep,), calibration=str(flat_images), samples=16)
    source = load_dense(str(vit_directory), offline=True)
    preprocessor = Preprocessor.from_checkpoint(vit_directory, "image")
    job = Job(Silent())
    samples = open_data(DataConfig(str(flat_images)), source, offline=True)
    calibration = read_calibration(samples, preprocessor, job, samples=16, seed=0, batch_size=8)
    choices = Choices.of(config)
    shrinking = Shrinking.of(choices, source.model, source.source_dtype)
    compression = choices.compressor(source.model, shrinking.targets, source.source_dtype, calibration)
    assert isinstance(compression.estimator, module.LayerEstimator)
    budget = shrinking.sizes[0].budget
    first = compression.learn(job)
    plan = compression.plan(first, budget)

    def lacks() -> float:
        refined = compression.refine(first, plan, job)
        size = compression.size(plan)
        model = compression.truncate(refined, compression.plan(refined, size), job)
        missing = shortfall(
            model,
            DenseOutputs(source.model, compression.estimator.passes),
            calibration.batches,
            seed=config.seed + 4,
            passes=compression.estimator.passes,
        )
        return float(missing.square().mean())

    chosen = lacks()
    each = []
    for share in module.SHARES_MEASURED_AGAIN:
        monkeypatch.setattr(module, "SHARES_MEASURED_AGAIN", (share,))
        each.append(lacks())
    assert len(set(each)) > 1
    assert chosen == pytest.approx(min(each), rel=1e-4)
