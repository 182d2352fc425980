"""The wheel and the source distribution hold everything that the package reads at run time."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import empty_environment
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_architecture import FILES, imports

from vitshrink.config.options import CompressConfig, FinetuneConfig
from vitshrink.jobs.compress import compress

ROOT = Path(__file__).resolve().parents[1]

ASKED_FOR_BY_NAME = {"scipy"}
"""What few need, and are told by name to install."""


def tracked(pattern: str) -> list[Path]:
    """Files of the package that are not Python and not caches."""
    return [file.relative_to(ROOT) for file in sorted(ROOT.glob(pattern)) if file.is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built without a network: the build backend is one of the development dependencies."""
    offline = ("--no-index", "--no-build-isolation", "--no-deps")
    folder = tmp_path_factory.mktemp("wheel")
    _run("pip", "wheel", "--quiet", *offline, "--wheel-dir", folder, ROOT)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def _run(*arguments: str | Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.slow
def test_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    expected = {
        file.as_posix()
        for file in tracked("vitshrink/**/*")
        if "__pycache__" not in file.parts and file.suffix != ".pyc"
    }
    assert "vitshrink/py.typed" in expected
    assert expected <= set(wheel.namelist())


@pytest.mark.slow
def test_wheel_holds_the_calibration_recipes(wheel: zipfile.ZipFile) -> None:
    recipes = [file.relative_to("calibration").as_posix() for file in tracked("calibration/**/*.yaml")]
    assert recipes
    assert {f"vitshrink/calibration_recipes/{name}" for name in recipes} <= set(wheel.namelist())


@pytest.mark.slow
def test_wheel_holds_the_license_and_nothing_foreign(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vitshrink"}


@pytest.mark.slow
def test_wheel_names_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "vitshrink = vitshrink.cli:main" in wheel.read(entry_points).decode()


@pytest.mark.slow
def test_source_distribution_can_build_and_test_itself(tmp_path: Path) -> None:
    _run("hatchling", "build", "--target", "sdist", "--directory", tmp_path)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "examples/sweep.yaml",
    } <= names
    assert not {name for name in names if name.startswith((".venv", "demo-output"))}


def test_constraints_pin_exact_versions_and_name_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    for pin in pins:
        name, _, version = pin.partition("==")
        assert name, pin
        assert version, f"{pin!r} is not an exact version"
        assert not set(pin) & set("+@/ "), f"{pin!r} names a build or a place"


def test_the_oldest_torch_does_that_is_declared(
    monkeypatch: pytest.MonkeyPatch, vit_directory: Path, tmp_path: Path, flat_images: Path
) -> None:
    """torch 2.10 has no ``torch.cpu.get_capabilities``."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    entries: dict[str, Any] = {"calibration": str(flat_images), "samples": 16, "holdout": 4, "refine": 0}
    training = FinetuneConfig(data=str(flat_images), epochs=1)
    (result,) = compress(
        CompressConfig(str(vit_directory), str(tmp_path / "out"), keep=(0.8,), finetune=training, **entries)
    )
    assert result.report.recovery is not None
    assert result.report.recovery.settings["precision"] == "no"


@pytest.mark.slow
def test_where_there_are_no_file_locks_models_load_and_what_writes_says_so(
    vit_directory: Path, flat_images: Path, tmp_path: Path
) -> None:
    """Windows has neither ``fcntl`` nor ``resource``."""
    program = """
import sys, accelerate, datasets, torch, transformers, transformers.modeling_utils
sys.modules["fcntl"] = sys.modules["resource"] = None  # from here on: others ask for them where they know Linux
import vitshrink
from vitshrink.cli.app import app
from vitshrink.errors import OutputError
torch.set_num_threads(1)
small = vitshrink.compress(vitshrink.load(sys.argv[1]), keep=0.8, method="svd", compensation="none")
assert small.report.environment.peak_memory > 10**7
try:
    small.save(sys.argv[2])
except OutputError as error:
    print(error)
write = ["compress", *sys.argv[1:3], "--keep", "0.8", "--method", "svd"]
for command in (write, ["eval", sys.argv[1], "--data", sys.argv[3], "--csv", "a.csv"], ["methods"]):
    try:
        app(command)
    except SystemExit as exit:
        print(exit.code, file=sys.stderr)
"""
    process = subprocess.run(
        [sys.executable, "-c", program, vit_directory, tmp_path / "out", flat_images],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.startswith("vitshrink writes models and tables on Linux and macOS only"), process.stderr
    assert process.stderr.count("error: vitshrink writes models and tables on Linux and macOS only") == 2
    assert [line for line in process.stderr.splitlines() if line.isdigit()] == ["1", "1", "0"]
    assert "bug" not in process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_wheel_and_what_it_declares_are_enough_for_the_demo_and_its_pictures(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    declared = message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist", [])
    python = empty_environment.install(Path(wheel.filename or ""), declared, tmp_path / "environment")
    program = """
import importlib.util, sys
from pathlib import Path
assert not any(map(importlib.util.find_spec, ("pytest", "scipy", "sklearn", "onnx", "mypy")))
from vitshrink.jobs.demo import run_demo
print(run_demo(Path(sys.argv[1]), print, epochs=1, methods=("svd",)).comparison)
"""
    for command in (["-m", "vitshrink", "--version"], ["-c", program, str(tmp_path / "demo")]):
        process = subprocess.run([python, "-I", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr
    assert "<svg" in (tmp_path / "demo" / "comparison.html").read_text(encoding="utf-8")
    assert "static" in process.stdout.partition("Not part of the demo")[2]


def test_what_is_imported_is_declared() -> None:
    """Imports inside functions, too; what only extras bring may be imported there alone, which other tests see to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [needs for name, needs in project["optional-dependencies"].items() if name not in ("dev", "test")]
    always, more = _names(project["dependencies"]), _names(chain(*extras))
    packages = packages_distributions()
    modules = {each.module.partition(".")[0] for file in FILES.values() for each in imports(file)}
    foreign = modules - sys.stdlib_module_names - {"vitshrink"}
    imported = {canonicalize_name(packages.get(module, [module])[0]) for module in foreign}
    assert imported - always - more == ASKED_FOR_BY_NAME
    assert always <= imported, "declared, and imported nowhere"


def _names(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(each).name) for each in requirements}
