"""Formulas become MathML when the site is built: every browser sets it, and no script or font has to be fetched."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, page: Page, **_: object) -> str:
    """What arithmatex found on a page, typeset. Raises PluginError for a command that is not known."""

    def typeset(found: re.Match[str]) -> str:
        block = found[1] == "div"
        formula = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
        if "\\" in formula:
            raise PluginError(f"{page.file.src_uri}: cannot typeset {found[2]!r}")
        return f'<div class="formula">{formula}</div>' if block else formula

    return FORMULA.sub(typeset, content)
