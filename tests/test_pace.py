"""A budget of time: a clock that counts operations stands for one that is never the same twice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kinds
import pytest
import tiny
import torch
from torch import Tensor, nn

import vitshrink
from vitshrink.compression import clock
from vitshrink.compression.clock import Clock, Run
from vitshrink.compression.static_layers import to_the_nearest
from vitshrink.compression.times import block_times, layer_times
from vitshrink.config.options import CompressConfig
from vitshrink.errors import UsageError
from vitshrink.jobs.compress import compress
from vitshrink.models import cost
from vitshrink.models.example import example_inputs
from vitshrink.models.merged import Operations, merge_tokens, tokens_of
from vitshrink.models.parts import Product, random_tokens
from vitshrink.models.runtimes import RUNTIMES, Runtime, find_runtime
from vitshrink.models.structures import structure_of
from vitshrink.models.structures.merging import MergedTokens
from vitshrink.models.structures.static import StaticProduct
from vitshrink.models.views import view_of
from vitshrink.report.making import QuantizationRecord
from vitshrink.runtime.cache import Cache

VIT, BERT = "ViTForImageClassification", "BertForSequenceClassification"
Inputs = Mapping[str, Mapping[str, Tensor]]


def counted(models: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, int]:
    """A nanosecond an operation."""
    return {name: max(1, cost.macs(model, inputs[name])) for name, model in models.items()}


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "shortest", counted)


def job(tmp_path: Path, model: Path, calibration: Path, **entries: Any) -> CompressConfig:
    known = {"calibration": str(calibration), "samples": 16, "holdout": 8, "batch_size": 8, "latency": (1,)}
    return CompressConfig.from_mapping({"model": str(model), "output": str(tmp_path / "out"), **known, **entries})


def test_a_schedule_is_priced_by_blocks_that_were_timed() -> None:
    model = tiny.build(VIT)
    found, operations = block_times(Clock(find_runtime("torch"), 1), model), Operations.of(model)
    tokens = tokens_of(model)
    assert found.whole == cost.macs(model, example_inputs(model))
    for had, has in ((tokens, tokens), (tokens, tokens - 3), (9, 7), (9, 1)):
        # matching is counted where it was timed, at a few numbers of pairs
        assert float(found.prices[had, has]) == pytest.approx(operations.block(had, has), rel=0.03)
    merged = view_of(model)
    merge_tokens(merged, (13, 1))
    taken = found.rest + float(found.prices[tokens, 13] + found.prices[13, 1])
    assert taken == pytest.approx(cost.macs(merged, example_inputs(model)), rel=0.03)


@pytest.mark.parametrize("storage", ["factors", "gauge"])
def test_ranks_between_those_that_were_timed_are_interpolated(storage: Any) -> None:
    times = layer_times(Clock(find_runtime("torch"), 2), [(64, 32)], storage, 16)
    assert times.of((64, 32), None, 16) == 2 * 16 * 64 * 32
    assert times.of((64, 32), None, 10) == 2 * 10 * 64 * 32
    for rank in (1, 7, 15):
        operations = rank * (64 + 32 - (rank if storage == "gauge" else 0))
        assert times.of((64, 32), rank, 16) == pytest.approx(2 * 16 * operations, rel=0.12, abs=2 * 16 * 96)
    assert times.matrix((64, 32), [7, 15], 16).shape == (3, 17)


def test_times_are_kept_by_what_they_follow_from(tmp_path: Path) -> None:
    calls = []

    def stopwatch(models: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, int]:
        calls.append(list(models))
        return counted(models, inputs)

    cache = Cache(tmp_path, torch.device("cpu"), pytest.fail)

    def times(runtime: str = "torch", batch_size: int = 1, shape: tuple[int, int] = (4, 8)) -> dict[str, int]:
        program = Product.of_shape(shape, None, pivots=False, stored=True)
        made = Clock(find_runtime(runtime), batch_size, 1, cache, stopwatch=stopwatch)
        runs = {"dense": Run(program, random_tokens(batch_size, 3, shape[1]))}
        return made.times({"layer": list(shape)}, ["dense"], lambda: runs)

    assert times() == times() == {"dense": 96}
    assert len(calls) == 1
    assert times(batch_size=2) == {"dense": 192}
    assert times(shape=(8, 8)) == {"dense": 192}
    assert len(calls) == 3


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_layer_is_run_as_it_is_exported(name: str, rank: int | None) -> None:
    pytest.importorskip(name, exc_type=ImportError)
    program = Product.of_shape((6, 10), rank, pivots=True, stored=False)
    x = random_tokens(3, 5, 10)["x"]
    with torch.no_grad():
        torch.testing.assert_close(find_runtime(name).compile(program)(x=x)["y"], program.model(x))


@pytest.mark.parametrize(
    ("entries", "levers"),
    [
        ({"tokens": "merge"}, ("merged tokens",)),
        ({"forms": "rank", "refine": 0}, ("ranks",)),
        ({"refine": 0}, None),
        ({"forms": "narrow"}, ("narrower layers",)),
        ({"forms": "rank+narrow"}, None),
    ],
)
def test_the_time_that_is_asked_for_is_met(
    entries: dict[str, Any],
    levers: tuple[str, ...] | None,
    vit_directory: Path,
    flat_images: Path,
    tmp_path: Path,
) -> None:
    (found,) = compress(job(tmp_path, vit_directory, flat_images, target_latency="0.7", **entries))
    timed = found.report.target_latency
    assert timed is not None
    assert timed.compressed / timed.dense == pytest.approx(0.7, rel=0.051)
    assert levers is None or timed.levers == levers
    assert not [each for each in found.report.warnings if "target-latency" in each]
    model = vitshrink.load(str(found.directory))
    assert cost.macs(model, example_inputs(model)) == 1e9 * timed.compressed
    assert found.report.macs is not None
    assert found.report.macs.kept == pytest.approx(timed.compressed / timed.dense)


def test_narrower_layers_are_priced_by_those_that_were_timed(
    bert_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    (found,) = compress(job(tmp_path, bert_directory, text_file, target_latency="0.8", forms="narrow"))
    timed = found.report.target_latency
    assert timed is not None
    assert timed.levers == ("narrower layers",)
    assert timed.compressed / timed.dense <= 1.05 * 0.8


@pytest.mark.parametrize("name", [BERT, pytest.param("ModernBertForSequenceClassification", marks=pytest.mark.slow)])
def test_texts_keep_their_tokens(name: str, text_file: Path, tmp_path: Path) -> None:
    model = (kinds if name != BERT else tiny).write(name, tmp_path / "model")
    (found,) = compress(job(tmp_path, model, text_file, target_latency="0.8", refine=0))
    timed = found.report.target_latency
    assert timed is not None
    assert timed.levers == ("ranks",)
    assert timed.compressed / timed.dense == pytest.approx(0.8, rel=0.051)


def test_images_without_a_grid_of_patches_are_refused(flat_images: Path, tmp_path: Path) -> None:
    model = kinds.write("SwinForImageClassification", tmp_path / "model")
    with pytest.raises(UsageError, match="--target-latency needs the positions of the patches"):
        compress(job(tmp_path, model, flat_images, target_latency="0.8"))


def test_what_the_clock_says_of_the_model_corrects_the_plan(
    monkeypatch: pytest.MonkeyPatch, vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    def slower_whole(models: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, int]:
        """Merged models take a tenth more than their parts."""
        found = counted(models, inputs)
        merges = {name for name, each in models.items() if _merges(each) and "compressed" in models}
        return {name: round(1.1 * each) if name in merges else each for name, each in found.items()}

    monkeypatch.setattr(clock, "shortest", slower_whole)
    (found,) = compress(job(tmp_path, vit_directory, flat_images, target_latency="0.7", tokens="merge"))
    assert found.report.macs is not None
    assert 1.1 * found.report.macs.kept == pytest.approx(0.7, rel=0.051)


def test_a_time_that_is_missed_is_told(
    monkeypatch: pytest.MonkeyPatch, vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    def stubborn(models: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, int]:
        return dict.fromkeys(models, 1000) if "compressed" in models else counted(models, inputs)

    monkeypatch.setattr(clock, "shortest", stubborn)
    (found,) = compress(job(tmp_path, vit_directory, flat_images, target_latency="0.7", tokens="merge"))
    assert any("1.000 of the dense model's time" in each for each in found.report.warnings)


def thrice_as_fast(models: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, int]:
    """A third of a nanosecond an operation where layers are integers."""
    return {name: max(1, each // (1 + 2 * _rounded(models[name]))) for name, each in counted(models, inputs).items()}


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a runtime that is faster with integers."""
    monkeypatch.setattr(clock, "shortest", thrice_as_fast)
    monkeypatch.setitem(RUNTIMES, "quick", Runtime("quick", lambda program: program.model, "torch", integers=True))
    return "quick"


@pytest.mark.parametrize(
    ("budget", "entries", "levers"),
    [
        ("0.8", {}, ("integers",)),
        ("0.25", {"tokens": "merge"}, ("integers", "merged tokens")),
        ("0.27", {"forms": "rank", "refine": 0}, ("integers", "ranks")),
        ("0.24", {"quantize": "int8", "refine": 0}, None),
        ("0.27", {"forms": "narrow"}, ("integers", "narrower layers")),
        ("0.7", {"quantize": "none", "tokens": "merge"}, ("merged tokens",)),
    ],
)
def test_integers_are_a_lever_where_the_runtime_is_faster_with_them(
    integers: str,
    budget: str,
    entries: dict[str, Any],
    levers: tuple[str, ...] | None,
    vit_directory: Path,
    flat_images: Path,
    tmp_path: Path,
) -> None:
    asked = job(tmp_path, vit_directory, flat_images, target_latency=budget, runtime=integers, **entries)
    (found,) = compress(asked)
    timed = found.report.target_latency
    assert timed is not None
    assert timed.compressed / timed.dense <= 1.05 * float(budget)
    assert not [each for each in found.report.warnings if "target-latency" in each]
    assert levers is None or timed.levers == levers
    assert ("integers" in timed.levers) is _rounded(vitshrink.load(str(found.directory)))
    assert found.report.quantization == (QuantizationRecord("int8", "static") if "integers" in timed.levers else None)


def test_texts_become_integers_with_fewer_ranks(
    integers: str, bert_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    (found,) = compress(job(tmp_path, bert_directory, text_file, target_latency="0.28", refine=0, runtime=integers))
    timed = found.report.target_latency
    assert timed is not None
    assert timed.levers == ("integers", "ranks")
    assert timed.compressed / timed.dense == pytest.approx(0.28, rel=0.051)


def test_integers_that_are_no_faster_are_left_out(
    monkeypatch: pytest.MonkeyPatch, integers: str, vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(clock, "shortest", counted)
    asked = job(tmp_path, vit_directory, flat_images, target_latency="0.7", runtime=integers, tokens="merge")
    (found,) = compress(asked)
    assert found.report.target_latency is not None
    assert found.report.target_latency.levers == ("merged tokens",)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_integers_are_timed_as_they_are_exported(name: str) -> None:
    pytest.importorskip(name, exc_type=ImportError)
    program = Product.of_shape((6, 10), 3, pivots=True, stored=False, rounded=to_the_nearest)
    x = random_tokens(3, 5, 10)["x"]
    with torch.no_grad():
        found = find_runtime(name).compile(program)(x=x)["y"]
        torch.testing.assert_close(found, program.model(x), rtol=1e-3, atol=1e-4)


def _rounded(model: nn.Module) -> bool:
    return any(isinstance(each, StaticProduct) for each in model.modules())


def _merges(model: nn.Module) -> bool:
    return any(isinstance(structure_of(each), MergedTokens) for each in model.modules())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"target_latency": "fast"}, "cannot read 'fast'"),
        ({"target_latency": "1.2"}, "below 1"),
        ({"target_latency": "0.05"}, r"cannot be reached in torch .*dense model takes .* Use 0\.\d+ or more"),
        ({"target_latency": "9s"}, r"the dense model already takes only .*ms .*Ask for a shorter time"),
        ({"target_latency": "0.7", "keep": (0.5,)}, "exactly one of"),
        ({"target_latency": "0.7", "landmarks": 4}, "remove --landmarks"),
        ({"target_latency": "0.7", "tokens": "merge", "token_operations": 0.7}, "remove --tokens merge"),
        (
            {"target_latency": "0.7", "quantize": "int8"},
            "torch is not faster with static int8.* onnxruntime or openvino",
        ),
        ({"target_latency": "0.7", "quantize": "int4"}, "--quantize int4: .* static int8"),
        ({"target_latency": "0.7", "quantize": "int8", "finetune": {}}, "pass --quantize none"),
        ({"target_latency": "0.7", "forms": "bits"}, "--forms bits"),
        ({"keep": (0.5,), "quantize": "none"}, "without --target-latency"),
        ({"target_latency": "0.7", "runtime": "tvm"}, "Available: .*onnxruntime"),
        ({"target_latency": "0.7", "method": "qk-joint"}, "cannot be used with --method qk-joint"),
        ({"keep": (0.5,), "latency_batch_size": 8}, "without --target-latency"),
    ],
)
def test_bad_use_is_named(
    vit_directory: Path, flat_images: Path, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compress(job(tmp_path, vit_directory, flat_images, **entries))
    assert not (tmp_path / "out").exists()


def test_text_is_not_merged(bert_directory: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--tokens merge .* reads text"):
        compress(job(tmp_path, bert_directory, text_file, target_latency="0.7", tokens="merge"))


def test_a_model_in_memory_takes_a_budget_of_time(flat_images: Path, vit_directory: Path) -> None:
    model = vitshrink.load(str(vit_directory))
    small = vitshrink.compress(
        model,
        flat_images,
        target_latency="0.7",
        tokens="merge",
        samples=16,
        holdout=8,
        processor=_processor(vit_directory),
    )
    assert small.report.target_latency is not None
    assert _merges(small.model)


def _processor(directory: Path) -> Any:
    import transformers

    return transformers.AutoImageProcessor.from_pretrained(directory)
