"""Imports point one way, only the command line speaks to the user, and nothing leans on torchvision."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vitshrink"

# From the top down. A module may import from the layers below its own and from its own layer.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo", "sweep", "finetuning"),
    ("pipeline", "assessment", "api", "exporting", "quantizing", "verification"),
    ("shrinking",),
    ("description", "inspection", "search"),
    ("attentions",),
    ("compression",),
    ("report", "resolution", "maps", "sequential", "rescaling", "measurement", "storage", "quantization", "recovery"),
    ("sharing", "memory"),
    ("effects",),
    ("reference",),
    (
        "models",
        "onnx_model",
        "hub",
        "source",
        "data",
        "calibration",
        "curvature",
        "cache",
        "entries",
        "progress",
        "checkpoint",
        "publication",
        "evaluation",
        "digits",
    ),
    ("methods", "allocation", "compensation", "hf_quantizer"),
    ("structures", "gates", "checksums"),
    ("lowrank", "gauge", "stats", "ranks", "metrics", "cost", "config", "observer", "processes", "extras", "precision"),
    ("errors",),
)
RANK = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}

# The mathematics: tensors in, tensors out.
PURE = ("methods", "allocation", "compensation", "lowrank", "gauge", "stats", "ranks", "metrics")

SPEECH = {"print", "input", "exit", "quit", "breakpoint", "sys.exit", "os._exit", "sys.stdout.write"}

FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


def part(file: Path) -> str:
    """``vitshrink/methods/svd.py`` -> ``methods``, ``vitshrink/ranks.py`` -> ``ranks``."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; ``from vitshrink import x`` counts as ``vitshrink.x``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["vitshrink", *file.relative_to(PACKAGE).parts[:-1]]
            prefix = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            if module == "vitshrink":
                yield from ((node.lineno, f"vitshrink.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def own_imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, part of the package) of every import from vitshrink itself."""
    for line, module in imports(file):
        root, _, rest = module.partition(".")
        if root == "vitshrink" and rest:
            yield line, rest.split(".")[0]


def test_every_module_has_a_place_in_the_layers() -> None:
    placed = RANK.keys() | {"__init__"}
    assert {part(file) for file in FILES} <= placed, "give the new module a place in LAYERS"


@each_file
def test_imports_point_down(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        return  # gathers the public names
    upward = [
        f"{file.relative_to(PACKAGE.parent)}:{line} imports {name}"
        for line, name in own_imports(file)
        if RANK.get(name, len(LAYERS)) < RANK[part(file)]
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        if file != PACKAGE / "__init__.py":
            graph.setdefault(part(file), set()).update(name for _, name in own_imports(file) if name in RANK)
    for name, needed in graph.items():
        needed.discard(name)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@each_file
def test_the_mathematics_knows_nothing_of_transformers(file: Path) -> None:
    if part(file) not in PURE:
        return
    roots = {module.split(".")[0] for _, module in imports(file)}
    assert not roots & {"transformers", "datasets", "accelerate", "PIL", "typer", "rich"}


@each_file
def test_no_module_imports_torchvision(file: Path) -> None:
    assert "torchvision" not in {module.split(".")[0] for _, module in imports(file)}


@each_file
def test_only_the_command_line_prints_prompts_or_exits(file: Path) -> None:
    if part(file) in {"cli", "__main__"}:
        return
    spoken = [f"{file.relative_to(PACKAGE.parent)}:{line} {name}" for line, name in _speech(file)]
    assert not spoken


def _speech(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SPEECH:
            yield node.lineno, ast.unparse(node.func)
        if isinstance(node, ast.Name) and node.id == "SystemExit":
            yield node.lineno, node.id
    for line, module in imports(file):
        if module.split(".")[0] in {"typer", "click", "rich"}:
            yield line, f"import {module}"
