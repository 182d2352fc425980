"""Flags stay in one piece where a line ends; browsers would break them behind their hyphens."""

import re

CODE = re.compile(r"<code[ >].*?</code>", re.DOTALL)
FLAG = re.compile(r"(?<![\w\"#-])--[a-z][\w-]*")


def on_page_content(content: str, **_: object) -> str:
    """The page with a ``span`` around every flag within code."""
    return CODE.sub(lambda code: FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), content)
