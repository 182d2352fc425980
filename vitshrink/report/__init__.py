"""What there is to say of a compressed model: one record, written as JSON, Markdown, a model card and a web page."""

from vitshrink.report.record import Report, before_after
from vitshrink.report.render import (
    comparison_markdown,
    markdown_table,
    render_card,
    render_comparison_html,
    render_html,
    render_markdown,
    write,
)
from vitshrink.report.summary import Row, headline, size, summary_rows
from vitshrink.report.thumbnails import thumbnails

__all__ = [
    "Report",
    "Row",
    "before_after",
    "comparison_markdown",
    "headline",
    "markdown_table",
    "render_card",
    "render_comparison_html",
    "render_html",
    "render_markdown",
    "size",
    "summary_rows",
    "thumbnails",
    "write",
]
