"""The benchmarks print their tables; figures are for those who run them."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from vitshrink.compression.rounding import Metric
from vitshrink.config.options import DataConfig
from vitshrink.data import Preprocessor
from vitshrink.data.opening import open_data
from vitshrink.models.loading import load_dense
from vitshrink.models.structures.tokens import MixedTokens
from vitshrink.models.targets import find_outside, find_targets
from vitshrink.statistics.sensitivity import collect_sensitivity

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

Benchmark = Callable[[str], ModuleType]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Benchmark]:
    """A script of the folder, which is run from there and not installed."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if FOLDER in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


def rows(output: str) -> list[list[str]]:
    """The cells of all table rows, heads included, without the rulers."""
    lines = [line for line in output.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    "script",
    [
        "bytes",
        "latency",
        "rounding",
        "low_rank",
        "evaluation",
        "fidelity",
        "speed",
        "stages",
        "left",
        "agreement",
        "quantization",
        "export",
        "techniques",
        "recovery",
        "quadtree",
        "merging",
        "narrow",
        "same_bytes",
        "checkpoints",
        "probes",
        "static_integers",
    ],
)
def test_help_says_how_to_run_it(script: str, benchmark: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark(script).main(["--help"])
    assert stop.value.code == 0
    assert f"python benchmarks/{script}.py" in capsys.readouterr().out


@pytest.mark.slow
def test_every_entry_gives_a_row_of_finite_figures(
    benchmark: Benchmark,
    vit_directory: Path,
    flat_images: Path,
    learned_images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark("baselines"), "RANK_GRID", 2)
    fidelity = benchmark("fidelity")
    fidelity.main(
        f"--model {vit_directory} --calibration {flat_images} --eval {learned_images} --samples 8 "
        "--fractions 0.8 0.6 --methods all --offline --device cpu".split()
    )
    head, *body = rows(capsys.readouterr().out)
    assert head[:7] == ["method", "fraction", "keep", "came out", "top1", "agreement", "kl"]
    assert [row[0] for row in body] == [name for name in fidelity.ENTRIES for _ in range(2)]
    for row in body:
        figures = [float(cell) for cell in row[1:]]
        assert figures[2] <= figures[0], f"{row[0]} is larger than asked for"
        assert figures[2] > figures[0] - 0.2
        assert figures[5] >= 0


def test_the_scaled_curves_plan_within_the_budget(
    benchmark: Benchmark, vit_directory: Path, flat_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("fidelity").main(
        f"--model {vit_directory} --calibration {flat_images} --eval {flat_images} --samples 8 "
        "--fractions 0.6 --methods kfac-lems kfac-lems-gauge --offline --device cpu".split()
    )
    head, *body = rows(capsys.readouterr().out)
    assert [row[0] for row in body] == ["kfac-lems", "kfac-lems-gauge"]
    for row in body:
        assert 0.4 < float(row[head.index("came out")]) <= 0.6
        assert float(row[head.index("kl")]) > 0


@pytest.mark.slow
def test_seeds_give_a_mean_and_a_deviation(
    benchmark: Benchmark, vit_directory: Path, flat_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("fidelity").main(
        f"--model {vit_directory} --calibration {flat_images} --eval {flat_images} --samples 8 "
        "--fractions 0.4 --methods svd curvature-refine-0 --seeds 0 1 2 --offline".split()
    )
    head, svd, curvature = rows(capsys.readouterr().out)
    for row, varies in ((svd, False), (curvature, True)):
        mean, _, deviation = row[head.index("kl")].partition(" ± ")
        assert float(mean) > 0
        assert (float(deviation) > 0) is varies, "only a method that calibrates depends on the seed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel"])
def test_texts_are_measured_too(
    name: str,
    benchmark: Benchmark,
    checkpoint: Callable[[str], Path],
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    benchmark("fidelity").main(
        f"--model {checkpoint(name)} --calibration {text_file} --eval {text_file} --samples 8 "
        "--fractions 0.6 --methods svd fwsvd curvature --offline".split()
    )
    head, *body = rows(capsys.readouterr().out)
    assert len(body) == 3
    figure = head.index("kl" if name == "BertForMaskedLM" else "pooled cosine")
    assert all(0 <= float(row[figure]) < 10 for row in body)


@pytest.mark.slow
def test_a_size_that_a_method_cannot_reach_is_a_dash(
    benchmark: Benchmark, vit_directory: Path, flat_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("fidelity").main(
        f"--model {vit_directory} --calibration {flat_images} --eval {flat_images} --samples 8 "
        "--fractions 0.001 0.9 --methods svd --offline".split()
    )
    printed = capsys.readouterr()
    _, impossible, possible = rows(printed.out)
    assert "–" in impossible
    assert "–" not in possible
    assert "0.001" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("part", ["models", "layers"])
def test_speed_sets_time_against_operations(
    part: str, benchmark: Benchmark, vit_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("speed").main(
        f"--model {vit_directory} --fractions 0.5 --densities 0.5 --batches 1 2 --repeats 2 --warmup 1 --tokens 5 "
        f"--device cpu {'--layers' if part == 'layers' else ''}".split()
    )
    head, *body = rows(capsys.readouterr().out)
    assert len(body) == (2 * 4 if part == "models" else 3 * 2 * 4)
    time, operations, quotient = (head.index(name) for name in ("time", "operations", "quotient"))
    for row in body:
        assert float(row[quotient]) == pytest.approx(float(row[time]) / float(row[operations]), rel=0.05, abs=0.02)
        assert float(row[operations]) <= 1


@pytest.mark.slow
def test_stages_of_jobs_stand_beside_their_bare_passes(
    benchmark: Benchmark, vit_directory: Path, flat_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("stages").main(
        [
            *f"--model {vit_directory} --calibration {flat_images} --samples 8 --device cpu --threads 1".split(),
            *("--jobs", "keep=0.9 refine=0", "bits=4"),
        ]
    )
    found = rows(capsys.readouterr().out)
    stages = {tuple(row[:2]) for row in found}
    assert {("passes", "forward and backward"), ("keep=0.9 refine=0", "Calibrating")} <= stages
    assert {(job, "**the whole job**") for job in ("keep=0.9 refine=0", "bits=4")} <= stages
    memory = {row[0]: float(row[1]) for row in found if len(row) == 4 and row[0] != "job"}
    assert set(memory) == {"passes", "keep=0.9 refine=0", "bits=4"}
    assert all(0.1 < gigabytes < 5 for gigabytes in memory.values())


@pytest.mark.slow
def test_what_a_gpu_has_to_show_runs_without_one() -> None:
    surroundings = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    script = ["bash", str(FOLDER / "gpu.sh")]
    ran = subprocess.run(script, env=surroundings, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "No GPU is there" in ran.stdout
    found = rows(ran.stdout)
    assert {"keep=0.7", "keep=0.7 fast=true", "bits=3"} <= {row[0] for row in found if row[1] == "**the whole job**"}
    for form in ("gauge", "dense, int8 weights, ours", "dense, int8 dynamic, ours", "factors, int8 dynamic, ours"):
        assert {row[3] for row in found if row[0] == form} == {"eager", "compiled"}
    jobs = ("keep=0.7", "keep=0.5", "bits=3")
    agreed = [row[1] for row in found if row[0] in jobs and re.fullmatch(r"[01]\.\d{3}", row[1])]
    assert agreed == ["1.000"] * 3, "a device agrees with itself"
    wrong = subprocess.run([*script, "model"], env=surroundings, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "usage" in wrong.stderr


@pytest.mark.slow
def test_every_combination_with_integers_is_a_row(
    benchmark: Benchmark,
    vit_directory: Path,
    flat_images: Path,
    learned_images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    benchmark("quantization").main(
        f"--model {vit_directory} --calibration {flat_images} --eval {learned_images} --samples 8 --keep 0.8 "
        "--repeats 1".split()
    )
    head, *body = rows(capsys.readouterr().out)
    megabytes = {row[0]: float(row[head.index("MB")]) for row in body if "torchao" not in row[0]}
    assert (
        megabytes["keep 0.8, int8 dynamic"] <= megabytes["keep 0.8, fp16"] < megabytes["keep 0.8"] < megabytes["fp32"]
    )
    assert all(-1e-6 <= float(row[head.index("KL")]) < 5 for row in body)
    assert float(body[0][head.index("KL")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_bytes_and_divergence_stand_side_by_side(
    name: str,
    benchmark: Benchmark,
    checkpoint: Callable[[str], Path],
    flat_images: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table, data = benchmark("bytes"), flat_images if name.startswith("ViT") else text_file
    model, results, picture = checkpoint(name), tmp_path / "results.json", tmp_path / "picture.svg"
    given = f"--model {model} --calibration {data} --eval {data} --samples 8 --offline --results {results}".split()
    table.main([*given, "--sizes", "1kB", "--rows", "floats", "nearest", "GPTQ, groups of 32*", "low rank: *"])
    printed = capsys.readouterr().out
    head, *body = rows(printed)
    assert "\nlow rank: 1kB: skipped, " in printed
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    nbytes = {name: int(row["bytes"].replace(",", "")) for name, row in cells.items()}
    kl = {name: float(row["KL"]) for name, row in cells.items()}
    assert kl["float32"] == 0
    assert nbytes["float16"] < 0.6 * nbytes["float32"]
    order = [f"GPTQ, groups of 32: {bits} bits" for bits in (2, 3, 4, 8)]
    assert sorted(order, key=nbytes.__getitem__) == sorted(order, key=kl.__getitem__, reverse=True) == order
    rests = [f"GPTQ, groups of 32{rest}: 4 bits" for rest in (", rest int4", ", rest int8", "")]
    assert sorted([*rests, "float16"], key=nbytes.__getitem__) == [*rests, "float16"]

    table.main([*given, "--sizes", "1kB", "--rows", "floats", "--again", "float16", "--picture", str(picture)])
    printed = capsys.readouterr()
    assert "float16 …" in printed.err
    assert "float32 …" not in printed.err
    assert rows(printed.out)[1][1:] == body[0][1:]
    table.main(["--results", str(results), "--picture", str(tmp_path / "again.svg")])
    assert capsys.readouterr().out == printed.out
    assert picture.read_bytes() == (tmp_path / "again.svg").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_models_are_timed_beside_what_each_loses(
    name: str,
    benchmark: Benchmark,
    checkpoint: Callable[[str], Path],
    flat_images: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table, data = benchmark("latency"), flat_images if name.startswith("ViT") else text_file
    work, picture = tmp_path / "work", tmp_path / "picture.svg"
    given = f"--model {checkpoint(name)} --calibration {data} --eval {data} --samples 8 --offline --work {work}".split()
    rest = [
        "--batches",
        "1",
        "2",
        "--repeats",
        "1",
        "--fractions",
        "0.7",
        "--rows",
        "onnxruntime:*",
        "*in?onnxruntime*",
    ]
    table.main([*given, *rest])
    printed = capsys.readouterr()
    cells = {row[0]: row for row in rows(printed.out)[1:]}
    ours = ["ours, merged tokens in onnxruntime: 0.7"] if name.startswith("ViT") else []
    assert list(cells)[:2] == ["PyTorch: float32", "onnxruntime: float32"]
    assert set(ours) <= set(cells)
    assert float(cells["onnxruntime: float32"][1]) < 1e-6 < float(cells["onnxruntime: int8, dynamic"][1])
    table.main([*given, *rest, "--picture", str(picture)])
    again = capsys.readouterr()
    assert again.out == printed.out
    assert "…" not in again.err
    table.main(["--work", str(work), "--picture", str(tmp_path / "again.svg")])
    assert picture.read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_codes_are_packed_without_gaps_and_stand_for_the_nearest_weights(benchmark: Benchmark) -> None:
    packed = benchmark("peers.packed")
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        matrix = packed.rounded(weight, bits, 32)
        tensors = matrix.tensors("weight")
        assert {name: each.numel() for name, each in tensors.items()} == {
            "weight.codes": 4 * 50 * bits // 8,
            "weight.scales": 4 * 2,
            "weight.zeros": 4 * 2 * bits // 8,
        }
        assert tensors["weight.scales"].dtype == torch.float16
        step = matrix.spread(matrix.scales).float()
        inside = (matrix.codes > 0) & (matrix.codes < 2**bits - 1)
        assert ((matrix.dense() - weight).abs() <= 0.5001 * step)[inside].all()
    codes = matrix.codes
    assert torch.equal(packed.pack(codes, 8), codes.flatten())
    assert packed.pack(torch.tensor([1, 2, 3, 0, 3], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b11]


def test_ranks_beside_integers_are_judged_matrix_by_matrix(
    benchmark: Benchmark, vit_directory: Path, flat_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("low_rank").main(f"--model {vit_directory} --calibration {flat_images} --samples 8".split())
    head, *body, whole = rows(capsys.readouterr().out)
    assert head == ["matrix", "bits", "best rank beside integers", "saved", "factors alone"]
    assert whole[-1].endswith(f"of {len(body)}")
    assert int(whole[-1].split()[2]) == sum(float(row[-1]) < 1 for row in body)


def test_a_low_rank_part_is_found_where_there_is_one(benchmark: Benchmark) -> None:
    low_rank, generator = benchmark("low_rank"), torch.Generator().manual_seed(0)
    noise = torch.randn(96, 64, generator=generator, dtype=torch.float64)
    two = torch.randn(96, 2, generator=generator).double() @ torch.randn(2, 64, generator=generator).double()
    metric = Metric(torch.ones(96).double(), torch.ones(64).double())
    assert low_rank.best_part(noise, metric, 6.0).rank == 0
    assert low_rank.best_part(noise + 4 * two, metric, 6.0).rank == 2
    assert low_rank.factors_alone(two, metric, 6.0, 1.0) < 1e-9
    assert low_rank.factors_alone(noise, metric, 6.0, 1.0) > 0


def test_what_the_rounding_does_is_taken_away_step_by_step(
    benchmark: Benchmark,
    vit_directory: Path,
    flat_images: Path,
    learned_images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = benchmark("rounding")
    sizes = [taken for taken, _ in script.rounded_models(*_dense_and_stats(vit_directory, flat_images))][2:4]
    script.main(
        [
            *f"--model {vit_directory} --calibration {flat_images} --eval {learned_images}".split(),
            *(
                "--samples",
                "8",
                "--limit",
                "8",
                "--seeds",
                "0",
                "--sizes",
                *(f"{size}B" for size in sizes),
                "--rows",
                *list(script.CHANGES)[:2],
            ),
        ]
    )
    _, *body = rows(capsys.readouterr().out)
    assert [row[0] for row in body] == list(script.CHANGES)[:2]
    assert all(float(cell) >= 0 for row in body for cell in row[1:])


def _dense_and_stats(model: Path, data: Path) -> tuple[Any, Any]:
    loaded = load_dense(str(model))
    preprocessor = Preprocessor.from_checkpoint(loaded.directory, loaded.family.modality, config=loaded.model.config)
    samples = open_data(DataConfig(str(data)), loaded, offline=False).at_most(8, 0)
    names = [target.name for target in find_targets(loaded.model)] + find_outside(loaded.model)
    return loaded.model, collect_sensitivity(loaded.model, names, list(preprocessor.batches(samples, 8)))


def test_merging_is_taken_apart_step_by_step(
    benchmark: Benchmark, vit_directory: Path, flat_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"--model {vit_directory} --calibration {flat_images} --eval {flat_images} --limit 8"
    line += " --fractions 0.65 --changes 0.65 --samples 16 --seeds 0 1 --device cpu"
    benchmark("merging").main(line.split())
    *found, head, fitted = rows(capsys.readouterr().out)
    assert (head[1], fitted[1]) == ("biases fitted", "seeds 0 1")
    assert "±" in fitted[2]
    assert [row[1] for row in found[1:-7]] == [
        "evenly, the rest not computed",
        "by measured losses",
    ]  # little is in reach of the other
    assert all(float(row[2]) <= 0.65 for row in found if row[0] == "0.65")
    unchanged, *changed = (row[3] for row in found[-6:])
    assert unchanged == found[-8][3]
    assert set(changed) != {unchanged}


def test_narrower_layers_stand_beside_ranks_and_are_taken_apart(
    benchmark: Benchmark, vit_directory: Path, flat_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"--model {vit_directory} --calibration {flat_images} --eval {flat_images} --limit 8 --samples 8 --repeats 1"
    benchmark("narrow").main([*line.split(), "--fractions", "0.5", "--changes", "0.5", "--runtimes", "torch"])
    found = rows(capsys.readouterr().out)
    assert [row[1] for row in found[1:4]] == ["ranks", "narrower", "both"]
    assert all(float(cell) > 0 for row in found[1:4] for cell in (row[2], row[3], *row[6:]))
    changed = {row[0]: row[1] for row in found[-5:]}
    assert changed["as the tool does it"] == found[2][3]
    assert len(set(changed.values())) == 5


def test_gptq_loses_less_at_the_outputs_than_rounding_to_nearest(benchmark: Benchmark) -> None:
    gptq, packed = benchmark("peers.gptq"), benchmark("peers.packed")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 96, generator=generator)
    inputs = torch.randn(500, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    hessian = (inputs.T @ inputs / 500).double()

    def loss(matrix: Any) -> float:
        difference = (matrix.dense() - weight).double()
        return float((difference @ hessian * difference).sum())

    for ordered in (True, False):
        recipe = gptq.Recipe(3, 32, activation_order=ordered)
        assert loss(gptq.quantize_matrix(weight, hessian, recipe)) < 0.6 * loss(packed.rounded(weight, 3, 32))


@pytest.mark.slow
def test_onnx_is_timed_against_pytorch(
    benchmark: Benchmark, vit_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("export").main(f"--model {vit_directory} --batches 1 --repeats 1".split())
    head, row = rows(capsys.readouterr().out)
    assert float(row[head.index("difference")]) <= 1e-4
    assert float(row[head.index("onnxruntime, 1")]) > 0


@pytest.mark.slow
def test_an_evaluation_is_timed_beside_its_passes(
    benchmark: Benchmark, vit_directory: Path, learned_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("evaluation").main(f"--model {vit_directory} --data {learned_images} --limit 20 --repeats 2".split())
    head, *body = rows(capsys.readouterr().out)
    assert head == ["run", "passes, s", "evaluation, s", "overhead"]
    assert [row[0] for row in body] == ["1", "2", "median"]
    assert all(float(row[1]) >= 0 and float(row[2]) > 0 and row[3].endswith("%") for row in body)


@pytest.mark.slow
def test_techniques_go_into_one_table_that_a_second_run_completes(
    benchmark: Benchmark,
    vit_directory: Path,
    flat_images: Path,
    learned_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    techniques, results = benchmark("techniques"), str(tmp_path / "results.json")
    given = (
        f"--model {vit_directory} --calibration {flat_images} --eval {learned_images} --results {results} "
        "--samples 16 --keep 0.93 --tokens 10 --landmarks 4 --scorers blur --recovery 1"
    ).split()
    techniques.main([*given, "--only", "qk-joint", "output projections, pca", "--stop-after", "0"])
    printed = capsys.readouterr()
    assert len(rows(printed.out)) == 1
    assert "qk-joint 0.93: not run" in printed.err
    techniques.main([*given, "--only", "qk-joint", "tokens, blur"])
    capsys.readouterr()
    techniques.main([*given, "--only", "qk-joint", "landmarks, pooled", "heads-joint 0.93"])
    printed = capsys.readouterr()
    assert "qk-joint" not in printed.err  # known already
    techniques.main(["--results", results])
    again = capsys.readouterr()
    assert again.out == printed.out
    head, *found = rows(again.out)
    assert head == list(techniques.COLUMNS)
    names = ["dense", "qk-joint 0.93", "10 tokens, blur", "heads-joint 0.93", "4 landmarks, pooled"]
    assert [cells[0] for cells in found] == names
    for cells in found:
        assert all(0 < float(cell) <= 1 for cell in cells[1:3])
        assert float(cells[5]) >= 0
        assert (float(cells[7]) >= 0) if cells[0] != "dense" else cells[7] == "–"
    with pytest.raises(SystemExit, match=r"other circumstances \(calibration\)"):
        techniques.main([*given, "--samples", "8"])


@pytest.mark.slow
def test_the_picture_of_a_quadtree_shows_patches_that_tile_the_image(
    benchmark: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quadtree = benchmark("quadtree")
    quadtree.main([str(tmp_path / "tree.png"), "--tokens", "148", "76"])
    assert capsys.readouterr().out.splitlines() == [
        "148 tokens: 148 patches, 16 of them large",
        "76 tokens: 76 patches, 40 of them large",
    ]
    with Image.open(tmp_path / "tree.png") as picture:
        assert picture.size == (3 * 224 + 2 * 8, 224)
    patches = quadtree.leaves(quadtree.generated(), MixedTokens(61))
    assert {side for _, _, side in patches} == {16, 32}
    covered = np.zeros((224, 224), int)
    for left, top, side in patches:
        covered[top : top + side, left : left + side] += 1
    assert (covered == 1).all()


@pytest.mark.slow
def test_a_technique_of_recovery_gives_a_row(
    benchmark: Benchmark,
    compressed: Callable[..., Any],
    vit_directory: Path,
    flat_images: Path,
    learned_images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = compressed("ViTForImageClassification", method="svd", keep=(0.6,)).directory
    benchmark("recovery").main(
        f"--small {small} --teacher {vit_directory} --data {flat_images} --eval {learned_images} --epochs 2 "
        "--learning-rate 0.001 --techniques distill".split()
    )
    _, _, none, distilled = rows(capsys.readouterr().out)
    kl = [float(row[2]) for row in (none, distilled)]
    assert kl[1] < kl[0]


@pytest.mark.slow
def test_reversible_training_keeps_less_than_plain(benchmark: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("recovery").main(["--memory", "--batch", "1", "--depths", "4", "--repeats", "1"])
    _, *found = rows(capsys.readouterr().out)
    kept = {row[1]: float(row[2]) for row in found}
    plain = kept.pop("plain (sdpa)")
    assert kept.pop("BDIA, reversible") < 0.6 * plain
    assert kept.pop("BDIA, reversible, gamma 1/8") < 0.6 * plain
    assert kept.pop("gradient checkpointing") < 0.6 * plain
    assert kept.keys() == {"eager attention", "DeCAtt", "BDIA"}
    assert all(more >= plain for more in kept.values())


@pytest.mark.slow
def test_the_picture_shows_every_method_of_a_table(benchmark: Benchmark, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    table.write_text(
        "dense top1: 0.9000 (95 % interval 0.8000 to 0.9500)\n\n"
        "| method | fraction | keep | came out | top1 | kl |\n| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| svd | 0.7 | 0.8 | 0.7 | 0.4000 ± 0.0100 | 1.0 |\n| svd | 0.5 | 0.6 | 0.5 | – | – |\n"
        "| curvature | 0.7 | 0.8 | 0.7 | 0.8000 | 0.1 |\n| curvature | 0.5 | 0.6 | 0.5 | 0.7000 | 0.2 |\n"
    )
    picture = benchmark("picture")
    score, curves, dense = picture.read_curves(table.read_text().splitlines())
    assert (score, dense) == ("top1", 0.9)
    assert curves == {"svd": [(0.7, 0.4)], "curvature": [(0.5, 0.7), (0.7, 0.8)]}
    drawn = [tmp_path / "one.svg", tmp_path / "other.svg"]
    for output in drawn:
        picture.main([str(table), "--output", str(output)])
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    table.write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"table\.md: no row"):
        picture.main([str(table), "--output", str(tmp_path / "none.svg")])


def test_the_structure_of_a_tree_is_read_from_its_source(benchmark: Benchmark, tmp_path: Path) -> None:
    sources = {
        "__init__.py": "__version__ = '1'\n",
        "cli/__init__.py": "import vitshrink.jobs.compress\nfrom vitshrink import __version__, jobs\n",
        "jobs/__init__.py": "",
        "jobs/compress.py": "import os\n\nfrom vitshrink.errors import A\nfrom ..models import plan\nfrom . import b\n",
        "jobs/b.py": "found = {}.get('a') or {}\nfound.get(found)\n",
        "models/plan.py": "def size(self, a, *b, c, **d):\n  def inner():\n    from vitshrink.jobs import compress\n",
        "errors.py": "class A: ...\nclass B: ...\n",
        "report/plan.py": "",
    }
    for name, source in sources.items():
        (tmp_path / "vitshrink" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vitshrink" / name).write_text(source)
    facts = benchmark("house.structure").facts_of(tmp_path)
    assert facts["rooms"]["jobs"] == {"modules": 3, "lines": 7}
    assert facts["imports"] == {
        "cli": {"__init__": 1, "jobs": 2},
        "jobs": {"errors": 1, "models": 1},
        "models": {"jobs": 1},
    }
    assert (facts["mutual"], facts["of the package itself"]) == (1, 1)
    assert facts["climbs"] == ["models.plan → jobs.compress"]
    assert facts["names in several rooms"] == {"plan.py": ["models", "report"]}
    assert facts["longest modules"][0] == ("jobs/compress.py", 5)
    assert facts["longest functions"] == [("models/plan.py:1 size", 3), ("models/plan.py:2 inner", 2)]
    assert facts["most arguments"][0] == ("models/plan.py:1 size", 4)
    assert (facts[".get(“…”"], facts["or {}"]) == (1, 1)


def test_the_structure_of_this_tree_is_printed_and_kept(
    benchmark: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "facts.json"
    benchmark("house.__main__").main(["--only", "structure", "--json", str(kept)])
    printed = dict(rows(capsys.readouterr().out))
    facts = json.loads(kept.read_text())["this tree"]["structure"]
    modules = len(list((FOLDER.parent / "vitshrink").rglob("*.py")))
    assert printed["modules"] == str(modules)
    assert printed["rooms"] == str(len(facts["rooms"]))
    assert sum(room["modules"] for room in facts["rooms"].values()) == modules


@pytest.mark.slow
def test_only_jobs_whose_weights_a_change_touches_are_different(
    benchmark: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FOLDER.parent / "vitshrink", tmp_path / "vitshrink")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b -c commit.gpgsign=false commit -qm old"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    entry = tmp_path / "vitshrink" / "__main__.py"
    smaller = 'import sys\nsys.argv = ["0.7" if word == "0.8" else word for word in sys.argv]\n'
    entry.write_text(smaller + entry.read_text().partition("\n")[2])
    script = benchmark("same_bytes")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="1 of 2 jobs differ: vit svd"):
        script.main(["--against", "HEAD", "--jobs", "vit svd", "vit quantize int8"])
    assert [row[-1] for row in rows(capsys.readouterr().out)[1:]] == ["DIFFERENT", "same"]


@pytest.mark.slow
def test_checkpoints_of_several_heads_share_a_table(
    benchmark: Benchmark,
    vit_directory: Path,
    learned_images: Path,
    checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, file, bert = benchmark("checkpoints"), str(tmp_path / "found.json"), str(checkpoint("BertModel"))
    given = ["--checkpoint", str(vit_directory), str(learned_images), str(learned_images)]
    given += ["--checkpoint", bert, str(text_file), str(text_file)]
    script.main([*given, "--keep", "0.8", "0.01", "--bits", "5", "--samples", "8", "--limit", "8", "--results", file])
    output = capsys.readouterr().out
    head, *body = rows(output)
    assert head[:3] == ["checkpoint", "size", "measure"]
    assert [row[1] for row in body] == ["keep 0.8", "bits 5"] * 2
    assert [row[2].partition(",")[0] for row in body] == ["top1"] * 2 + ["none: no labels"] * 2
    assert "keep 0.01: cannot reach" in output
    script.main(["--results", file])
    assert rows(capsys.readouterr().out) == [head, *body]


def test_the_curvature_of_a_sentence_encoder_follows_a_mix(
    benchmark: Benchmark, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pooling = ("Pooling", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}, None)
    model = tiny.write_sentence_encoder(tmp_path / "model", pooling, ("Normalize", {}, None))
    lines = text_file.read_text().splitlines()[:16]
    pairs = tmp_path / "pairs.csv"
    rated = (f"{one},{two},{number}\n" for number, (one, two) in enumerate(zip(lines[::2], lines[1::2], strict=True)))
    pairs.write_text("sentence1,sentence2,score\n" + "".join(rated))
    script, file = benchmark("probes"), str(tmp_path / "found.json")
    given = f"--model {model} --calibration {text_file} --eval {pairs} --sizes 0.9 35kB --shares 0 1 --seeds 0 1"
    script.main([*given.split(), "--samples", "8", "--probes", "2", "--results", file])
    head, *body = rows(capsys.readouterr().out)
    assert head[:4] == ["size", "share of the hidden states", "probes", "seeds"]
    assert [row[:4] for row in body] == [[size, share, "2", "2"] for size in ("35kB", "0.9") for share in "10"]
    found = json.loads(Path(file).read_text())["rows"]
    assert len({row["error"] for row in found.values()}) == len(found) == 9  # the dense model is one of them
    script.main(["--results", file])
    assert rows(capsys.readouterr().out) == [head, *body]
