"""A report as Markdown, as a model card and as a web page: the same record through templates."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vitshrink.config.names import shown_text
from vitshrink.errors import OutputError
from vitshrink.evaluation.quality import Evaluation, Fidelity
from vitshrink.report import figures, summary, wording
from vitshrink.report.frontier import Frontier
from vitshrink.report.record import FILE_NAME, Report
from vitshrink.report.thumbnails import SHOWN
from vitshrink.runtime.records import plain

SHOWN_CLASSES = 15

CARD = "README.md"


def write(report: Report, directory: Path) -> None:
    """Write ``report.json``, ``report.md``, ``report.html`` and the model card ``README.md``. Raises OSError."""
    for name, text in ((FILE_NAME, report.to_json()), *_views(report), (CARD, render_card(report))):
        (directory / name).write_text(text, encoding="utf-8")


def write_again(report: Report, directory: Path) -> None:
    """Write ``report.md`` and ``report.html``, and the model card, which people edit, only where there is none.

    Raises OutputError.
    """
    missing = [] if (directory / CARD).exists() else [(CARD, render_card(report))]
    for name, text in (*_views(report), *missing):
        write_text(directory / name, text)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    target = path.resolve()
    try:
        if target.exists() and not target.is_file():  # a device, whose place a file must not take
            target.write_text(text, encoding="utf-8", newline="")
            return
        staged = target.with_name(f".{target.name}.tmp")
        try:
            staged.write_text(text, encoding="utf-8", newline="")
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror if target.parent.is_dir() else f"there is no folder {target.parent}"
        raise OutputError(f"cannot write {path}: {reason}.") from error


def write_comparison(reports: Sequence[Report], directory: Path) -> Path:
    """Write ``comparison.html``, whose path is returned, and ``comparison.md``. Raises OutputError."""
    write_text(directory / "comparison.md", comparison_markdown(reports))
    write_text(directory / "comparison.html", render_comparison_html(reports))
    return directory / "comparison.html"


def _views(report: Report) -> tuple[tuple[str, str], ...]:
    return ("report.md", render_markdown(report)), ("report.html", render_html(report))


def render_markdown(report: Report) -> str:
    """The report for reading in a terminal, a pull request or an issue."""
    return _markdown("report.md", report)


def render_card(report: Report) -> str:
    """The model card: front matter for the Hub, the before/after table, and how to load the model."""
    return _markdown("card.md", report, front_matter=_front_matter(report))


def render_html(report: Report) -> str:
    """One self-contained page; it says so where matplotlib is missing and its pictures are left out."""
    drawn = figures.available()
    return _page(
        "report.html",
        report=report,
        title=f"{summary.model_name(report)}, compressed",
        figures_available=drawn,
        rank_plan=_picture(figures.rank_plan(report)) if drawn else None,
        ranks_only=all(layer.dense or layer.stored.isdigit() for layer in report.layers),
        error_by_layer=_picture(figures.error_by_layer(report)) if drawn else None,
        disagreements=() if report.evaluation is None else report.evaluation.disagreements[:SHOWN],
        **_view(report),
    )


def render_figures(title: str, facts: Mapping[str, Any], pictures: Sequence[tuple[str, str, str]]) -> str:
    """One page of pictures, each with its heading and what it shows."""
    shown = [(heading, caption, _picture(picture)) for heading, caption, picture in pictures]
    return _page("figures.html", title=title, facts=facts, figures=shown)


def render_frontier(
    frontier: Frontier, headings: Sequence[str], rows: Sequence[Sequence[str]], picture: str | None
) -> str:
    """One page that says what sizes of a model lose, and how each is built."""
    title = f"Sizes of {summary.base_name(frontier.model)}"
    shown = {"frontier": frontier, "headings": headings, "rows": rows, "picture": _picture(picture)}
    return _page("frontier.html", title=title, **shown)


def comparison_markdown(reports: Sequence[Report]) -> str:
    """One Markdown table, a line a report."""
    columns = comparison_columns(reports)
    return markdown_table(list(columns), [[column[i] for column in columns.values()] for i in range(len(reports))], 2)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns start at the left, and whose cells stay text whatever is in them."""
    lines = [list(headings), [":--" if i < left else "--:" for i in range(len(headings))]]
    lines += [[plain_markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def render_comparison_html(reports: Sequence[Report]) -> str:
    """One page that compares several compressed models."""
    drawn = figures.available()
    columns = comparison_columns(reports)
    one_model = columns["model"][0] if len(set(columns["model"])) == 1 else None
    return _page(
        "comparison.html",
        title="Compressed models compared",
        columns={name: texts for name, texts in columns.items() if name != "model" or not one_model},
        one_model=one_model,
        reports=reports,
        figures_available=drawn,
        trade_off=_picture(figures.trade_off(reports)) if drawn else None,
        loss_by_cost=_picture(figures.loss_by_cost(reports)) if drawn else None,
        rank_plans=[_picture(figures.rank_plan(report)) for report in reports] if drawn else [],
        same_data=len({_data_of(report) for report in reports}) == 1,
    )


def comparison_columns(reports: Sequence[Report]) -> dict[str, list[str]]:
    """The columns of a comparison, those that nothing was measured for left out; one text a report."""
    evaluations = [report.evaluation for report in reports]
    name = next((summary.metric_name(each) for each in evaluations if each is not None and each.metric), "accuracy")
    lines = [_line(report, name) for report in reports]
    columns = {column: [line.get(column, wording.UNKNOWN) for line in lines] for column in _columns(name)}
    return {column: texts for column, texts in columns.items() if set(texts) != {wording.UNKNOWN}}


def _columns(metric: str) -> list[str]:
    costs = ["kept", "parameters", "files", "MACs", "latency"]
    quality = [f"dense {metric}", metric, "change", "real", "agreement", "KL", "relative error", "cosine"]
    return ["model", "method", *costs, *quality]


def _line(report: Report, metric: str) -> dict[str, str]:
    """The cells of one report by column; those that nothing was measured for may be missing."""
    latency = report.latency and report.latency.compressed
    cells = {
        "model": summary.model_name(report),
        "method": _method(report),
        "kept": wording.percent(report.parameters.kept),
        "parameters": wording.count(report.parameters.compressed),
        "files": wording.size(report.bytes and report.bytes.compressed),
        "MACs": wording.count(report.macs and report.macs.compressed),
        "latency": wording.duration(latency and latency.median),
    }
    return cells if report.evaluation is None else cells | _quality(report.evaluation, metric)


def _quality(evaluation: Evaluation, metric: str) -> dict[str, str]:
    fidelity, difference, own = evaluation.fidelity or Fidelity(), evaluation.difference, evaluation.metric
    cells = {
        "agreement": wording.percent(fidelity.agreement),
        "KL": wording.number(fidelity.kl),
        "relative error": wording.number(fidelity.relative_error),
        "cosine": wording.number(fidelity.feature_cosine),
    }
    for column, quality in ((f"dense {metric}", evaluation.dense), (metric, evaluation.compressed)):
        cells[column] = wording.score(own, quality and quality.score(own))
    if difference is not None:
        cells["real"] = "yes" if difference.significant else "no"
        cells["change"] = wording.UNKNOWN if difference.drop is None else wording.signed(own, -difference.drop)
    return cells


def _method(report: Report) -> str:
    if report.method == "none":
        return report.kind
    first = report.kind if report.quantization is None else report.method
    parts = [first, report.allocation, *([] if report.compensation == "none" else [report.compensation])]
    if report.quantization is None:
        return ", ".join(parts)
    return ", ".join([*(part for part in parts if part != "none"), report.quantization.weights])


def _view(report: Report) -> dict[str, Any]:
    classes = () if report.evaluation is None else report.evaluation.classes
    damaged = [each for each in classes if each.gain < 0]
    return {
        "name": summary.model_name(report),
        "rows": summary.summary_rows(report),
        "facts": summary.facts(report),
        "headline": summary.headline(report),
        "evaluation": report.evaluation,
        "damaged": damaged[:SHOWN_CLASSES],
        "number_of_classes": len(classes),
        "number_of_damaged": len(damaged),
        "auto_class": summary.auto_class(report),
        "recipe": yaml.safe_dump(report.to_dict()["recipe"], sort_keys=False, allow_unicode=True)
        if report.recipe
        else "",
    }


@cache
def _environment(*, autoescape: bool) -> Environment:
    """Compiled templates are kept in it."""
    environment = Environment(
        loader=PackageLoader("vitshrink.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for show in (wording.count, wording.size, wording.percent, wording.duration, wording.number, wording.plain):
        environment.filters[show.__name__] = show
    environment.filters |= {"prepared": wording.prepared, "base_name": summary.base_name}
    environment.filters["cell"] = plain_markdown
    environment.filters["entries"] = lambda record: plain(record).items()
    environment.filters["code"] = _code
    environment.filters["unbroken"] = _unbroken
    return environment


def _markdown(template: str, report: Report, **more: Any) -> str:
    environment = _environment(autoescape=False)
    text = environment.get_template(template).render(report=report, **_view(report), **more)
    return re.sub(r"\n{3,}", "\n\n", shown_text(text)).rstrip() + "\n"


def _page(template: str, **values: Any) -> str:
    return shown_text(_environment(autoescape=True).get_template(template).render(**values))


def _picture(svg: str | None) -> Markup | None:
    """Mark a picture as one that must not be escaped: matplotlib has escaped the names in it."""
    return None if svg is None else Markup(svg)


def plain_markdown(text: Any) -> str:
    """Text that stays text in a Markdown table, whatever a layer, class or file is called."""
    line = re.sub(r"([\\`*\[\]<>|&~$])", r"\\\1", " ".join(shown_text(str(text)).split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|^(?=[#+-])", lambda match: "\\" + match[0], line)


def _unbroken(text: str) -> str:
    """Keep a figure with its unit, and ``top-1`` whole, where a line is too short."""
    return re.sub(r"(?<=[\d<=]) (?=[\d%kMGTmsB])", "\u00a0", text.replace("-", "\u2011"))


def _code(text: Any) -> str:
    """A fenced block that the text cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", str(text))), default=0))
    return f"{fence}\n{str(text).rstrip()}\n{fence}"


def _front_matter(report: Report) -> str:
    entries: dict[str, Any] = {"library_name": "transformers", "tags": ["vitshrink", "low-rank", "compression"]}
    if report.task in summary.PIPELINES:
        entries["pipeline_tag"] = summary.PIPELINES[report.task]
    if summary.is_hub_id(report.model):
        entries |= {"base_model": report.model, "base_model_relation": "quantized"}  # the Hub's word for compressed
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)


def _data_of(report: Report) -> tuple[str | None, int, str] | None:
    evaluation = report.evaluation
    return None if evaluation is None else (evaluation.fingerprint, evaluation.samples, evaluation.task)
