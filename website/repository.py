"""Files outside docs/ that pages link to become pages of the site, so that one link serves the folder and the site.

A page ``docs/batch.md`` that links to ``../examples/sweep.yaml`` finds it as ``repository/examples/sweep.yaml.md``.
What does not exist is left as it is, and fails the build as any broken link does.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS, PLACE = "docs/", "repository/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", "Makefile": "make", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, what that links to, and so on."""
    wanted = [file.src_uri for file in files.documentation_pages()]
    wanted += [name for name in _named(config.nav) if name.startswith(PLACE)]
    for uri in wanted:  # grows
        if uri.startswith(PLACE) and files.get_file_from_path(uri) is None:
            files.append(_made(uri, config))
        file = files.get_file_from_path(uri)
        if file is not None and file.is_documentation_page():
            wanted += [target for target in _targets(file.content_string, uri) if target not in wanted]
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links out of docs/, and from what was added, as they are on the site."""
    uri = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = _target(link[1], uri)
        return link[1] if target is None else posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)


def _named(nav: object) -> Iterator[str]:
    """The files of a navigation."""
    if isinstance(nav, str):
        yield nav
    for each in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _named(each)


def _targets(markdown: str, uri: str) -> Iterator[str]:
    found = (_target(link[1], uri) for link in LINK.finditer(markdown))
    return (target for target in found if target is not None)


def _target(link: str, uri: str) -> str | None:
    """What a link of a page means on the site, from its top; None where the link is good as it is."""
    here = _origin(uri)
    folder = here if (ROOT / here).is_dir() else posixpath.dirname(here)
    there = posixpath.normpath(posixpath.join(folder, link))
    if (here.startswith(DOCS) and there.startswith(DOCS)) or there.startswith("..") or not (ROOT / there).exists():
        return None
    return _uri(there)


def _origin(uri: str) -> str:
    """The file of the repository that a page of the site shows."""
    if not uri.startswith(PLACE):
        return DOCS + uri
    path = uri.removeprefix(PLACE)
    return path if (ROOT / path).exists() else path.removesuffix("/index.md").removesuffix(".md")


def _uri(path: str) -> str:
    """The page of the site that shows a file or a folder of the repository."""
    if path in (DOCS + "README.md", DOCS.rstrip("/")):
        return "index.md"
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if (ROOT / path).is_dir():
        return f"{PLACE}{path}/{'README' if (ROOT / path / 'README.md').exists() else 'index'}.md"
    return PLACE + (path if path.endswith(".md") else f"{path}.md")


def _made(uri: str, config: MkDocsConfig) -> File:
    path = _origin(uri)
    return File.generated(config, uri, content=_shown(ROOT / path, path))


def _shown(file: Path, path: str) -> str:
    """A file as Markdown: text in its language, the cells of a notebook, the names in a folder."""
    if file.is_dir():
        names = sorted(each.name for each in file.iterdir() if not each.name.startswith((".", "__")))
        return f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        return "\n\n".join(map(_cell, json.loads(text)["cells"]))
    return f"# {path}\n\n{_fenced(text, LANGUAGES.get(file.suffix or file.name, 'text'))}"


def _cell(cell: dict[str, object]) -> str:
    source = cell["source"]
    text = source if isinstance(source, str) else "".join(map(str, source if isinstance(source, list) else ()))
    return text if cell["cell_type"] == "markdown" else _fenced(text, "python")


def _fenced(text: str, language: str) -> str:
    return f"`````{language}\n{text.rstrip()}\n`````\n"
