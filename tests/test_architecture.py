"""What may import what, read from the source of every module, lazy imports inside functions included."""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vitshrink"

FLOORS = (
    {"__main__", "pipeline", "assessment"},  # the last two are old places, which warn
    {"cli"},
    {"jobs"},
    {"report", "recovery", "compression"},
    {"methods", "evaluation"},
    {"statistics"},
    {"data"},
    {"models"},
    {"runtime"},
    {"config"},
    {"errors", "_version"},
)
"""From the top: a room imports from those below it, and from none beside it."""

MOST_ROOMS = 12

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


FLOOR = {each: number for number, floor in enumerate(FLOORS) for each in floor}


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


def reached_from(*starts: str) -> set[str]:
    """The modules that these import, directly or not, themselves included."""
    reached, ahead = set[str](), set(starts)
    while ahead:
        reached |= ahead
        ahead = {each.module for module, each in OWN if module in ahead} - reached
    return reached


def test_every_room_has_its_floor() -> None:
    rooms = {room(module) for module in FILES} - {""}
    assert rooms == set(FLOOR)
    folders = {each.name for each in PACKAGE.iterdir() if (each / "__init__.py").exists()}
    assert len(folders) <= MOST_ROOMS


def test_no_import_points_up_or_aside() -> None:
    climbs = [
        str(each)
        for module, each in OWN
        if room(each.module) != room(module) and FLOOR[room(each.module)] <= FLOOR[room(module)]
    ]
    assert not climbs, "imports point down the floors, and not to a room beside:\n" + "\n".join(climbs)


@pytest.mark.parametrize("unit", [str, room], ids=["modules", "rooms"])
def test_nothing_is_imported_in_a_circle(unit: Callable[[str], str]) -> None:
    graph: dict[str, set[str]] = {}
    for module, each in OWN:
        if unit(module) != unit(each.module):
            graph.setdefault(unit(module), set()).add(unit(each.module))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_nothing_is_taken_from_what_gathers_names_for_users() -> None:
    """What stands behind them is imported from where it lies."""
    taken = [str(each) for _, each in OWN if each.module in ("vitshrink", "vitshrink.config")]
    assert not taken, "\n".join(taken)


def test_methods_know_tensors_only() -> None:
    """Of models they know the structures that take a module's place, which build on transformers' own modules."""
    allowed = sys.stdlib_module_names | {"torch"}
    reached = reached_from(*(module for module in FILES if room(module) in ("methods", "statistics")))
    mathematics = {m for m in reached_from(*(m for m in FILES if room(m) == "methods")) if room(m) != "models"}
    assert mathematics <= reached
    foreign = [str(each) for module, each in FOREIGN if module in mathematics and _top(each) not in allowed]
    models = [
        str(each)
        for module, each in OWN
        if room(module) == "methods"
        and room(each.module) == "models"
        and not each.module.startswith("vitshrink.models.structures")
    ]
    assert not foreign + models, "\n".join(foreign + models)


def test_loading_a_checkpoint_does_not_wait_for_what_makes_one() -> None:
    reached = {room(module) for module in reached_from("vitshrink.models.checkpoint", "vitshrink.models.hf_quantizer")}
    assert reached == {"models", "runtime", "config", "errors", "_version"}


def test_no_module_imports_torchvision() -> None:
    found = [str(each) for _, each in FOREIGN if _top(each) == "torchvision"]
    assert not found, "images are decoded by Pillow alone:\n" + "\n".join(found)


def test_only_the_command_line_prints_prompts_or_exits() -> None:
    quiet = {module: file for module, file in FILES.items() if room(module) not in ("cli", "__main__")}
    spoken = [str(each) for module, each in FOREIGN if module in quiet and _top(each) in FOR_THE_TERMINAL]
    for file in quiet.values():
        spoken += [f"{file.relative_to(PACKAGE.parent)}:{line} uses {what}" for line, what in _speech(TREES[file])]
    assert not spoken, "the library is silent, an observer is told:\n" + "\n".join(spoken)


def _top(each: Import) -> str:
    return each.module.split(".")[0]


def _speech(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SPEECH:
            yield node.lineno, ast.unparse(node.func)
        if isinstance(node, ast.Name) and node.id == "SystemExit":
            yield node.lineno, node.id
