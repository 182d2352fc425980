"""Jobs that store matrices as entropy-coded integers: the size is met, and what was verified is what loads."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

import vitshrink
from vitshrink.cli.app import app
from vitshrink.config.options import CompressConfig
from vitshrink.config.quantize import QuantizeJob
from vitshrink.errors import CheckpointError, TargetError, UsageError, VitshrinkError
from vitshrink.jobs.compress import CompressionResult, compress
from vitshrink.jobs.export import export
from vitshrink.jobs.quantize import quantize_checkpoint
from vitshrink.jobs.verify import verify_directory
from vitshrink.models.resolution import set_resolution
from vitshrink.models.structures.coded import Coded, decode_all, hold
from vitshrink.models.views import view_of
from vitshrink.report.summary import facts, headline
from vitshrink.report.wording import percent
from vitshrink.runtime.observer import Silent

Compressed = Callable[..., CompressionResult]
VIT, BERT, MASKED = "ViTForImageClassification", "BertForSequenceClassification", "BertForMaskedLM"
SIZE = 30_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)


@pytest.fixture
def coded(compressed: Compressed) -> Callable[[str], Path]:
    """The directory of a tiny model in 30 kB."""

    def directory(name: str) -> Path:
        found = compressed(name, target_size=str(SIZE)).directory
        assert found is not None
        return found

    return directory


def outputs(model: PreTrainedModel, name: str) -> Tensor:
    inputs = {
        key: each.to(model.dtype) if each.is_floating_point() else each for key, each in tiny.inputs(name).items()
    }
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs)[0]
    return found


def kinds(model: nn.Module) -> list[Coded]:
    return [module for module in model.modules() if isinstance(module, Coded)]


@pytest.mark.parametrize("name", [VIT, "DeiTForImageClassificationWithTeacher", BERT, MASKED, "ViTModel", "BertModel"])
def test_a_size_is_met_to_the_byte_and_used(coded: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    directory = coded(name)
    assert 0.97 * SIZE <= (directory / "model.safetensors").stat().st_size <= SIZE
    assert not [check for check in verify_directory(directory) if check.problem]
    stock = getattr(transformers, name).from_pretrained(directory)
    expected = outputs(vitshrink.load(directory), name)
    assert len(kinds(stock)) >= 12
    assert torch.equal(outputs(stock, name), expected)
    for again in ("once", "twice"):
        stock.save_pretrained(tmp_path / again)
        stock = getattr(transformers, name).from_pretrained(tmp_path / again)
        assert torch.equal(outputs(stock, name), expected)


def test_more_bytes_lose_less(compressed: Compressed, vit_directory: Path) -> None:
    dense = outputs(vitshrink.load(vit_directory), VIT)
    found = [compressed(VIT, target_size=str(size)).directory for size in (22_000, SIZE, 40_000)]
    losses = [float((outputs(vitshrink.load(str(each)), VIT).float() - dense).norm()) for each in found]
    assert losses[2] < losses[1] < losses[0]


def test_tied_words_stay_tied(coded: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(coded(MASKED))
    words = model.get_input_embeddings()
    assert isinstance(words, nn.Embedding)
    assert model.get_output_embeddings().weight is words.weight


def test_the_base_opens_without_the_head(tmp_path: Path) -> None:
    """A head of its own is listed apart, and another task leaves it out."""
    source = tiny.write(MASKED, tmp_path / "m", hidden_size=64)
    text = tiny.write_text(tmp_path / "t.txt", 24)
    config = CompressConfig(
        str(source), str(tmp_path / "out"), calibration=str(text), samples=12, holdout=8, bits=4.0, latency=(1,)
    )
    compress(config)
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(listed["head"]) == ["cls.predictions.transform.dense"]
    for kind in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        model = kind.from_pretrained(tmp_path / "out")
        assert kinds(model)
        model.save_pretrained(tmp_path / kind.__name__)
        kind.from_pretrained(tmp_path / kind.__name__)


def test_a_pooler_that_nobody_reads_is_rounded_finely(tmp_path: Path) -> None:
    """Whatever the size: the loss sees no errors of it."""
    source = tiny.write("BertModel", tmp_path / "m", hidden_size=64)
    text = tiny.write_text(tmp_path / "t.txt", 24)
    (result,) = compress(
        CompressConfig(str(source), str(tmp_path / "out"), calibration=str(text), samples=12, holdout=8, bits=3.0)
    )
    assert [warning for warning in result.report.warnings if "pooler.dense: the measured outputs" in warning]
    dense, small = (vitshrink.load(each).pooler.dense for each in (source, tmp_path / "out"))
    assert isinstance(small, Coded)
    assert (small.matrix().float() - dense.weight).norm() < 0.03 * dense.weight.norm()
    assert 8 * small.spec.bytes < 7 * dense.weight.numel()


@pytest.mark.slow
def test_without_vitshrink_loading_fails(coded: Callable[[str], Path]) -> None:
    program = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1])\n"
        "except RuntimeError as error: print('mismatch' in str(error))\n"
        "else: print('loaded')"
    )
    command = [sys.executable, "-c", program, str(coded(VIT))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert run.stdout.strip() == "True"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rest_may_have_another_type(compressed: Compressed, dtype: str) -> None:
    directory = compressed(VIT, target_size=str(SIZE), dtype=dtype).directory
    assert directory is not None
    assert 0.97 * SIZE <= (directory / "model.safetensors").stat().st_size <= SIZE
    found = {str(tensor.dtype) for tensor in load_file(directory / "model.safetensors").values()}
    assert found == {f"torch.{dtype}", "torch.uint8"}


@pytest.mark.parametrize("name", [VIT, MASKED])
def test_a_model_runs_in_the_type_of_its_source_and_is_stored_in_half(
    coded: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    directory, again = coded(name), tmp_path / "again"
    stored = (directory / "model.safetensors").read_bytes()
    assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {
        torch.float16,
        torch.uint8,
    }
    model = getattr(transformers, name).from_pretrained(directory)
    assert model.dtype is vitshrink.load(directory).dtype is torch.float32
    for narrow in (torch.float32, torch.float16):
        model.to(narrow).save_pretrained(again)
        assert (again / "model.safetensors").read_bytes() == stored
    trained = getattr(transformers, name).from_pretrained(directory)
    next(each for each in trained.parameters() if each.requires_grad).data.add_(1e-6)
    trained.save_pretrained(again)
    reread = getattr(transformers, name).from_pretrained(again)
    assert all(map(torch.equal, trained.parameters(), reread.parameters()))


def test_a_model_in_memory_keeps_its_type_and_is_stored_in_half(tmp_path: Path) -> None:
    dense = getattr(transformers, VIT).from_pretrained(tiny.write(VIT, tmp_path / "m"))
    images = str(tiny.write_images(tmp_path / "images", 12))
    small = vitshrink.compress(dense, images, target_size=str(SIZE), samples=8, holdout=4)
    assert {parameter.dtype for parameter in small.model.parameters()} == {torch.float32}
    small.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= SIZE
    assert getattr(transformers, VIT).from_pretrained(tmp_path / "out").dtype is torch.float32


@pytest.mark.parametrize("name", [VIT, BERT])
def test_a_matrix_is_held_as_it_is_wanted(coded: Callable[[str], Path], name: str) -> None:
    model = vitshrink.load(coded(name)).float()
    expected = outputs(model, name)
    assert torch.equal(outputs(hold(model, "stream"), name), expected)  # type: ignore[arg-type]
    assert all(module._codes is None and module._matrix is None for module in kinds(model))
    found = outputs(hold(model, "integers"), name)  # type: ignore[arg-type]
    assert (found - expected).norm() < 0.05 * expected.norm()
    for module in kinds(model):
        assert module._matrix is None
        assert module._codes is None or module._codes.integers.nbytes <= 2 * module._codes.integers.numel()
    assert torch.equal(outputs(hold(model, "float"), name), expected)  # type: ignore[arg-type]
    halves = outputs(model.half(), name)
    assert (halves.float() - expected).norm() < 0.02 * expected.norm()
    assert torch.isfinite(outputs(hold(model, "integers"), name)).all()  # type: ignore[arg-type]


def test_steps_of_rows_are_trained(coded: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(coded(VIT)).float().eval()
    before = outputs(model, VIT)
    layer = model.get_submodule("vit.layers.1.mlp.fc2")
    model(**tiny.inputs(VIT))[0].square().sum().backward()
    assert layer.weight.grad.abs().max() > 0
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert not torch.equal(outputs(model, VIT), before), "what was decoded before is not kept"


@pytest.mark.parametrize("form", ["dense", pytest.param("torch"), pytest.param("onnx", marks=pytest.mark.slow)])
def test_exports_are_dense(coded: Callable[[str], Path], form: str, tmp_path: Path) -> None:
    found = export(str(coded(MASKED)), str(tmp_path / "out"), form)
    assert found.difference < 1e-4
    if form == "dense":
        plain = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
        assert not kinds(plain)
        assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_a_report_names_the_bits(coded: Callable[[str], Path]) -> None:
    directory = coded(VIT)
    report = json.loads((directory / "report.json").read_text())
    layers = {entry["name"]: entry for entry in report["layers"]}
    assert {entry["form"] for entry in layers.values() if entry["rank"] is None} == {"coded"}
    entry = layers["vit.layers.0.mlp.fc1"]
    module = vitshrink.load(directory).get_submodule("vit.layers.0.mlp.fc1")
    assert isinstance(module, Coded)
    taken = 8 * (module.codes.numel() + 2 * module.weight.numel()) / entry["parameters"]
    assert entry["bits"] == pytest.approx(taken, abs=0.01)
    for page in ("report.md", "report.html"):
        assert re.search(rf"{entry['bits']:.1f}\s*bits", (directory / page).read_text(encoding="utf-8"))


def test_several_sizes_come_from_one_calibration(vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    data = {"calibration": str(flat_images), "samples": 12, "holdout": 8}
    found = compress(CompressConfig(str(vit_directory), str(tmp_path / "out"), keep=(0.5, 0.8), forms="bits", **data))
    sizes = [(tmp_path / "out" / f"keep-{keep}" / "model.safetensors").stat().st_size for keep in (0.5, 0.8)]
    assert len(found) == 2
    assert sizes[0] < 0.7 * sizes[1]
    assert found[0].report.bytes.compressed < found[1].report.bytes.compressed


class Interrupting(Silent):
    """Ends the job in the second step of a stage, as Ctrl-C does."""

    def __init__(self, title: str) -> None:
        self.title, self.steps = title, defaultdict[str, list[int]](list)

    @contextmanager
    def stage(self, title: str, _total: int | None = None) -> Iterator[Callable[[int], None]]:
        def advance(steps: int) -> None:
            self.steps[title].append(steps)
            if title == self.title and sum(self.steps[title]) > steps:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize(("title", "done"), [("Calibrating", [4]), ("Factorizing", [])])
def test_an_interrupted_job_goes_on_where_it_was(
    vit_directory: Path, flat_images: Path, tmp_path: Path, title: str, done: list[int]
) -> None:
    data: dict[str, Any] = {"calibration": str(flat_images), "samples": 16, "holdout": 8, "batch_size": 4}
    for output in ("whole", "out"):
        config = CompressConfig(str(vit_directory), str(tmp_path / output), target_size=str(SIZE), save_every=0, **data)
        if output == "out":
            with pytest.raises(KeyboardInterrupt):
                compress(config, Interrupting(title))
        again = Interrupting("")
        compress(config, again)
    assert again.steps["Calibrating"][:1] == done, "told at once, or nothing where nothing is left to do"
    files = [(tmp_path / output / "model.safetensors").read_bytes() for output in ("whole", "out")]
    assert files[0] == files[1]


def test_an_average_of_bits_may_be_asked_for(vit_directory: Path, flat_images: Path, tmp_path: Path) -> None:
    data = {"calibration": str(flat_images), "samples": 12, "holdout": 8}
    (result,) = compress(CompressConfig(str(vit_directory), str(tmp_path / "out"), bits=5.5, **data))
    numbers = sum(entry.parameters for entry in result.report.layers)
    bits = sum((entry.bits or 0) * entry.parameters for entry in result.report.layers) / numbers
    assert bits == pytest.approx(5.5, rel=0.03)


@pytest.mark.parametrize(
    ("name", "bound"),
    [(VIT, {"max_kl": 0.003}), (BERT, {"max_changed": 25.0}), ("BertModel", {"max_error": 0.01})],
)
def test_a_bound_finds_its_size(
    checkpoint: Callable[[str], Path], flat_images: Path, text_file: Path, tmp_path: Path, name: str, bound: Any
) -> None:
    data = str(text_file if name in tiny.TEXT_MODELS else flat_images)
    config = CompressConfig(
        str(checkpoint(name)), str(tmp_path / "out"), calibration=data, samples=16, holdout=8, **bound
    )
    (result,) = compress(config)
    assert result.report.bytes.compressed < 0.5 * result.report.bytes.dense
    assert not [check for check in verify_directory(tmp_path / "out") if check.problem]


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"forms": "bits", "calibration": None, "target_size": "30kB"}, UsageError, "pass --calibration"),
        ({"forms": "bits", "rank": 8}, UsageError, "--rank counts ranks"),
        ({"forms": "bits", "target_size": "30kB", "refine": 1}, UsageError, "remove --refine"),
        ({"forms": "rank", "bits": 4.0}, UsageError, "--bits needs integers"),
        ({"target_size": "3kB"}, TargetError, r"smallest possible size is --target-size 0\.\d+MB"),
        ({"target_size": "300kB"}, TargetError, "has only"),
        ({"target_size": "30kB", "exclude": ("nowhere",)}, UsageError, "'nowhere' matches none"),
    ],
)
def test_what_makes_no_sense_is_explained(
    vit_directory: Path, flat_images: Path, tmp_path: Path, entries: Any, error: type[VitshrinkError], message: str
) -> None:
    entries = {"calibration": str(flat_images), "samples": 12, "holdout": 8} | entries
    with pytest.raises(error, match=message):
        compress(CompressConfig(str(vit_directory), str(tmp_path / "out"), **entries))
    assert not (tmp_path / "out").exists()


def test_what_is_rounded_once_is_not_rounded_again(coded: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already quantized"):
        quantize_checkpoint(QuantizeJob(str(coded(VIT)), str(tmp_path / "out")))
    with pytest.raises(CheckpointError, match="already compressed"):
        compress(CompressConfig(str(coded(VIT)), str(tmp_path / "out"), keep=(0.5,), method="svd"))


def test_a_loaded_model_is_decoded_whatever_is_done_with_it(
    coded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All matrices at once, which takes a fraction of the time; the first pass has nothing left to decode."""
    model = transformers.AutoModelForImageClassification.from_pretrained(coded(VIT))
    expected = outputs(transformers.AutoModelForImageClassification.from_pretrained(coded(VIT)).double(), VIT)
    monkeypatch.setattr("vitshrink.models.structures.coded.decode", lambda *_: pytest.fail("decoded one by one"))
    assert torch.equal(outputs(model.double(), VIT), expected)


def test_damage_is_found(coded: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "damaged"
    transformers.AutoModelForImageClassification.from_pretrained(coded(VIT)).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    name = next(key for key in tensors if key.endswith("codes") and "intermediate" in key)
    tensors[name][0] = 77
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"vit\.layers\.0\.mlp\.fc1: .* damaged"):
        outputs(vitshrink.load(directory), VIT)


def test_a_report_of_integers_says_what_became_smaller(compressed: Callable[..., CompressionResult]) -> None:
    report = compressed(VIT, bits=4.0, keep=()).report
    assert report.bytes is not None
    assert report.coded_bits == pytest.approx(4, rel=0.1)
    assert headline(report).startswith(f"{percent(report.bytes.kept)} of the bytes ({report.coded_bits:.2g} bits)")
    assert facts(report)[0].answer == f"{percent(1 - report.bytes.kept)} smaller"


@pytest.mark.parametrize("command", ["compress", "quantize"])
def test_a_bound_in_points_of_accuracy_is_kept(
    vit_directory: Path, learned_images: Path, tmp_path: Path, command: str
) -> None:
    data = ["--calibration", str(learned_images), "--samples", "12", "--holdout", "24", "--latency", "1"]
    data = data if command == "compress" else data[:-2]
    sizes = []
    for points in ("5", "30"):
        output = tmp_path / points
        result = CliRunner().invoke(
            app, [command, str(vit_directory), str(output), "--max-accuracy-drop", points, *data]
        )
        assert result.exit_code == 0, result.output
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        assert 100 * report["evaluation"]["difference"]["drop"] <= float(points)
        assert report["evaluation"]["dense"]["correct"] > 12
        assert "coded" in (output / "config.json").read_text(encoding="utf-8")
        sizes.append(report["bytes"]["compressed"])
    assert sizes[1] < sizes[0]


def test_points_of_accuracy_need_labels(
    vit_directory: Path, checkpoint: Callable[[str], Path], flat_images: Path, text_file: Path, tmp_path: Path
) -> None:
    for model, data, said in (
        (vit_directory, flat_images, "needs labels, and .* has none"),
        (checkpoint("BertModel"), text_file, "cannot be used with this model"),
    ):
        words = [str(model), str(tmp_path / "out"), "--max-accuracy-drop", "5", "--samples", "12", "--holdout", "8"]
        result = CliRunner().invoke(app, ["compress", *words, "--calibration", str(data)])
        assert result.exit_code != 0
        assert re.search(said, " ".join(result.output.split())), result.output
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [VIT, "DeiTForImageClassificationWithTeacher"])
def test_positions_are_coded_and_everything_still_reads_them(name: str, tmp_path: Path) -> None:
    source = tiny.write(name, tmp_path / "m", hidden_size=64, intermediate_size=64, image_size=48, patch_size=6)
    images = tiny.write_images(tmp_path / "images", 20)
    config = CompressConfig(
        str(source), str(tmp_path / "out"), calibration=str(images), samples=12, holdout=8, bits=6.0, latency=(1,)
    )
    compress(config)
    shape = load_file(tmp_path / "out" / "model.safetensors")
    (key,) = (each for each in shape if each.endswith("position_embeddings"))
    assert shape[key].dim() == 1
    dense = vitshrink.load(source)
    small = getattr(transformers, name).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = dense.base_model.embeddings.position_embeddings
    found = decode_all(view_of(small)).base_model.embeddings
    assert type(found) is type(dense.base_model.embeddings)
    assert 0 < (found.position_embeddings - wanted).norm() < 0.2 * wanted.norm()
    generator = torch.Generator().manual_seed(0)
    for side in (48, 60):
        pixels = torch.randn(2, 3, side, side, generator=generator)
        with torch.no_grad():
            one, other = (each(pixels, interpolate_pos_encoding=True) for each in (small.base_model.embeddings, found))
        assert torch.equal(one, other)
    small.train()(pixel_values=pixels[..., :48, :48])[0].square().sum().backward()
    assert small.base_model.embeddings.position_embeddings.grad.abs().sum() > 0
    resized = vitshrink.load(tmp_path / "out")
    set_resolution(resized, 60)
    assert resized(pixel_values=pixels)[0].isfinite().all()
