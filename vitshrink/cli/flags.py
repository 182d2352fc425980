"""The flags of a command, made from the fields of its job: names, types, help, panels, choices and defaults."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from vitshrink.cli import console
from vitshrink.config.fields import Entry, Options, entries_of, flag_of
from vitshrink.config.job import JobOptions
from vitshrink.config.options import parse_option
from vitshrink.errors import UsageError

Suggest = Callable[[], Sequence[str]]
"""What a value may be, where it takes time to say."""


def command(
    job: type[JobOptions] | None, *own: type[Options], suggested: Mapping[str, Suggest] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function.

    The flags are the fields of ``job`` and of the groups ``own``. The function is called with what the command line
    gives for the job, as ``JobOptions.from_mapping`` takes it, and with a group of each kind of ``own``.
    """

    def make(function: Callable[..., None]) -> Callable[..., None]:
        groups = [kind for kind in (job, *own) if kind is not None]
        parameters = [each for group in groups for each in _parameters(group, suggested or {})]

        @functools.wraps(function)
        def run(context: typer.Context, **values: Any) -> None:
            given = [] if job is None else [_given(job, context, values)]
            function(*given, *(_group(kind, values) for kind in own))

        first = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        signature = inspect.Signature([first, *parameters])
        vars(run)["__signature__"] = signature
        run.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
        return console.reported(run)

    return make


def _parameters(group: type[Options], suggested: Mapping[str, Suggest]) -> Iterator[inspect.Parameter]:
    """As Typer reads them from the signature of a function."""
    for entry in entries_of(group):
        if entry.group is not None and entry.option.inlined:
            yield from _parameters(entry.group, suggested)
            continue
        yield _parameter(entry.name, entry, suggested.get(entry.name), optional=issubclass(group, JobOptions))
        if entry.group is not None:
            yield _parameter(f"{entry.name}_option", _inner(entry))
    if issubclass(group, JobOptions):
        for old, new in group.old_names.items():
            known = next(entry for entry in entries_of(group) if entry.name == new)
            hidden = typer.Option(flag_of(old), hidden=True, help=f"The old name of {known.flag}.")
            yield _made(old, known.kind, hidden, None)


def _inner(entry: Entry) -> Entry:
    """The flag that sets one of the other fields of a nested group."""
    inner = f"Flag of `vitshrink {entry.name}`, e.g. minutes=5 or learning-rate=1e-4; repeat it for several."
    option = type(entry.option)(inner, panel=entry.option.panel)
    return Entry(f"{entry.name}_option", Mapping[str, Any], {}, option)


def _parameter(name: str, entry: Entry, suggest: Suggest | None = None, *, optional: bool = True) -> inspect.Parameter:
    option, kind = entry.option, _kind(entry)
    if option.positional:
        argument = typer.Argument(help=option.help, rich_help_panel=option.panel)
        if entry.default is MISSING and not optional:
            return _made(name, kind, argument, inspect.Parameter.empty)
        return _made(name, kind | None, argument, None)
    flags = option.flags or (entry.flag,)
    if kind is bool and entry.default is True:
        flags = (f"{entry.flag}/--no-{entry.flag[2:]}",)
    values = option.suggested or tuple(map(str, option.choices))
    found = typer.Option(
        *flags,
        help=option.help,
        rich_help_panel=option.panel,
        hidden=option.hidden,
        metavar=f"[{'|'.join(values)}]" if values else None,
        autocompletion=_completion(suggest or (lambda: values)) if suggest or values else None,
    )
    if entry.default in (MISSING, None) or get_origin(kind) is list:  # flags replace the default of a list
        return _made(name, kind | None, found, None)
    return _made(name, kind, found, entry.default)


def _made(name: str, kind: Any, known: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, known])


def _kind(entry: Entry) -> Any:
    """The type that Typer reads a value in; choices are checked by the job, whose message says what was meant."""
    kind = entry.alternatives[0]
    if get_origin(kind) is tuple:
        return list[get_args(kind)[0]]  # type: ignore[misc]
    if get_origin(kind) is Mapping or kind is Mapping:
        return list[str]
    return kind if kind in (int, float, bool, Path) else str


def _completion(suggest: Suggest) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [each for each in suggest() if each.startswith(incomplete)]

    return complete


def _given(job: type[JobOptions], context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says of a job; defaults are the job's own affair."""
    said = {
        name: value
        for name, value in values.items()
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    found: dict[str, Any] = {}
    for entry in entries_of(job):
        if entry.group is not None and entry.option.inlined:
            found |= {each.name: said[each.name] for each in entries_of(entry.group) if each.name in said}
        elif entry.group is not None:
            inner = pairs(said.get(f"{entry.name}_option") or ())
            if entry.name in said:
                inner[entries_of(entry.group)[0].name] = said[entry.name]
            if inner:
                found[entry.name] = {key.replace("-", "_"): value for key, value in inner.items()}
        elif entry.name in said:
            found[entry.name] = pairs(said[entry.name]) if entry.takes(dict) else said[entry.name]
    return found | {name: said[name] for name in job.old_names if name in said}


def pairs(texts: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Names and values of ``name=value``. Raises UsageError."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text!r} is not an option: write name=value.")
        found[name] = parse_option(value)
    return found


def _group(kind: type[Options], values: Mapping[str, Any]) -> Options:
    own = {entry.name: values[entry.name] for entry in entries_of(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()})
