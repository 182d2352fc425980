"""What there is to say of a compressed model: one record, written as JSON, Markdown, a model card and a web page."""

from vitshrink.report.costs import BeforeAfter, before_after
from vitshrink.report.csv_file import append_rows, check_appendable, evaluation_columns, latency_columns, report_row
from vitshrink.report.frontier import Frontier, Point
from vitshrink.report.frontier_page import write_frontier
from vitshrink.report.record import Report, report_schema
from vitshrink.report.render import (
    comparison_markdown,
    markdown_table,
    plain_markdown,
    render_card,
    render_comparison_html,
    render_figures,
    render_html,
    render_markdown,
    write,
    write_again,
    write_comparison,
    write_text,
)
from vitshrink.report.summary import Row, headline, summary_rows
from vitshrink.report.thumbnails import with_thumbnails
from vitshrink.report.wording import size

__all__ = [
    "BeforeAfter",
    "Frontier",
    "Point",
    "Report",
    "Row",
    "append_rows",
    "before_after",
    "check_appendable",
    "comparison_markdown",
    "evaluation_columns",
    "headline",
    "latency_columns",
    "markdown_table",
    "plain_markdown",
    "render_card",
    "render_comparison_html",
    "render_figures",
    "render_html",
    "render_markdown",
    "report_row",
    "report_schema",
    "size",
    "summary_rows",
    "with_thumbnails",
    "write",
    "write_again",
    "write_comparison",
    "write_frontier",
    "write_text",
]
