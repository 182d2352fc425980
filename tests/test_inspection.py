"""What ``inspect`` says of a layer: figures that can be worked out by hand."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_calibration import batch_of
from torch import Tensor, nn

from vitshrink.errors import DataError
from vitshrink.jobs.inspection import figures, inspect_layers, layer_spectra, rank_at, sample_activations, write_figures
from vitshrink.jobs.inspection.spectra import output_loss
from vitshrink.methods import get_method
from vitshrink.methods.ranks import break_even_rank
from vitshrink.models.targets import Target, find_targets
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.stats import LinearStats

FRACTIONS = (0.25, 0.5, 1.0)


def layer(weight: Tensor) -> tuple[nn.Module, list[Target]]:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight
    return nn.ModuleDict({"layer": linear}), [Target("layer", 0, "fc1", tuple(weight.shape), "layer")]  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 48)])
def test_a_flat_spectrum_has_full_effective_rank(shape: tuple[int, int]) -> None:
    Q, _ = torch.linalg.qr(torch.randn(max(shape), min(shape), generator=torch.Generator().manual_seed(0)))
    weight = Q if shape[0] >= shape[1] else Q.T.contiguous()
    (found,) = inspect_layers(*layer(weight), {}, FRACTIONS)
    assert found.shape == shape
    assert found.parameters == shape[0] * shape[1]
    assert found.break_even == break_even_rank(*shape)
    assert found.effective_rank == pytest.approx(16, rel=1e-5)
    assert found.energy == pytest.approx({4: 0.25, 8: 0.5, 16: 1.0}, rel=1e-5)


def test_a_matrix_of_rank_one_has_effective_rank_one() -> None:
    (found,) = inspect_layers(*layer(torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 13))), {}, FRACTIONS)
    assert found.effective_rank == pytest.approx(1)
    assert found.energy == pytest.approx({2: 1.0, 4: 1.0, 8: 1.0})


def test_a_layer_of_zeros_is_no_error() -> None:
    (found,) = inspect_layers(*layer(torch.zeros(8, 8)), {}, FRACTIONS)
    assert found.effective_rank == pytest.approx(1)
    assert all(0 <= energy <= 1 for energy in found.energy.values())


def test_activations_weight_the_spectrum() -> None:
    """All that goes in lies on one line, so one rank keeps everything of a weight that keeps all directions."""
    model, targets = layer(torch.eye(8))
    x = torch.outer(torch.linspace(-1, 1, 50), torch.arange(1.0, 9))
    plain, weighted = (
        inspect_layers(model, targets, stats, FRACTIONS)[0] for stats in ({}, {"layer": LinearStats.from_inputs(x)})
    )
    assert plain.effective_rank == pytest.approx(8)
    assert weighted.effective_rank == pytest.approx(1, abs=1e-3)
    assert weighted.energy[2] == pytest.approx(1)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertModel"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_layer_of_a_model_is_inspected(name: str, calibrated: bool) -> None:
    model = tiny.build(name)
    targets = find_targets(model)
    stats = collect(model, targets, [batch_of(tiny.inputs(name, batch=8))], Needs.COVARIANCE) if calibrated else {}
    found = inspect_layers(model, targets, stats, FRACTIONS)
    assert [each.name for each in found] == [target.name for target in targets]
    for each in found:
        energies = list(each.energy.values())
        assert energies == sorted(energies)
        assert energies[-1] == pytest.approx(1)
        assert 1 <= each.effective_rank <= min(each.shape)


@pytest.mark.parametrize(
    ("fraction", "shape", "rank"), [(0.5, (8, 100), 4), (0.01, (8, 8), 1), (1, (3, 9), 3), (0.125, (4, 4), 1)]
)
def test_a_fraction_of_the_full_rank_is_at_least_one(fraction: float, shape: tuple[int, int], rank: int) -> None:
    assert rank_at(fraction, shape) == rank


# Figures


@pytest.mark.parametrize("method", ["svd", "asvd", "whitened"])
def test_the_output_loss_is_that_of_the_truncated_layer(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 9, generator=generator).double()
    x = (torch.randn(50, 9, generator=generator) * torch.arange(1, 10)).double()
    factors = get_method(method).factorize(W, LinearStats.from_inputs(x), centered=False)
    lost = output_loss(W, factors, x)
    y = x @ W.T
    for rank in range(7):
        left = y - x @ (factors.up[:, :rank] @ factors.down[:rank]).T
        assert lost[rank] == pytest.approx(float(left.square().sum() / y.square().sum()), abs=1e-9)


def test_whitening_loses_least_and_equal_scales_make_asvd_plain() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(8, 8, generator=generator).double()
    x = torch.randn(4000, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
    x = x / x.abs().mean(0)
    stats = LinearStats.from_inputs(x)
    lost = {
        m: output_loss(W, get_method(m).factorize(W, stats, centered=False), x) for m in ("svd", "asvd", "whitened")
    }
    assert torch.allclose(lost["svd"], lost["asvd"], atol=1e-6)
    assert bool((lost["whitened"] <= lost["svd"] + 1e-9).all())


def test_densities_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    grid, values = np.linspace(-3, 3, 50), np.random.default_rng(0).normal(size=400) ** 3
    assert np.allclose(figures.density(values, grid), stats.gaussian_kde(values)(grid))
    alike = figures.density(np.ones(64), np.linspace(0.9, 1.1, 4001))
    assert np.isfinite(alike).all()
    assert alike.sum() * 0.2 / 4000 == pytest.approx(1, abs=1e-3)


def test_sampled_tokens_are_no_padding_and_the_same_for_all_layers() -> None:
    model = tiny.build("BertModel")
    targets = find_targets(model)
    batches = [batch_of(tiny.inputs("BertModel", batch=8, seed=seed)) for seed in range(3)]
    real = sum(int(batch.mask.sum()) for batch in batches if batch.mask is not None)
    found = sample_activations(model, targets, batches)
    assert {len(tokens) for tokens in found.inputs.values()} == {min(real, 3 * 64)}
    assert sorted(found.pre_activations) == [0, 1]
    assert found.pre_activations[0].shape[1] == 64
    first = {target.role: target for target in targets if target.block == 0}
    fc1 = model.get_submodule(first["fc1"].name)
    with torch.no_grad():
        assert torch.allclose(fc1(found.inputs[first["fc1"].input_group]), found.pre_activations[0], atol=1e-5)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForMaskedLM"])
def test_every_figure_is_written_with_its_numbers(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    targets = find_targets(model)
    batches = [batch_of(tiny.inputs(name, batch=8, seed=seed)) for seed in range(2)]
    stats = collect(model, targets, batches, Needs.COVARIANCE)
    activations = sample_activations(model, targets, batches)
    page = write_figures(
        tmp_path / "new" / "figures",
        "Layers of a model",
        {"model": "<b>", "samples": 16},
        targets=targets,
        plain=inspect_layers(model, targets, {}, FRACTIONS),
        weighted=inspect_layers(model, targets, stats, FRACTIONS),
        stats=stats,
        activations=activations,
        spectra=layer_spectra(model, targets, stats, activations, collect_curvature(model, targets, batches)),
    )
    drawn = sorted(file.stem for file in page.parent.glob("*.svg"))
    assert drawn == [
        "attention-inputs",
        "effective-rank",
        "explained-variance",
        "output-loss",
        "pre-activations",
        "predicted-loss",
    ]
    for file in page.parent.glob("*.svg"):
        ElementTree.fromstring(file.read_bytes())
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 6
    assert "<b>" not in text
    assert not re.search(r"(?:src|href)=.https?:", text)
    numbers = json.loads((page.parent / "inspection.json").read_text())
    assert [layer["name"] for layer in numbers["layers"]] == [target.name for target in targets]
    for layer in numbers["layers"]:
        assert layer["predicted_loss"] > 0
        for curve in (*layer["explained"].values(), *layer["output_loss"].values()):
            assert list(curve)[-1] == "32"
            assert all(-1e-6 <= value <= 1 + 1e-6 for value in curve.values())
        assert all(curve["32"] == pytest.approx(1) for curve in layer["explained"].values())
        assert all(curve["32"] == pytest.approx(0, abs=1e-6) for curve in layer["output_loss"].values())


def test_calibrating_costs_nothing_more_for_it() -> None:
    """Hooks are gone when the sampling is over, whether it went well or not."""
    model = tiny.build("ViTModel")
    targets = find_targets(model)
    with pytest.raises(DataError):
        sample_activations(model, targets, [])
    assert not any(model.get_submodule(target.name)._forward_hooks for target in targets)
