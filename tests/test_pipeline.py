"""Jobs from a checkpoint to a verified smaller one: every architecture, method and size, and what stops a job."""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import vitshrink
from vitshrink.compression.allocation import ALLOCATIONS
from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.data import open_samples
from vitshrink.errors import CheckpointError, DataError, NumericsError, OutputError, TargetError, UsageError
from vitshrink.jobs import compress as pipeline
from vitshrink.jobs import inputs
from vitshrink.jobs import result as written
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.methods import Factorization, available_methods, get_method, registry
from vitshrink.models import cost
from vitshrink.models.checkpoint import compressed_layers
from vitshrink.models.loading import LoadedModel
from vitshrink.models.source import examine
from vitshrink.models.targets import find_targets
from vitshrink.report import figures
from vitshrink.runtime.device import find_device

Compressed = Callable[..., CompressionResult]
Checkpoint = Callable[[str], Path]

CLASSIFIER = "ViTForImageClassification"
AUTO_CLASSES = {
    "ViTForImageClassification": transformers.AutoModelForImageClassification,
    "DeiTForImageClassification": transformers.AutoModelForImageClassification,
    "DeiTForImageClassificationWithTeacher": transformers.DeiTForImageClassificationWithTeacher,
    "ViTModel": transformers.AutoModel,
    "DeiTModel": transformers.AutoModel,
    "BertForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "BertForTokenClassification": transformers.AutoModelForTokenClassification,
    "BertForMaskedLM": transformers.AutoModelForMaskedLM,
    "BertModel": transformers.AutoModel,
}

# every architecture with every method, and every method with every allocation
PAIRS = list(itertools.product(tiny.ARCHITECTURES, available_methods()))
JOBS = [(*pair, sorted(ALLOCATIONS)[index % len(ALLOCATIONS)]) for index, pair in enumerate(PAIRS)]

WITHOUT_SAMPLES = sorted(set(ALLOCATIONS) - {"measured"})


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a job on a tiny model; they have tests of their own."""
    monkeypatch.setattr(figures, "available", lambda: False)


def digest(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def weights_of(result: CompressionResult) -> bytes:
    assert result.directory is not None
    return (result.directory / "model.safetensors").read_bytes()


def load(result: CompressionResult) -> PreTrainedModel:
    assert result.directory is not None
    return vitshrink.load(result.directory)


@torch.no_grad()
def outputs(model: PreTrainedModel, name: str) -> Tensor:
    inputs = tiny.inputs(name)
    return model(**{key: v.to(model.dtype) if v.is_floating_point() else v for key, v in inputs.items()})[0]


def job(model: Path, output: Path, **entries: Any) -> CompressConfig:
    entries = {"method": "svd", "compensation": "none"} | entries
    if not entries.keys() & {"keep", "target_params", "target_size", "rank"}:
        entries["keep"] = (0.8,)
    return CompressConfig(str(model), str(output), **entries)


def ranks(result: CompressionResult) -> dict[str, int | None]:
    return {layer.name: layer.rank for layer in result.report.layers}


def test_fast_is_short_for_what_it_leaves_out(vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    known = {"method": "curvature", "compensation": None, "calibration": str(flat_images), "samples": 8, "holdout": 0}
    slow = {"refine": 0, "allocation": "loss", "compensation": "bias"}
    weights = []
    for name, entries in {"short": {"fast": True}, "long": slow}.items():
        (result,) = compress(job(vit_directory, tmp_path / name, **known | entries))
        assert result.directory is not None
        weights.append((result.directory / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    with pytest.raises(UsageError, match=r"--fast already sets --refine"):
        job(vit_directory, tmp_path / "both", **known | {"fast": True, "refine": 1})


# Every architecture, method and allocation


@pytest.mark.parametrize(("name", "method", "allocation"), JOBS)
def test_a_compressed_model_is_what_its_report_says(
    compressed: Compressed, name: str, method: str, allocation: str
) -> None:
    result = compressed(name, method=method, allocation=allocation)
    report, directory, model = result.report, result.directory, load(result)
    assert directory is not None
    dense = tiny.build(name)
    assert report.parameters.dense == cost.parameters(dense)
    assert report.parameters.compressed == cost.parameters(model) <= 0.8 * cost.parameters(dense)
    stored = sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())
    assert stored == cost.parameters(model)
    assert report.bytes.compressed == (directory / "model.safetensors").stat().st_size < report.bytes.dense
    assert report.macs.compressed == cost.macs(model, {k: v[:1] for k, v in _example(name).items()})
    names = [target.name for target in find_targets(dense)]
    assert [layer.name for layer in report.layers] == names
    assert report.layers_parameters.compressed == cost.layers_parameters(model, names)
    assert report.layers_parameters.compressed == sum(layer.parameters for layer in report.layers)
    replaced = compressed_layers(model)
    assert {n: layer.rank for n, layer in replaced.items()} == {n: r for n, r in ranks(result).items() if r}
    assert all((layer.reason is None) == (layer.rank is not None) for layer in report.layers)
    assert (report.method, report.allocation) == (method, allocation)
    assert json.loads((directory / "report.json").read_text()) == report.to_dict()


def _example(name: str) -> dict[str, Tensor]:
    from vitshrink.models.example import example_inputs

    return example_inputs(tiny.build(name))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_stock_transformers_loads_the_same_model(compressed: Compressed, name: str) -> None:
    result = compressed(name, method="whitened")
    stock = AUTO_CLASSES[name].from_pretrained(result.directory).eval()
    assert torch.equal(outputs(stock, name), outputs(load(result), name))
    assert not torch.equal(outputs(stock, name), outputs(tiny.build(name), name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stock_transformers_loads_it_in_half_precision(compressed: Compressed, dtype: torch.dtype) -> None:
    result = compressed(CLASSIFIER, method="whitened")
    stock = AUTO_CLASSES[CLASSIFIER].from_pretrained(result.directory, dtype=dtype).eval()
    assert {parameter.dtype for parameter in stock.parameters()} == {dtype}
    torch.testing.assert_close(
        outputs(stock, CLASSIFIER).float(), outputs(load(result), CLASSIFIER), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (CLASSIFIER, "image-classification"),
        ("DeiTForImageClassificationWithTeacher", "image-classification"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertModel", "feature-extraction"),
    ],
)
@torch.no_grad()
def test_a_pipeline_prepares_inputs_and_names_classes_as_before(
    compressed: Compressed, checkpoint: Checkpoint, flat_images: Path, name: str, task: str
) -> None:
    """Its answer is worked out by hand, with the preprocessing and the class names of the dense checkpoint."""
    result, dense = compressed(name, method="whitened"), checkpoint(name)
    given = "this film is [MASK]" if task == "fill-mask" else "this film is good"
    if task == "image-classification":
        given = str(flat_images / "000.png")
        inputs = transformers.ViTImageProcessor.from_pretrained(dense)(Image.open(given), return_tensors="pt")
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
        inputs = tokenizer(given, return_tensors="pt")
    output = load(result)(**inputs)[0][0]
    best = {} if task == "feature-extraction" else {"top_k": 2}
    answer, _ = transformers.pipeline(task, str(result.directory), device="cpu", **best)([given] * 2)
    if task == "feature-extraction":
        torch.testing.assert_close(torch.tensor(answer[0]), output)
        return
    names = dict(tiny.build(name).config.id2label)
    if task == "fill-mask":
        output = output[inputs["input_ids"][0] == tokenizer.mask_token_id][0]
        names = {index: token for token, index in tokenizer.get_vocab().items()}
    scores, classes = output.softmax(-1).topk(2)
    key = "token_str" if task == "fill-mask" else "label"
    assert [entry[key] for entry in answer] == [names[int(index)] for index in classes]
    torch.testing.assert_close(torch.tensor([entry["score"] for entry in answer]), scores)


def test_activation_aware_methods_lose_less_than_plain_svd(compressed: Compressed) -> None:
    loss = {}
    for method in ("svd", "whitened", "mixed-rank"):
        evaluation = compressed(CLASSIFIER, method=method, keep=(0.6,), allocation="uniform-ratio").report.evaluation
        assert evaluation is not None
        assert evaluation.fidelity is not None
        loss[method] = evaluation.fidelity.kl
    assert loss["whitened"] < loss["svd"]
    assert loss["mixed-rank"] < loss["svd"]


# Sizes


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keeps=st.lists(st.floats(0.36, 0.9999), min_size=1, max_size=12, unique=True),
    storage=st.sampled_from(["factors", "gauge"]),
)
@pytest.mark.parametrize("allocation", WITHOUT_SAMPLES)
def test_no_plan_exceeds_its_budget(
    vit_directory: Path, tmp_path: Path, allocation: str, keeps: list[float], storage: str
) -> None:
    config = job(
        vit_directory, tmp_path / "out", keep=tuple(keeps), allocation=allocation, storage=storage, dry_run=True
    )
    for keep, result in zip(keeps, compress(config), strict=True):
        parameters = result.report.parameters
        assert parameters.compressed <= keep * parameters.dense
        assert parameters.kept <= keep


@pytest.mark.parametrize("allocation", sorted(set(ALLOCATIONS) - {"uniform-rank"}))
def test_a_budget_is_used_up(compressed: Compressed, allocation: str) -> None:
    """What is left is less than the cheapest step of any layer."""
    report = compressed(CLASSIFIER, method="svd", allocation=allocation, keep=(0.7,)).report
    left = 0.7 * report.parameters.dense - report.parameters.compressed
    assert 0 <= left < 64


@pytest.mark.parametrize("name", [CLASSIFIER, "BertForMaskedLM"])
@pytest.mark.parametrize("method", available_methods())
def test_pivots_store_more_rank_in_the_same_size(compressed: Compressed, name: str, method: str) -> None:
    plain, pivots = (
        compressed(name, method=method, storage=storage, allocation="uniform-ratio") for storage in ("factors", "gauge")
    )
    total = plain.report.parameters.dense
    for result in (plain, pivots):
        assert cost.parameters(load(result)) == result.report.parameters.compressed <= 0.8 * total
    for rank, more in zip(ranks(plain).values(), ranks(pivots).values(), strict=True):
        assert (rank or 0) < (more or 32)
    stock = AUTO_CLASSES[name].from_pretrained(pivots.directory).eval()
    assert torch.equal(outputs(stock, name), outputs(load(pivots), name))


def test_target_params_is_a_bound(compressed: Compressed) -> None:
    result = compressed(CLASSIFIER, method="svd", target_params="15k")
    assert 14_900 < cost.parameters(load(result)) <= 15_000


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_is_not_larger_than_asked(compressed: Compressed, checkpoint: Checkpoint, name: str, dtype: str) -> None:
    asked = int(0.8 * examine(checkpoint(name)).nbytes) // (2 if dtype == "float16" else 1)
    result = compressed(name, method="svd", target_size=str(asked), dtype=dtype)
    written = len(weights_of(result))
    assert written <= asked
    assert written > asked - 12_000  # room for the header of tiny files, which hold many small tensors


def test_one_rank_for_all(compressed: Compressed) -> None:
    result = compressed(CLASSIFIER, method="svd", rank=5)
    assert set(ranks(result).values()) == {5}
    assert result.report.allocation == "fixed rank"


@pytest.mark.parametrize("method", ["pca", "svd"])
def test_explained_variance_decides_every_rank(compressed: Compressed, method: str) -> None:
    result = compressed("ViTForImageClassification", method=method, explained_variance=0.8)
    assert result.report.allocation == "explained variance"
    layers = result.report.layers
    assert any(entry.rank for entry in layers)
    assert all(entry.relative_error**2 <= 0.2 for entry in layers)
    with pytest.raises(TargetError, match="leaves every layer dense"):
        compressed("ViTForImageClassification", method="svd", explained_variance=0.9999)


def test_a_rank_that_shrinks_only_some_layers_leaves_the_others_dense(compressed: Compressed) -> None:
    result = compressed(CLASSIFIER, method="svd", rank=18)
    assert {shape for shape, rank in _by_shape(result) if rank is None} == {(32, 32)}
    assert {rank for _, rank in _by_shape(result)} == {18, None}
    reasons = {layer.reason for layer in result.report.layers if layer.rank is None}
    assert reasons == {"this rank would not make the layer smaller"}


def _by_shape(result: CompressionResult) -> list[tuple[tuple[int, ...], int | None]]:
    return [(layer.shape, layer.rank) for layer in result.report.layers]


def test_effects_are_measured_on_samples(vit_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"allocation 'measured' needs calibration data: pass --calibration"):
        compress(job(vit_directory, tmp_path / "out", allocation="measured"))


def test_ranks_are_multiples_where_asked(compressed: Compressed) -> None:
    for allocation in sorted(ALLOCATIONS):
        result = compressed(CLASSIFIER, method="svd", rank_multiple=4, allocation=allocation)
        assert all(rank is None or rank % 4 == 0 for rank in ranks(result).values())


def test_several_sizes_come_from_one_calibration(vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    class Recorder(pipeline.Silent):
        def stage(self, title: str, total: int | None = None) -> Any:
            seen.append(title)
            return super().stage(title, total)

    keeps = (0.8, 0.6, 0.7)
    config = job(
        vit_directory,
        tmp_path / "out",
        keep=keeps,
        method="whitened",
        compensation="bias",
        calibration=str(flat_images),
        samples=16,
        holdout=8,
    )
    results = compress(config, Recorder())
    assert seen.count("Calibrating") == seen.count("Factorizing") == 1
    assert [result.directory for result in results] == [tmp_path / "out" / f"keep-{keep}" for keep in keeps]
    for keep, result in zip(keeps, results, strict=True):
        assert keep - 0.01 < cost.parameters(load(result)) / result.report.parameters.dense <= keep
        single = compress(replace(config, keep=(keep,), output=str(tmp_path / f"single-{keep}")))[0]
        assert weights_of(single) == weights_of(result)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["comparison.html", "comparison.md", "keep-0.6", "keep-0.7", "keep-0.8"]
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").count("\n") == 5


def test_each_of_several_reports_times_its_own_stages(vit_directory: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    class Slow(pipeline.Silent):
        @contextmanager
        def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            started = time.perf_counter()
            with super().stage(title, total) as advance:
                yield advance
                if title == "Saving and verifying":
                    time.sleep(0.2)
                    seen.append(time.perf_counter() - started)

    first, second = compress(job(vit_directory, tmp_path / "out", keep=(0.8, 0.6)), Slow())
    assert first.report.timings["load"] == second.report.timings["load"]
    for result, seconds in zip((first, second), seen, strict=True):
        assert seconds <= result.report.timings["save"] < sum(seen)
    assert (
        first.report.warnings
        == second.report.warnings
        == ("the result is not evaluated: pass --eval or --calibration.",)
    )


@pytest.mark.parametrize(
    ("name", "layers"), [*((name, "all") for name in tiny.ARCHITECTURES), (CLASSIFIER, "attention")]
)
def test_what_an_unreachable_target_calls_reachable_is(
    checkpoint: Checkpoint, tmp_path: Path, name: str, layers: str
) -> None:
    model = checkpoint(name)
    with pytest.raises(TargetError, match="cannot reach") as caught:
        compress(job(model, tmp_path / "out", keep=(0.01,), layers=layers))
    assert ("--layers" in str(caught.value)) == (layers == "attention")
    found = re.search(r"--keep (\S+), --target-params (\d+) or --target-size (\S+MB)\.", str(caught.value))
    assert found is not None
    keep, parameters, size = found.groups()
    for entries in ({"keep": (float(keep),)}, {"target_params": parameters}):
        (planned,) = compress(job(model, tmp_path / "out", layers=layers, dry_run=True, **entries))
        assert set(ranks(planned).values()) <= {1, 2}
    (result,) = compress(job(model, tmp_path / "out", layers=layers, target_size=size))
    assert len(weights_of(result)) <= float(size.removesuffix("MB")) * 1e6


@pytest.mark.parametrize("allocation", WITHOUT_SAMPLES)
def test_the_least_size_is_reached_with_every_allocation(compressed: Compressed, allocation: str) -> None:
    (dry,) = compress(replace(job(Path(), Path(), dry_run=True), **_least(compressed, allocation)))
    assert set(ranks(dry).values()) == {1}


def _least(compressed: Compressed, allocation: str) -> dict[str, Any]:
    recipe = compressed(CLASSIFIER, method="svd", rank=1).report
    parameters = str(recipe.parameters.compressed)
    return {"model": recipe.model, "keep": (), "target_params": parameters, "allocation": allocation}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"target_params": "24036"}, "has only 24,036 parameters"),
        ({"target_params": "1M"}, "has only 24,036 parameters"),
        ({"target_size": "1GB"}, "has only 24,036 parameters"),
        ({"rank": 32}, "--rank 32 makes no layer smaller: the largest useful rank is 21"),
        ({"rank_multiple": 64}, "use a smaller --rank-multiple"),
    ],
)
def test_a_size_that_changes_nothing_is_refused(
    vit_directory: Path, tmp_path: Path, entries: dict[str, Any], said: str
) -> None:
    with pytest.raises(TargetError, match=said):
        compress(job(vit_directory, tmp_path / "out", **entries))
    assert not list(tmp_path.iterdir())


# Layers


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"layers": "attention"}, r"attention"),
        ({"layers": "mlp"}, r"mlp"),
        ({"include": (r"layers\.1\.",)}, r"layers\.1"),
        ({"include": ("q_proj", "k_proj")}, r"[qk]_proj"),
        ({"exclude": ("mlp", r"layers\.0")}, r"layers\.1\.attention"),
        ({"layers": "mlp", "exclude": ("fc2",)}, r"fc1"),
    ],
)
def test_only_chosen_layers_change(compressed: Compressed, entries: dict[str, Any], expected: str) -> None:
    result = compressed(CLASSIFIER, method="svd", rank=4, **entries)
    names = {target.name for target in find_targets(tiny.build(CLASSIFIER))}
    chosen = {name for name in names if re.search(expected, name)}
    assert set(compressed_layers(load(result))) == chosen == set(ranks(result))
    dense = tiny.build(CLASSIFIER).state_dict()
    for name, value in load(result).state_dict().items():
        if name.rpartition(".")[0] not in chosen:
            assert torch.equal(value, dense[name]), name


def test_layers_without_a_bias_are_compressed_too(tmp_path: Path, flat_images: Path) -> None:
    model = tiny.build(CLASSIFIER)
    model.config.qkv_bias = False
    model = transformers.ViTForImageClassification(model.config)
    model.save_pretrained(tmp_path / "model")
    tiny.write_processor(tmp_path / "model")
    for method in available_methods():
        config = job(
            tmp_path / "model",
            tmp_path / method,
            method=method,
            compensation=get_method(method).compensation,
            calibration=str(flat_images),
            samples=16,
            rank=6,
        )
        (result,) = compress(config)
        layer = compressed_layers(load(result))["vit.layers.0.attention.q_proj"]
        assert layer.bias is None


def test_a_layer_that_cannot_be_factorized_stays_dense_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, vit_directory: Path, tmp_path: Path
) -> None:
    svd = get_method("svd")

    def failing(weight: Tensor, stats: None, *, centered: bool = False) -> Factorization:
        if weight.shape == (64, 32):
            raise NumericsError("it did not converge.")
        return svd.factorize(weight, stats, centered=centered)

    monkeypatch.setitem(registry._METHODS, "svd", replace(svd, factorize=failing))
    (result,) = compress(job(vit_directory, tmp_path / "out"))
    failed = [layer for layer in result.report.layers if "fc1" in layer.name]
    assert [layer.rank for layer in failed] == [None, None]
    assert {layer.reason for layer in failed} == {"it did not converge."}
    assert any("fc1 stays dense: it did not converge." in warning for warning in result.report.warnings)
    assert result.report.parameters.kept <= 0.8
    dense = tiny.build(CLASSIFIER).get_submodule("vit.layers.0.mlp.fc1")
    assert torch.equal(load(result).get_submodule("vit.layers.0.mlp.fc1").weight, dense.weight)  # type: ignore[arg-type]


def test_factors_that_are_not_finite_are_a_failure_and_none_left_an_error(
    monkeypatch: pytest.MonkeyPatch, vit_directory: Path, tmp_path: Path
) -> None:
    svd = get_method("svd")

    def poisoned(weight: Tensor, stats: None, *, centered: bool = False) -> Factorization:
        factors = svd.factorize(weight, stats, centered=centered)
        return replace(factors, up=factors.up * float("nan"))

    monkeypatch.setitem(registry._METHODS, "svd", replace(svd, factorize=poisoned))
    with pytest.raises(NumericsError, match="no layer could be factorized"):
        compress(job(vit_directory, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", available_methods())
def test_zero_and_rank_one_weights_and_dead_inputs_are_survived(method: str, tmp_path: Path, flat_images: Path) -> None:
    model = tiny.build(CLASSIFIER)
    with torch.no_grad():
        for name in ("vit.layers.0.attention.q_proj", "vit.layers.0.mlp.fc2"):
            model.get_submodule(name).weight.zero_()  # type: ignore[operator, union-attr]
        model.get_submodule("vit.layers.1.mlp.fc1").weight.fill_(0.01)  # type: ignore[operator, union-attr]
        model.get_submodule("vit.layers.1.layernorm_before").weight[:9] = 0  # type: ignore[index]
        model.get_submodule("vit.layers.1.layernorm_before").bias[:9] = 0  # type: ignore[index]
    model.save_pretrained(tmp_path / "model")
    tiny.write_processor(tmp_path / "model")
    config = job(
        tmp_path / "model",
        tmp_path / "out",
        keep=(0.7,),
        method=method,
        compensation=get_method(method).compensation,
        calibration=str(flat_images),
        samples=3,
    )
    (result,) = compress(config)
    assert outputs(load(result), CLASSIFIER).isfinite().all()


# Data


def test_a_method_that_reads_weights_alone_reads_no_calibration_data(compressed: Compressed) -> None:
    plain = compressed(CLASSIFIER, method="svd", compensation="none").report
    repaired = compressed(CLASSIFIER, method="svd", compensation="bias").report
    assert "preprocess" not in plain.timings
    assert plain.calibration is None
    assert repaired.calibration is not None
    assert repaired.calibration.samples == 16


def test_fidelity_is_measured_on_samples_that_were_not_calibrated_on(compressed: Compressed, flat_images: Path) -> None:
    report = compressed(CLASSIFIER, method="whitened").report
    assert report.evaluation is not None
    assert report.calibration is not None
    assert report.evaluation.samples == 8
    assert report.evaluation.fidelity.kl > 0
    assert report.evaluation.dense is None  # no labels
    everything = open_samples(flat_images, "image")
    used, left = everything.select(16, 0), everything.select(8, 0, skip=16)
    assert report.calibration.fingerprint == used.fingerprint()
    assert report.evaluation.fingerprint == left.fingerprint()
    assert not set(used.digests) & set(left.digests)


def test_methods_are_measured_on_the_same_held_out_samples(compressed: Compressed) -> None:
    evaluations = [compressed(CLASSIFIER, method=method).report.evaluation for method in available_methods()]
    assert len({evaluation.fingerprint for evaluation in evaluations if evaluation}) == 1


def test_fewer_samples_than_asked_are_warned_of(compressed: Compressed) -> None:
    report = compressed(CLASSIFIER, method="whitened", samples=500).report
    assert any("has 24 samples; --samples asked for 500" in warning for warning in report.warnings)
    assert any("fidelity was not measured" in warning for warning in report.warnings)
    assert report.evaluation is None
    assert report.calibration is not None
    assert report.calibration.samples == 24


def test_few_samples_are_enough_to_measure_what_calibrates_on_none(compressed: Compressed) -> None:
    report = compressed(CLASSIFIER, method="svd", samples=500).report
    assert report.evaluation is not None
    assert report.evaluation.samples == 8
    assert not report.warnings


def test_an_overlap_of_calibration_and_evaluation_is_warned_of(
    compressed: Compressed, learned_images: Path, flat_images: Path, tmp_path: Path
) -> None:
    apart = compressed(CLASSIFIER, method="whitened", samples=24, eval=str(learned_images))
    assert not any("also calibrated on" in warning for warning in apart.report.warnings)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, file in enumerate([*sorted(flat_images.iterdir())[:3], *sorted(learned_images.rglob("*.png"))[:20]]):
        (mixed / f"renamed {number}.png").write_bytes(file.read_bytes())
    both = compressed(CLASSIFIER, method="whitened", samples=24, eval=str(mixed))
    assert any("3 of the 23 evaluation samples were also calibrated on" in warning for warning in both.report.warnings)
    unread = compressed(CLASSIFIER, method="svd", samples=24, eval=str(mixed))
    assert not unread.report.warnings  # nothing was calibrated on


def test_an_evaluation_in_the_report_is_what_eval_finds(
    compressed: Compressed, vit_directory: Path, learned_images: Path
) -> None:
    result = compressed(CLASSIFIER, method="whitened", eval=str(learned_images))
    assert result.report.evaluation is not None
    found = evaluate_checkpoint(str(result.directory), DataConfig(str(learned_images)), baseline=str(vit_directory))
    again = found.evaluation
    for group in ("dense", "compressed", "difference"):
        assert getattr(result.report.evaluation, group) == getattr(again, group)
    assert result.report.evaluation.fidelity.kl == pytest.approx(again.fidelity.kl, rel=1e-4)
    assert result.report.evaluation.fingerprint == found.measurement.fingerprint
    assert result.report.evaluation.dense.correct == 34


def test_the_evaluation_can_be_limited(compressed: Compressed, learned_images: Path) -> None:
    report = compressed(CLASSIFIER, method="svd", eval=str(learned_images), eval_limit=12, seed=3).report
    assert report.evaluation is not None
    assert report.evaluation.samples == 12
    assert report.evaluation.fingerprint == open_samples(learned_images, "image").select(12, 3).fingerprint()


def test_labels_that_cannot_be_aligned_stop_the_job_before_its_work(
    monkeypatch: pytest.MonkeyPatch, vit_directory: Path, learned_images: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(inputs, "read_calibration", None)  # not even that is reached
    (tmp_path / "val").mkdir()
    for index, name in enumerate(tiny.IMAGE_CLASSES):
        (tmp_path / "val" / f"group {index}").symlink_to(learned_images / name)
    for entries, said in (({}, "--class-map"), ({"class_map": "nowhere.txt"}, "nowhere.txt")):
        with pytest.raises(DataError, match=said):
            compress(job(vit_directory, tmp_path / "out", eval=str(tmp_path / "val"), **entries))
    assert not (tmp_path / "out").exists()


def test_nothing_to_measure_on_is_warned_of(vit_directory: Path, tmp_path: Path) -> None:
    (result,) = compress(job(vit_directory, tmp_path / "out"))
    assert result.report.evaluation is None
    assert any("is not evaluated" in warning for warning in result.report.warnings)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"method": "whitened"}, "method 'whitened' needs calibration data: pass --calibration"),
        ({"method": "asvd"}, "method 'asvd' needs calibration data"),
        ({"compensation": "bias"}, "compensation 'bias' needs calibration data"),
        ({"compensation": "residual"}, "compensation 'residual' needs calibration data"),
        ({"method": "svdd"}, "unknown method 'svdd'. Did you mean 'svd'"),
        ({"allocation": "enrgy"}, "unknown allocation 'enrgy'. Did you mean 'energy'"),
        ({"compensation": "biass"}, "unknown compensation 'biass'. Did you mean 'bias'"),
        ({"options": {"alpha": 1}}, "method 'svd' has no options"),
        ({"method": "asvd", "calibration": "x", "options": {"alhpa": 1}}, "'alhpa'. Did you mean 'alpha'"),
        ({"method": "asvd", "calibration": "x", "options": {"alpha": "much"}}, "such as alpha=0.5"),
        ({"method": "asvd", "calibration": "x", "options": {"alpha": True}}, "such as alpha=0.5"),
        ({"method": "asvd", "calibration": "x", "options": {"centered": 1}}, "unknown --option .*'centered'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(tmp_path: Path, entries: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        compress(job(tmp_path / "not even a model", tmp_path / "out", **entries))


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", ""])
def test_a_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device}.*choose auto, cpu"):
        find_device(device)


def test_an_option_of_a_method_has_an_effect(compressed: Compressed) -> None:
    plain, exact = (compressed(CLASSIFIER, method="asvd", options={"alpha": alpha}) for alpha in (0.5, 0))
    assert weights_of(plain) != weights_of(exact)
    assert exact.report.recipe is not None
    assert exact.report.recipe["options"] == {"alpha": 0}


# Reproducibility


@pytest.mark.parametrize("method", available_methods())
@pytest.mark.parametrize("name", [CLASSIFIER, "BertForSequenceClassification"])
def test_the_same_seed_gives_the_same_bytes(compressed: Compressed, tmp_path: Path, name: str, method: str) -> None:
    first = compressed(name, method=method)
    assert first.report.recipe is not None
    recipe = dict(first.report.recipe) | {"output": str(tmp_path / "out")}
    (second,) = compress(CompressConfig.from_mapping(recipe))
    assert weights_of(first) == weights_of(second)
    assert ranks(first) == ranks(second)


def test_another_seed_draws_other_samples(compressed: Compressed) -> None:
    first, second = (compressed(CLASSIFIER, method="whitened", seed=seed) for seed in (0, 1))
    assert weights_of(first) != weights_of(second)
    assert first.report.calibration is not None
    assert second.report.calibration is not None
    assert first.report.calibration.fingerprint != second.report.calibration.fingerprint


def test_the_batch_size_hardly_matters(compressed: Compressed) -> None:
    one, many = (load(compressed(CLASSIFIER, method="whitened", batch_size=size)) for size in (1, 16))
    torch.testing.assert_close(outputs(one, CLASSIFIER), outputs(many, CLASSIFIER), rtol=0, atol=1e-3)


# Types of numbers


@pytest.mark.parametrize("method", available_methods())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_source_stays_so(tmp_path: Path, flat_images: Path, method: str, dtype: torch.dtype) -> None:
    model = tiny.write(CLASSIFIER, tmp_path / "model", dtype=dtype)
    config = job(
        model,
        tmp_path / "out",
        method=method,
        compensation=get_method(method).compensation,
        calibration=str(flat_images),
        samples=16,
        holdout=8,
    )
    (result,) = compress(config)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert result.report.bytes.kept < 0.9
    stock = AUTO_CLASSES[CLASSIFIER].from_pretrained(tmp_path / "out")
    assert stock.dtype == dtype
    assert outputs(stock, CLASSIFIER).isfinite().all()


def test_the_type_to_save_in_can_be_chosen(compressed: Compressed) -> None:
    result = compressed(CLASSIFIER, method="svd", dtype="bfloat16")
    assert result.directory is not None
    stored = load_file(result.directory / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


# What goes wrong


def damage(directory: Path, kind: str) -> str:
    """Spoil a checkpoint; returns what the message must name."""
    weights, config = directory / "model.safetensors", directory / "config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "model.safetensors"
    if kind == "unsupported":
        config.write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
        return r"config\.json.*GPT2LMHeadModel.*is a decoder.*compresses encoders"
    if kind == "no config":
        config.unlink()
        return r"config\.json"
    if kind == "no processor":
        (directory / "preprocessor_config.json").unlink()
        return "image processor"
    tensors = load_file(weights)
    name = next(name for name in tensors if "query.weight" in name)
    tensors[name][2, 3] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, weights, metadata={"format": "pt"})
    return "NaN"


@pytest.mark.parametrize("kind", ["truncated", "unsupported", "no config", "no processor", "not finite"])
def test_a_checkpoint_that_cannot_be_used_is_named_and_nothing_is_written(
    kind: str, tmp_path: Path, flat_images: Path
) -> None:
    named = damage(tiny.write(CLASSIFIER, tmp_path / "model"), kind)
    with pytest.raises(CheckpointError, match=named) as caught:
        compress(job(tmp_path / "model", tmp_path / "new" / "out", calibration=str(flat_images)))
    assert str(tmp_path / "model") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_source_is_never_changed(vit_directory: Path, class_images: Path, tmp_path: Path) -> None:
    before = digest(vit_directory)
    for method in available_methods():
        compress(
            job(
                vit_directory,
                tmp_path / method,
                method=method,
                compensation=get_method(method).compensation,
                calibration=str(class_images),
                samples=16,
                holdout=8,
            )
        )
    assert digest(vit_directory) == before


@pytest.mark.parametrize("where", [".", "inside", "..", "link"])
def test_an_output_that_touches_the_source_is_refused(where: str, tmp_path: Path) -> None:
    model = tiny.write(CLASSIFIER, tmp_path / "model")
    (model / "link").symlink_to(model)
    before = digest(model)
    with pytest.raises(OutputError, match=r"choose another output|give the directory itself"):
        compress(job(model, model / where, overwrite=True))
    assert digest(model) == before


def test_a_result_that_does_not_verify_is_not_published(
    monkeypatch: pytest.MonkeyPatch, vit_directory: Path, tmp_path: Path
) -> None:
    """The second of two outputs fails: neither appears."""
    calls = []

    verify = written.verify

    def failing(stage: Path, *arguments: Any, **options: Any) -> LoadedModel:
        calls.append(stage)
        if len(calls) == 2:
            raise OutputError("does not contain the weights in memory")
        return verify(stage, *arguments, **options)

    monkeypatch.setattr(written, "verify", failing)
    with pytest.raises(OutputError, match="weights in memory"):
        compress(job(vit_directory, tmp_path / "out", keep=(0.8, 0.7)))
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_labels_that_look_permuted_stop_the_job(tmp_path: Path, vit_directory: Path) -> None:
    """Images of which the dense model gets none right."""
    from PIL import Image

    classify = transformers.pipeline("image-classification", str(vit_directory), device="cpu")
    for name in tiny.IMAGE_CLASSES:
        (tmp_path / "val" / name).mkdir(parents=True)
    tiny.write_images(tmp_path / "pool", 60, seed=7)
    for number, file in enumerate(sorted((tmp_path / "pool").iterdir())):
        seen = classify(Image.open(file))[0]["label"]
        wrong = tiny.IMAGE_CLASSES[(tiny.IMAGE_CLASSES.index(seen) + 1) % 4]
        file.rename(tmp_path / "val" / wrong / f"{number}.png")
    with pytest.raises(DataError, match="labels look permuted"):
        compress(job(vit_directory, tmp_path / "out", eval=str(tmp_path / "val")))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_plans_what_the_job_does(compressed: Compressed, tmp_path: Path) -> None:
    real = compressed(CLASSIFIER, method="whitened")
    assert real.report.recipe is not None
    recipe = dict(real.report.recipe) | {"output": str(tmp_path / "new" / "out"), "dry_run": True}
    (dry,) = compress(CompressConfig.from_mapping(recipe))
    assert dry.directory is None
    assert not list(tmp_path.iterdir())
    assert dry.report.parameters == real.report.parameters
    assert dry.report.layers == real.report.layers
    assert dry.report.evaluation is None


@pytest.mark.parametrize("refine", [0, 1])
def test_a_dry_run_says_that_it_does_not_refine(
    refine: int, vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"method": "curvature", "compensation": None, "calibration": str(flat_images), "samples": 8}
    (dry,) = compress(job(vit_directory, tmp_path / "out", refine=refine, dry_run=True, **flags))
    assert any("does not refine" in warning for warning in dry.report.warnings) == bool(refine)
