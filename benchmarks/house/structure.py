"""The structure of a tree of the package, read from its source; nothing of it is imported."""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

PACKAGE = "vitshrink"
ORDER = (
    "cli",
    "jobs",
    "report recovery compression",
    "methods evaluation",
    "statistics",
    "data models",
    "runtime",
    "config",
    "errors",
)
"""The rooms from top to bottom: a room may import those on its line and below."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
NEW = {"jobs", "statistics", "runtime"}
"""A tree without any of these knows no such order."""


@dataclass(frozen=True)
class Module:
    """One file: ``name`` is dotted and without the package, ``__init__`` for the package itself."""

    name: str
    path: str
    source: str

    @property
    def room(self) -> str:
        """The top-level package, or the top-level module."""
        return self.name.partition(".")[0]

    @property
    def lines(self) -> int:
        return len(self.source.splitlines())

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.source)))

    def imports(self, known: set[str]) -> set[str]:
        """Those of the ``known`` modules that it imports, inside functions included."""
        dotted: list[str] = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                dotted += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = Path(PACKAGE, self.path).parts[: -node.level] if node.level else ()
                base = ".".join([*above, *filter(None, [node.module])])
                dotted += [f"{base}.{alias.name}" for alias in node.names]
        own = [name.split(".")[1:] for name in dotted if name.split(".")[0] == PACKAGE]
        return {_longest(parts, known) for parts in own}

    def functions(self) -> Iterator[tuple[str, int, int]]:
        """Where each is, its lines, and its arguments without ``self``."""
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                named = [
                    a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a
                ]
                arguments = len([name for name in named if name not in ("self", "cls")])
                yield f"{self.path}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1, arguments


def _longest(parts: list[str], known: set[str]) -> str:
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in known), "__init__")


def modules_of(tree: Path) -> list[Module]:
    found = []
    for file in sorted((tree / PACKAGE).rglob("*.py")):
        path = file.relative_to(tree / PACKAGE)
        parts = [part for part in path.with_suffix("").parts if part != "__init__"]
        found.append(Module(".".join(parts) or "__init__", path.as_posix(), file.read_text(encoding="utf-8")))
    return found


def facts_of(tree: Path) -> dict[str, Any]:
    """All figures of the structure, as JSON; ``climbs`` is None in a tree without the rooms of ``ORDER``."""
    modules = modules_of(tree)
    names = {module.name for module in modules}
    edges = [(module, other) for module in modules for other in sorted(module.imports(names))]
    between: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for module, other in edges:
        if module.room != _room(other):
            between[module.room][_room(other)] += 1
    rooms = Counter(module.room for module in modules)
    lines = Counter[str]()
    files = defaultdict(set)
    for module in modules:
        lines[module.room] += module.lines
        files[Path(module.path).name].add(module.room)
    functions = [function for module in modules for function in module.functions()]
    nodes = [node for module in modules for node in module.nodes]
    climbs = [f"{module.name} → {other}" for module, other in edges if _climbs(module.room, _room(other))]
    return {
        "rooms": {room: {"modules": count, "lines": lines[room]} for room, count in sorted(rooms.items())},
        "imports": between,
        "mutual": sum(other in between and room in between[other] for room in between for other in between[room]) // 2,
        "of the package itself": sum(other == "__init__" for _, other in edges),
        "climbs": climbs if NEW & rooms.keys() else None,
        "outside the order": sorted(rooms.keys() - LEVEL.keys() - {"__init__", "__main__"}),
        "longest modules": _most((module.path, module.lines) for module in modules),
        "longest functions": _most((name, length) for name, length, _ in functions),
        "most arguments": _most((name, arguments) for name, _, arguments in functions),
        "names in several rooms": {n: sorted(r) for n, r in sorted(files.items()) if len(r) > 1 and n != "__init__.py"},
        ".get(“…”": sum(map(_asks_for_entry, nodes)),
        "or {}": sum(map(_falls_back, nodes)),
    }


def _room(name: str) -> str:
    return name.partition(".")[0]


def _climbs(room: str, other: str) -> bool:
    return room in LEVEL and other in LEVEL and LEVEL[other] < LEVEL[room]


def _most(named: Iterator[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(named, key=lambda pair: -pair[1])[:5]


def _asks_for_entry(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "get":
        return False
    return bool(node.args) and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)


def _falls_back(node: ast.AST) -> bool:
    if not isinstance(node, ast.BoolOp) or not isinstance(node.op, ast.Or):
        return False
    return any(isinstance(value, ast.Dict) and not value.keys for value in node.values)
