"""The guide: its command lines are those of the program, its first page runs, and the site has no broken link."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer
from command_lines import ROOT, blocks, command_lines, exit_code, flags, inline_flags, pages, words_of
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.jobs.digits import train_digits_model, write_digits

GUIDE = [page for page in pages() if page.parent.name != "benchmarks"]
FIRST = ROOT / "docs" / "index.md"
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
SITE = ("docs", "website", "examples", "benchmarks", "calibration", "mkdocs.yml", "Makefile", "pyproject.toml")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# What the pages say


@pytest.mark.parametrize("page", GUIDE, ids=named)
def test_every_command_line_of_a_page_makes_sense(page: Path) -> None:
    for line in command_lines(page.read_text(encoding="utf-8")):
        assert exit_code(words_of(line)) == 0, line


def test_a_command_line_that_makes_no_sense_is_found() -> None:
    good = "compress MODEL OUT --keep 0.7 --calibration images/"
    assert exit_code(good.split()) == 0
    for wrong in ("--kep 0.7", "--keep 7", "--forms bots", "--keep 0.7 --rank 3", "--samples many"):
        assert exit_code(good.replace("--keep 0.7", wrong).split()) == 2, wrong


def test_command_lines_are_found_in_every_kind_of_block() -> None:
    console = "* x\n\n  ```console\n  $ vitshrink c\n  what c prints\n  ```\n"
    page = f"```\nvitshrink a \\\n  --b\n```\n\n{console}\n```python\nvitshrink\n```"
    assert command_lines(page) == ["vitshrink a --b", "vitshrink c"]


@pytest.mark.parametrize("page", [page for page in GUIDE if page.parent.name == "docs"], ids=named)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    assert set(inline_flags(page.read_text(encoding="utf-8"))) <= flags()


@pytest.mark.parametrize("page", GUIDE, ids=named)
def test_python_on_a_page_can_be_read(page: Path) -> None:
    for language, text in blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(text)


def headings(page: str) -> set[str]:
    """The anchors of a page, as GitHub and the site name them."""
    text = re.sub(r"^( *)```.*?^\1```", "", page, flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", GUIDE, ids=named)
def test_links_lead_to_files_and_headings_of_the_repository(page: Path) -> None:
    for link in re.findall(r"\]\(((?!https?:|mailto:)[^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), link


def figures(page: Path) -> list[list[str]]:
    """The numbers of every row of a table that has some, signs of emphasis and units aside."""
    rows = (line.split("|")[1:-1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|"))
    found = [[each for cell in row for each in re.findall(r"^[*]*([\d.]+)", cell.strip())] for row in rows]
    return [row for row in found if row]


def test_figures_of_the_results_page_are_those_of_the_runs() -> None:
    runs = [row for page in (ROOT / "benchmarks" / "results").glob("*.md") for row in figures(page)]
    rows = figures(ROOT / "docs" / "results.md")
    assert len(rows) > 15
    for row in rows:
        assert any(run[: len(row)] == row for run in runs), row


def test_every_page_of_the_guide_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].partition("\nvalidation:")[0]
    listed = set(re.findall(r"([\w-]+\.md)$", navigation, re.MULTILINE))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


# What they tell to do


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as ``vitshrink demo`` leaves it, whose model has learned less."""
    root = tmp_path_factory.mktemp("newcomer")
    digits = root / "demo-output" / "digits"
    write_digits(digits)
    train_digits_model(digits / "train", root / "demo-output" / "model", epochs=4)
    return root


@pytest.mark.slow
def test_the_first_page_runs_from_its_first_line_to_its_last(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    page = FIRST.read_text(encoding="utf-8")
    made, *lines = command_lines(page)
    assert made == "vitshrink demo --output demo-output"
    for line in lines:
        ended = CliRunner().invoke(app, words_of(line))
        assert ended.exit_code == 0, (line, ended.output)
    (program,) = (text for language, text in blocks(page) if language == "python")
    found: dict[str, Callable[[str], list[dict[str, object]]]] = {}
    exec(program, found)
    image = next((demo / "demo-output" / "digits" / "val" / "3").iterdir())
    assert {answer["label"] for answer in found["classify"](str(image))} <= set("0123456789")
    assert Path("small/model.safetensors").stat().st_size <= 100_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of Jupyter
def test_the_notebook_runs_and_draws(demo: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept: clear them"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(demo)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)


# The site


class Page(HTMLParser):
    """What a page refers to: ``links`` to follow, and what is ``fetched`` to show it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value for name, value in attrs if value}
        self.anchors |= {known[name] for name in ("id", "name") if name in known}
        if tag == "a" and "href" in known:
            self.links.append(known["href"])
        elif tag == "link" and known.get("rel") != "canonical" and "href" in known:
            self.fetched.append(known["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in known:
            self.fetched.append(known["src"])


def build(root: Path, output: Path) -> "subprocess.CompletedProcess[str]":
    if find_spec("material") is None or find_spec("mkdocstrings") is None or find_spec("latex2mathml") is None:
        pytest.skip('what builds the site is not installed: pip install "vitshrink[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", root / "mkdocs.yml", "--site-dir", output]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    built = build(ROOT, output)
    assert built.returncode == 0, built.stderr
    return output


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[Path, Page]:
    return {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html") if file.name != "404.html"}


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(parsed: dict[Path, Page]) -> None:
    for file, page in parsed.items():
        for link in page.links:
            path, _, anchor = unquote(link).partition("#")
            if re.match("[a-z]+:", path):
                continue
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (file.name, link)
            if anchor and target in parsed:
                assert anchor in parsed[target].anchors, (file.name, link)


@pytest.mark.slow
def test_pages_fetch_nothing_from_the_network(site: Path, parsed: dict[Path, Page]) -> None:
    fetched = {place for page in parsed.values() for place in page.fetched}
    assert fetched
    assert not [place for place in fetched if re.match("[a-z]*:?//", place)]
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert not re.search(r"@import|url\(\W?(?:https?:)?//", styles)


@pytest.mark.slow
def test_every_command_has_a_page_with_every_flag(parsed: dict[Path, Page], site: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        page = parsed[site / "commands" / f"{name}.html"]
        shown = {parameter.opts[0].lstrip("-") for parameter in command.params if not parameter.hidden}
        assert shown <= page.anchors, name


@pytest.mark.slow
def test_formulas_are_typeset(site: Path) -> None:
    page = (site / "mathematics.html").read_text(encoding="utf-8")
    assert page.count("<math") > 50
    assert "arithmatex" not in page
    assert "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


@pytest.mark.slow
def test_broken_links_and_anchors_fail_the_build(tmp_path: Path) -> None:
    for name in SITE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for file in ROOT.glob("*.md"):
        shutil.copy(file, tmp_path)
    broken = ["no-such-page.md", "bits.md#no-such-heading", "../no/such/file.py"]
    with (tmp_path / "docs" / "choosing.md").open("a", encoding="utf-8") as page:
        page.write("".join(f"\n[x]({link})\n" for link in broken))
    built = build(tmp_path, tmp_path / "out")
    assert built.returncode == 1, built.stderr
    for link in broken:
        assert re.search(rf"WARNING.*choosing.md.*{re.escape(link)}", built.stderr), link
