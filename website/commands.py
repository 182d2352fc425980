"""A page for every command, made from its flags: what ``vitshrink COMMAND --help`` says, in the same groups."""

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from vitshrink.cli.app import app

FOLDER = "commands"
GROUP: Any = typer.main.get_command(app)
WIDTH = 80
"""Of the lines of an example."""

WORDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""What stands for a value of a type."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages where the navigation says ``commands``."""
    pages = [f"{FOLDER}/index.md", *({name: f"{FOLDER}/{name}.md"} for name in GROUP.commands)]
    for entry in config.nav or ():
        if FOLDER in entry.values():
            entry.update({title: pages for title, place in entry.items() if place == FOLDER})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    further: dict[str, list[str]] = config.extra["commands"]
    pages = {"index": overview()} | {
        name: command_page(name, command, further.get(name, ())) for name, command in GROUP.commands.items()
    }
    for name, text in pages.items():
        files.append(File.generated(config, f"{FOLDER}/{name}.md", content=text))
    return files


def overview() -> str:
    """The commands, and the options that go before them."""
    rows = [f"| [`{name}`]({name}.md) | {_prose(_paragraphs(each)[0])} |" for name, each in GROUP.commands.items()]
    own = _groups(GROUP.params, set(), options="Options of all commands")
    return "\n".join(
        [
            "# Commands\n",
            "`vitshrink COMMAND --help` says the same as these pages, which are made from it.\n",
            *("| command | what it does |", "| --- | --- |"),
            *rows,
            "\nOptions of all commands go before the command: `vitshrink --debug compress …`.\n",
            *own,
        ]
    )


def command_page(name: str, command: Any, further: Iterable[str]) -> str:
    """What a command does, how it is called, and its flags in groups; ``further`` pages say more."""
    summary, *others = _paragraphs(command)
    arguments = [each for each in command.params if _is_argument(each)]
    usage = " ".join(
        ["vitshrink", name, *(each.name.upper() if each.required else f"[{each.name.upper()}]" for each in arguments)]
    )
    examples = [text.removeprefix("Example: ") for text in others if text.startswith("Example: ")]
    notes = [_prose(text) for text in others if not text.startswith("Example: ")]
    flags = {flag for each in command.params for flag in each.opts}
    lines = [f"# vitshrink {name}\n", _prose(summary) + "\n", *(f"{note}\n" for note in notes)]
    lines += [f"```bash\n{_wrapped(example)}\n```\n" for example in examples or [usage + " [OPTIONS]"]]
    if pages := [f"[{page}](../{page}.md)" for page in further]:
        lines += [f"More about it: {', '.join(pages)}.\n"]
    return "\n".join([*lines, *_groups(command.params, flags)])


def _wrapped(line: str) -> str:
    """A command line in several, broken before flags."""
    pieces = re.split(r" (?=--)", line)
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) < WIDTH:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"  {piece}")
    return " \\\n".join(lines)


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(text.split()) for text in inspect.cleandoc(command.help or "").split("\n\n")]


def _is_argument(parameter: Any) -> bool:
    return type(parameter).__name__ == "TyperArgument"


def _groups(parameters: Iterable[Any], flags: set[str], options: str = "Options") -> Iterator[str]:
    """A heading and a list of definitions for each group of flags, in their order; the nameless one first."""
    panels: dict[str, list[Any]] = {"Arguments": [], options: []}
    for each in parameters:
        if not each.hidden:
            default = "Arguments" if _is_argument(each) else options
            panels.setdefault(each.rich_help_panel or default, []).append(each)
    for title, found in panels.items():
        if found:
            yield f"## {title}\n"
            yield from (_definition(each, flags) for each in found)


def _definition(parameter: Any, flags: set[str]) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    if _is_argument(parameter):
        term = f"`{parameter.name.upper()}`"
    else:
        value = _value(parameter)
        term = ", ".join(f"`{flag}{value}`" for flag in names)
    anchor = names[0].lstrip("-").lower()
    # a sentence that says what a value may be and what it is if nobody says it
    parts = [_prose(parameter.help or "", flags - set(names))]
    if choices := _choices(parameter):
        parts.append(f"One of {', '.join(f'`{each}`' for each in choices)}.")
    if parameter.multiple and "repeat" not in parts[0]:
        parts.append("May be repeated.")
    if parameter.default not in (None, False, [], ()):
        parts.append(f"Default: `{parameter.default}`.")
    return f'<a id="{anchor}"></a>{term}\n:   {" ".join(parts)}\n'


def _choices(parameter: Any) -> list[str]:
    shown = parameter.metavar or ""
    return shown[1:-1].split("|") if shown.startswith("[") else []


def _value(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    kind = get_args(kind)[0] if get_origin(kind) is list else kind
    if kind is bool:
        return ""
    return " " + ("CHOICE" if _choices(parameter) else WORDS[kind])


def _prose(text: str, flags: Iterable[str] = ()) -> str:
    """Help as Markdown: signs are meant, flags and pages are linked."""
    known = set(flags)

    def marked(plain: str) -> str:
        plain = re.sub(r"([*_<\[\]|])", r"\\\1", plain)
        plain = re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", plain)
        return re.sub(r"(?<![\w-])--[a-z][a-z0-9-]*", linked, plain)

    def linked(flag: re.Match[str]) -> str:
        return f"[`{flag[0]}`](#{flag[0][2:]})" if flag[0] in known else f"`{flag[0]}`"

    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else marked(part) for part in parts)
