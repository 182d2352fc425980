"""What may import what, read from the source of every module, lazy imports inside functions included."""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vitshrink"

# Four layers. The third, what jobs are made of, is all that the sets of the others do not name.
COMMANDS = {"__main__", "cli"}
JOBS = {"api", "assessment", "demo", "exporting", "finetuning", "pipeline", "quantizing", "sweep", "verification"}
MATHEMATICS = {
    "allocation",
    "compensation",
    "errors",
    "gauge",
    "geometry",
    "lowrank",
    "methods",
    "metrics",
    "ranks",
    "stats",
}
GROUND = MATHEMATICS | {"structures"}  # what methods give, of transformers' own modules where they must

SPEECH = {"print", "input", "exit", "quit", "breakpoint", "sys.exit", "os._exit", "sys.stdout.write"}
FOR_THE_TERMINAL = {"typer", "click", "rich"}


@dataclass(frozen=True)
class Import:
    """One imported name: where, and from which module."""

    file: Path
    line: int
    module: str
    """Dotted: the submodule, where the name is one."""
    name: str | None
    """What is taken from the module; None where it is the module itself."""

    def __str__(self) -> str:
        name = self.module if self.name is None else f"{self.name} from {self.module}"
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line} imports {name}"


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {file: ast.parse(file.read_text(encoding="utf-8"), str(file)) for file in FILES.values()}


def room(module: str) -> str:
    """The part of the package that a module belongs to: ``vitshrink.methods.svd`` -> ``methods``."""
    return module.split(".")[1] if "." in module else ""


def imports(file: Path) -> Iterator[Import]:
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno} imports relatively, which this test does not follow"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(file, node.lineno, *((whole, None) if whole in FILES else (str(node.module), alias.name)))


OWN: list[tuple[str, Import]] = []
"""(module, what it imports) within the package. Its ``__init__``, which gathers the public names, is left out."""
FOREIGN: list[tuple[str, Import]] = []
for _module, _file in FILES.items():
    for _import in imports(_file):
        if _import.module.split(".")[0] != "vitshrink":
            FOREIGN.append((_module, _import))
        elif _module != "vitshrink":
            OWN.append((_module, _import))


def layer(module: str) -> int:
    for depth, rooms in enumerate((COMMANDS, JOBS)):
        if room(module) in rooms:
            return depth
    return 3 if room(module) in GROUND else 2


def test_no_import_points_up() -> None:
    gone = (COMMANDS | JOBS | GROUND) - {room(module) for module in FILES}
    assert not gone, f"take what is no more out of this file: {gone}"
    up = [each for module, each in OWN if each.module != "vitshrink" and layer(each.module) < layer(module)]
    assert not up, "imports point from commands to jobs, to what they are made of, to the mathematics:\n" + "\n".join(
        map(str, up)
    )


@pytest.mark.parametrize("unit", [str, room], ids=["modules", "rooms"])
def test_nothing_is_imported_in_a_circle(unit: Callable[[str], str]) -> None:
    graph: dict[str, set[str]] = {}
    for module, each in OWN:
        if each.module != "vitshrink" and unit(module) != unit(each.module):
            graph.setdefault(unit(module), set()).add(unit(each.module))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_only_the_version_is_taken_from_the_package_itself() -> None:
    """Its other names are for users: what stands behind them is imported from where it lies."""
    taken = [each for _, each in OWN if each.module == "vitshrink" and each.name != "__version__"]
    assert not taken, "\n".join(map(str, taken))


def test_the_mathematics_knows_tensors_only() -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    foreign = [
        each for module, each in FOREIGN if room(module) in MATHEMATICS and each.module.split(".")[0] not in allowed
    ]
    assert not foreign, "\n".join(map(str, foreign))


def test_loading_a_checkpoint_does_not_wait_for_what_makes_one() -> None:
    graph: dict[str, set[str]] = {}
    for module, each in OWN:
        graph.setdefault(room(module), set()).add(room(each.module))
    reached, ahead = set[str](), {"checkpoint", "hf_quantizer"}
    while ahead:
        reached |= ahead
        ahead = set().union(*(graph.get(each, set()) for each in ahead)) - reached
    assert {"models", "structures"} <= reached
    assert not reached & ({"calibration", "compression", "data", "evaluation", "recovery", "report"} | JOBS | COMMANDS)


def test_no_module_imports_torchvision() -> None:
    found = [each for _, each in FOREIGN if each.module.split(".")[0] == "torchvision"]
    assert not found, "images are decoded by Pillow alone:\n" + "\n".join(map(str, found))


def test_only_the_command_line_prints_prompts_or_exits() -> None:
    spoken = [
        str(each)
        for module, each in FOREIGN
        if room(module) not in COMMANDS and each.module.split(".")[0] in FOR_THE_TERMINAL
    ]
    for module, file in FILES.items():
        if room(module) not in COMMANDS:
            spoken += [f"{file.relative_to(PACKAGE.parent)}:{line} uses {what}" for line, what in _speech(TREES[file])]
    assert not spoken, "the library is silent, an observer is told:\n" + "\n".join(spoken)


def _speech(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SPEECH:
            yield node.lineno, ast.unparse(node.func)
        if isinstance(node, ast.Name) and node.id == "SystemExit":
            yield node.lineno, node.id
