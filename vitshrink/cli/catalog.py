"""What methods there are, read from their source: to list and to check them must not wait for what they import."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vitshrink.config.choosing import choose
from vitshrink.config.method import COMPENSATIONS
from vitshrink.errors import UsageError

FOLDER = Path(__file__).resolve().parents[1] / "methods"

LAYERS, ATTENTIONS = "method", "attention_method"
"""The decorators that enter methods, by what the methods are for."""


@dataclass(frozen=True)
class Facts:
    """One method, as its decorator, its arguments and its docstring describe it."""

    name: str
    kind: str
    needs: str
    allocation: str
    compensation: str
    options: Mapping[str, Any]
    """What ``--option`` sets, with the defaults."""
    summary: str

    @property
    def compensations(self) -> tuple[str, ...]:
        """The repairs that go with it."""
        return COMPENSATIONS if self.kind == LAYERS else ("none",)

    def check_option_names(self, options: Mapping[str, Any]) -> None:
        """Raises UsageError for an option that the method does not have."""
        for name in options:
            if not self.options:
                raise UsageError(f"--option {name}: method {self.name!r} has no options.")
            choose(name, self.options, f"--option of method {self.name!r}:")


@cache
def methods() -> dict[str, Facts]:
    """All methods by name: those for linear layers first, then those for attentions."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.py"))]
    functions = [each for tree in trees for each in tree.body if isinstance(each, ast.FunctionDef)]
    usual = {each.name: _usual(each, trees) for each in functions if each.name in (LAYERS, ATTENTIONS)}
    found = [facts for function in functions for facts in _entered(function, usual)]
    return {each.name: each for each in sorted(found, key=lambda each: (each.kind != LAYERS, each.name))}


def names() -> list[str]:
    """Those of all methods."""
    return list(methods())


def _entered(function: ast.FunctionDef, usual: Mapping[str, Mapping[str, Any]]) -> Iterator[Facts]:
    for call in function.decorator_list:
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in usual:
            continue
        said = {word.arg: _value(word.value) for word in call.keywords if word.arg is not None}
        known = {**usual[call.func.id], **said}
        options = {name: default for name, default in _defaults(function).items() if name != "centered"}
        summary = (ast.get_docstring(function) or "").splitlines()[0]
        chosen = (known["needs"].lower(), known["allocation"], known["compensation"])
        yield Facts(str(_value(call.args[0])), call.func.id, *chosen, options, summary)


def _usual(decorator: ast.FunctionDef, trees: list[ast.Module]) -> dict[str, Any]:
    """What a decorator enters where it is not told: its own defaults, and those of the record that it makes."""
    (tree,) = (tree for tree in trees if decorator in tree.body)
    fields = [each for made in tree.body if isinstance(made, ast.ClassDef) for each in made.body]
    record = {
        each.target.id: _value(each.value)
        for each in fields
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.value is not None
    }
    calls = [each for each in ast.walk(decorator) if isinstance(each, ast.Call)]
    words = [word for call in calls for word in call.keywords if isinstance(word.value, ast.Constant | ast.Attribute)]
    return record | {str(word.arg): _value(word.value) for word in words} | _defaults(decorator)


def _defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """Those of the arguments that are given by name."""
    given = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {argument.arg: _value(default) for argument, default in given if default is not None}


def _value(expression: ast.expr) -> Any:
    """A constant; the last name of what is no constant: ``CURVATURE`` of ``Needs.CURVATURE``."""
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return expression.attr if isinstance(expression, ast.Attribute) else ast.unparse(expression)
