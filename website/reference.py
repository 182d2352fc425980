"""The reference of the Python interface: the docstrings of the names that are public."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import vitshrink
from vitshrink import config as options
from vitshrink import errors

PAGE = "reference.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    raised = [name for name, each in vars(errors).items() if isinstance(each, type)]
    files.append(File.generated(config, PAGE, content=page(raised)))
    return files


def page(raised: list[str]) -> str:
    """Directives for mkdocstrings, under headings."""
    own = [name for name in vitshrink.__all__ if not name.startswith("__")]
    parts = ["# Python reference\n", "What it is for, and examples: [models in memory](python.md).\n"]
    for title, module, names in (
        ("Models", "vitshrink", own),
        ("Options of jobs", "vitshrink.config", options.__all__),
        ("Errors", "vitshrink.errors", raised),
    ):
        parts += [f"## {title}\n", *(f"::: {module}.{name}\n" for name in names)]
    return "\n".join(parts)
