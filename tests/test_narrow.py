"""Fewer neurons, smaller heads and fewer of them: exact where nothing is lost, within budget, reloadable."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import vitshrink
from vitshrink.compression.candidates import Candidate, Plan
from vitshrink.compression.choices import Choices
from vitshrink.compression.compressor import Compressor
from vitshrink.compression.findings import Findings
from vitshrink.compression.forms.narrow import Heads, Neurons
from vitshrink.compression.narrow_sites import narrow_sites
from vitshrink.compression.scales import on_one_scale
from vitshrink.config.options import CompressConfig, FinetuneConfig, FinetuneJob
from vitshrink.config.quantize import QuantizeJob
from vitshrink.data import Batch
from vitshrink.data.opening import CalibrationData
from vitshrink.errors import UsageError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.export import export
from vitshrink.jobs.finetune import finetune_checkpoint
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.methods.narrowing import eliminated, fewest, one_head, one_of_each
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.structures.static import StaticLinear
from vitshrink.models.targets import find_targets, linear_of
from vitshrink.runtime.observer import Job, Silent

Compressed = Callable[..., CompressionResult]
NAMES = ("ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "BertForMaskedLM")


class _Samples(list):  # type: ignore[type-arg]
    """As many as there are: all that a compression asks of its samples."""


def compression(model: PreTrainedModel, name: str, **entries: Any) -> Compressor:
    """Narrower layers of a model in memory, calibrated on random inputs."""
    inputs = tiny.inputs(name, 32)
    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    data = CalibrationData(_Samples(range(32)), [Batch(inputs, mask, [str(n) for n in range(32)], [])])  # type: ignore[arg-type]
    given = {"forms": "narrow", "keep": (0.8,), "compensation": "bias"} | entries
    config = CompressConfig("model", "out", calibration="x", **given)
    return Choices.of(config).compressor(model, find_targets(model), torch.float32, data)


def built(found: Compressor, forms: dict[str, Any]) -> PreTrainedModel:
    """The model with these forms, by the end of the name of a site, wherever there is such a site."""
    job = Job(Silent())
    findings, plan = found.learn(job), {}
    for offer in found.offers():
        wanted = next((form for end, form in forms.items() if offer.name.endswith(end)), None)
        plan[offer.name] = Candidate(wanted, offer.kept.cost)
    return found.build(findings, plan, job).eval()


def outputs(model: PreTrainedModel, name: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny.inputs(name, 8))[0]
    return found


@pytest.mark.parametrize("choose", [fewest(1), fewest(3), one_of_each(4), one_head(4)])
def test_what_stays_is_the_least_squares_fit_and_losses_add_up(choose: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    C = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    W, R = (torch.randn(5, n, generator=generator).double() for n in (12, 5))
    found = eliminated(W, C, R, choose)
    for kept in (12, 11, 8, 4):
        stays = found.order[:kept]
        best = torch.zeros_like(W)
        best[:, stays] = W @ C[:, stays] @ torch.linalg.inv(C[stays][:, stays])
        rest = found.factors.up[:, :kept] @ found.factors.down[:kept]
        torch.testing.assert_close(rest, best, rtol=1e-3, atol=1e-3)
        error = R @ (W - best)
        torch.testing.assert_close(found.factors.loss[kept], (error @ C @ error.T).trace(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def with_spare_parts(name: str) -> PreTrainedModel:
    """Half of the neurons copy others, scores need 6 of 16 dimensions, and values 8."""
    model = tiny.build(name)
    for site in narrow_sites(model, find_targets(model)):
        layers = {role: linear_of(model, target.name) for role, target in site.targets.items()}
        if site.attention is None:
            half = layers["fc1"].out_features // 2
            layers["fc1"].weight[half:] = layers["fc1"].weight[:half]
            layers["fc1"].bias[half:] = layers["fc1"].bias[:half]
            continue
        layers["key"].weight.view(2, 16, -1)[:, 6:] = 0
        layers["value"].weight.view(2, 16, -1)[:, 8:] = 0
    return model


@pytest.mark.parametrize("name", NAMES)
def test_what_others_say_as_well_costs_nothing(name: str) -> None:
    model = with_spare_parts(name)
    found = compression(model, name)
    half = find_targets(model, layers="mlp")[0].shape[0] // 2
    smaller = built(found, {"mlp": Neurons(half), "attention": Heads(2, 6, 8), "self": Heads(2, 6, 8)})
    saved = 2 * (32 * (2 * half + 2 * 2 * (10 + 8)) + half + 2 * 10 + 32 + 32)
    assert cost.parameters(model) - cost.parameters(smaller) == saved
    torch.testing.assert_close(outputs(smaller, name), outputs(model, name), rtol=1e-3, atol=1e-3)
    worse = built(found, {"mlp": Neurons(half // 2), "attention": Heads(2, 4, 4), "self": Heads(2, 4, 4)})
    assert (outputs(worse, name) - outputs(model, name)).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_head_that_does_nothing_goes_first(name: str) -> None:
    model = tiny.build(name)
    for site in narrow_sites(model, find_targets(model)):
        if site.attention is not None:
            linear_of(model, site.targets["output"].name).weight[:, :16] = 0
    found = compression(model, name)
    smaller = built(found, {"attention": Heads(1, 16, 16), "self": Heads(1, 16, 16)})
    assert cost.parameters(model) - cost.parameters(smaller) == 2 * (4 * 16 * 32 + 16 + 32 + 32)
    torch.testing.assert_close(outputs(smaller, name), outputs(model, name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_plans_tell_the_size_of_what_is_built(name: str) -> None:
    model = tiny.build(name)
    found = compression(model, name)
    findings = found.learn(Job(Silent()))
    for share in (0.95, 0.8, 0.6):
        plan: Plan = found.plan(findings, int(share * cost.parameters(model)))
        smaller = found.build(findings, plan, Job(Silent()))
        assert found.size(plan) == cost.parameters(smaller) <= share * cost.parameters(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_reloads_with_stock_calls_and_fits_no_dense_model(compressed: Compressed, name: str) -> None:
    result = compressed(name, forms="narrow", keep=(0.8,))
    assert result.directory is not None
    model = getattr(transformers, name).from_pretrained(result.directory).eval()
    assert torch.equal(outputs(model, name), outputs(vitshrink.load(result.directory), name))
    assert result.report.parameters.compressed == cost.parameters(model) <= 0.8 * result.report.parameters.dense
    forms = {entry.form for entry in result.report.layers if not entry.dense}
    assert any("neurons" in str(form) for form in forms)
    assert any(" of " in str(form) for form in forms)
    dense, there = tiny.build(name).state_dict(), model.state_dict()
    for path in compressed_layers(model):
        inside = [key for key in there if key.startswith(path) and key in dense]
        assert any(there[key].shape != dense[key].shape for key in inside)


def test_a_narrower_model_trains_and_shows_its_maps(compressed: Compressed) -> None:
    name = "ViTForImageClassification"
    directory = compressed(name, forms="narrow", keep=(0.6,)).directory
    model = transformers.ViTForImageClassification.from_pretrained(directory, attn_implementation="eager")
    maps = model(**tiny.inputs(name), output_attentions=True).attentions
    assert {each.shape[1] for each in maps} <= {1, 2}
    model(**tiny.inputs(name), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.vit.layers.parameters())


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForMaskedLM"])
def test_a_narrower_model_may_be_rounded_to_integers(compressed: Compressed, name: str, tmp_path: Path) -> None:
    narrow = compressed(name, forms="narrow", keep=(0.7,))
    quantize_checkpoint(QuantizeJob(str(narrow.directory), str(tmp_path / "int8"), weights="int8"))
    model = getattr(transformers, name).from_pretrained(tmp_path / "int8").eval()
    blocks = model.base_model.get_submodule("layers" if "ViT" in name else "encoder")
    assert not any(isinstance(module, torch.nn.Linear) for module in blocks.modules())
    exact = vitshrink.load(str(narrow.directory))
    torch.testing.assert_close(outputs(model, name), outputs(exact, name), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForMaskedLM"])
def test_a_narrower_model_may_be_rounded_with_its_activations(
    compressed: Compressed, name: str, flat_images: Path, text_file: Path, tmp_path: Path
) -> None:
    narrow, data = compressed(name, forms="narrow", keep=(0.7,)), flat_images if "ViT" in name else text_file
    job = QuantizeJob(str(narrow.directory), str(tmp_path / "int8"), activations="static", calibration=str(data))
    quantize_checkpoint(job)
    model = getattr(transformers, name).from_pretrained(tmp_path / "int8").eval()
    assert any(isinstance(module, StaticLinear) and module.spec.outputs for module in model.modules())
    exact = vitshrink.load(str(narrow.directory))
    found, wanted = outputs(model, name).flatten(), outputs(exact, name).flatten()
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.95  # noise is further out than any calibrated image


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_narrower_model_is_exported(compressed: Compressed, form: str, tmp_path: Path) -> None:
    narrow = compressed("ViTForImageClassification", forms="narrow", keep=(0.7,))
    assert export(str(narrow.directory), str(tmp_path / "out"), form).batch_sizes == (1, 2, 7)


@pytest.mark.slow
def test_a_narrower_model_is_trained_afterwards(
    compressed: Compressed, vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    narrow = compressed("ViTForImageClassification", forms="narrow", keep=(0.7,))
    settings = FinetuneConfig(data=str(flat_images), epochs=1, batch_size=8)
    result = finetune_checkpoint(
        FinetuneJob(str(narrow.directory), str(tmp_path / "out"), teacher=str(vit_directory), finetune=settings)
    )
    assert cost.parameters(vitshrink.load(str(result.directory))) == narrow.report.parameters.compressed


def test_narrower_layers_go_with_merged_tokens_and_bounds(compressed: Compressed) -> None:
    name = "ViTForImageClassification"
    for entries in ({"keep": (0.8,), "tokens": "merge", "token_operations": 0.7}, {"keep": (), "max_kl": 0.01}):
        result = compressed(name, forms="narrow", **entries)
        model = transformers.ViTForImageClassification.from_pretrained(result.directory).eval()
        assert torch.equal(outputs(model, name), outputs(vitshrink.load(str(result.directory)), name))
        assert result.report.parameters.compressed < result.report.parameters.dense


def test_bytes_are_met_where_a_narrower_model_is_rounded(compressed: Compressed) -> None:
    dense = compressed("ViTForImageClassification", forms="narrow", keep=(0.95,), quantize="int8")
    size = int(0.93 * dense.report.bytes.compressed)
    result = compressed("ViTForImageClassification", forms="narrow", target_size=f"{size / 1000}kB", quantize="int8")
    assert 0.85 * size < result.report.bytes.compressed <= size


def test_an_mlp_or_an_attention_is_narrower_or_of_low_rank_and_never_both() -> None:
    name = "ViTForImageClassification"
    model = tiny.build(name)
    found = compression(model, name, forms="rank+narrow", compensation="none")
    findings = found.learn(Job(Silent()))
    whole = {offer.name: offer.site.parts for offer in found.sites if offer.site.parts}
    losses = {}
    for share in (0.9, 0.7, 0.5):
        plan = found.plan(findings, int(share * cost.parameters(model)))
        for site, parts in whole.items():
            assert (site in plan) is not any(part in plan for part in parts)
        smaller = found.build(findings, plan, Job(Silent()))
        assert found.size(plan) == cost.parameters(smaller) <= share * cost.parameters(model)
        losses[share] = sum(each.loss for each in plan.values())
    for forms in ("narrow", "rank"):
        alone = compression(model, name, forms=forms, compensation="none")
        known = alone.learn(Job(Silent()))
        for share, loss in losses.items():
            plan = alone.plan(known, int(share * cost.parameters(model)))
            assert loss < 1.02 * sum(each.loss for each in plan.values())


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForMaskedLM"])
def test_both_kinds_together_lose_no_more_than_either_alone(name: str) -> None:
    model = tiny.build(name)
    found = compression(model, name, forms="rank+narrow", compensation="none")
    findings = found.learn(Job(Silent()))
    for share in (0.9, 0.7):
        budget = int(share * cost.parameters(model))

        def lost(findings: Findings, budget: int = budget) -> float:
            assert found.missing is not None
            return found.missing(found.replaced(findings, found.plan(findings, budget)))

        best = lost(on_one_scale(found, findings, budget, Job(Silent())))
        ranks, narrower = (lost(replace(findings, scales=scales)) for scales in ((1.0, math.inf), (math.inf, 1.0)))
        assert ranks != narrower
        assert best <= min(ranks, narrower)


@pytest.mark.parametrize("name", ["DeiTForImageClassificationWithTeacher", "BertForMaskedLM"])
def test_ranks_and_narrower_layers_reload_together(compressed: Compressed, name: str) -> None:
    result = compressed(name, forms="rank+narrow", keep=(0.75,), refine=1)
    model = getattr(transformers, name).from_pretrained(result.directory).eval()
    assert torch.equal(outputs(model, name), outputs(vitshrink.load(str(result.directory)), name))
    assert result.report.parameters.compressed == cost.parameters(model) <= 0.75 * result.report.parameters.dense


def test_bad_use_is_named_before_any_work(vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    def job(**entries: Any) -> None:
        given = {"keep": (0.8,), "calibration": str(flat_images), "forms": "narrow"} | entries
        compress(CompressConfig(str(vit_directory), str(tmp_path / "out"), **given))

    for entries, message in (
        ({"method": "whitened"}, "remove --method whitened"),
        ({"keep": (), "rank": 4}, "--rank is for low-rank layers only"),
        ({"storage": "gauge"}, "--forms narrow has no factors: remove --storage"),
        ({"forms": "rank+narrow", "keep": (), "explained_variance": 0.9}, "--explained-variance is for low-rank"),
        ({"allocation": "energy"}, "--allocation energy cannot be used with"),
        ({"landmarks": 4}, "--landmarks and --forms narrow both replace attentions"),
        ({"include": ("fc1",)}, "none of them complete in any block"),
        ({"calibration": None}, "needs calibration data"),
        ({"keep": (), "bits": 4.0}, "--bits needs integers"),
        ({"keep": (0.01,)}, "cannot reach"),
    ):
        with pytest.raises(UsageError, match=message):
            job(**entries)
    assert not (tmp_path / "out").exists()
