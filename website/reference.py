"""The reference of the Python interface: the docstrings of the public names, and of the jobs behind the commands."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import vitshrink
from vitshrink import config as groups
from vitshrink import errors

PAGE = "reference.md"

PARTS = {"vitshrink.hf_quantizer": ["VitshrinkConfig", "VitshrinkQuantizer"]}
"""Of modules, what is shown."""

JOBS = (
    "vitshrink.jobs.compress.compress",
    "vitshrink.jobs.evaluate.evaluate_checkpoint",
    "vitshrink.jobs.finetune.finetune_checkpoint",
    "vitshrink.jobs.quantize.quantize_checkpoint",
    "vitshrink.jobs.export.export",
    "vitshrink.jobs.frontier.survey",
    "vitshrink.jobs.verify.verify_directory",
)

INTRODUCTION = """\
# Python reference

[Models in memory](python.md) has examples. The fields of a report are on [a page of their own](report.md).
"""

ABOUT_JOBS = """\
## Jobs

These functions do what the commands do, on files. The fields of a job are the flags of its
[command](commands/index.md), with `_` in place of `-`. They are no part of the [stable interface](versions.md).
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Directives for mkdocstrings, under headings."""
    own = [f"vitshrink.{name}" for name in vitshrink.__all__ if not name.startswith("__")]
    raised = [f"vitshrink.errors.{name}" for name, each in vars(errors).items() if isinstance(each, type)]
    jobs = [*JOBS, *(f"vitshrink.config.{name}" for name in groups.__all__)]
    parts = [INTRODUCTION, "## Models\n", *map(_shown, own), "## Errors\n", *map(_shown, raised)]
    return "\n".join([*parts, ABOUT_JOBS, *map(_shown, jobs)])


def _shown(name: str) -> str:
    members = f"    options:\n      members: {PARTS[name]}\n" if name in PARTS else ""
    return f"::: {name}\n{members}"
