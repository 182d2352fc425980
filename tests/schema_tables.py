"""The tables of ``docs/report.md``, made from the JSON Schema of a report.

``PYTHONPATH=.:tests python tests/schema_tables.py`` writes them.
"""

from pathlib import Path
from typing import Any

from vitshrink.report import report_schema

PAGE = Path(__file__).resolve().parents[1] / "docs" / "report.md"
START = "<!-- from here on made by tests/schema_tables.py -->\n"


def tables() -> str:
    """One table a record, the report first, and the others in the order in which they are named."""
    schema = report_schema()
    records = {"Report": schema} | schema["$defs"]
    names, lines = ["Report"], list[str]()
    for name in names:
        entries = records[name].get("properties", {})
        if name != "Interval":
            lines += ["", f"## {name}", "", _text(records[name]["description"]), ""]
            lines += ["| entry | value | what it is |", "| --- | --- | --- |"]
            lines += [
                f"| `{key}` | {_value(entry)} | {_text(entry['description'])} |" for key, entry in entries.items()
            ]
        found = (each for entry in entries.values() for each in _records(entry))
        names += [each for each in dict.fromkeys(found) if each not in names]
    return "\n".join(lines) + "\n"


def written() -> str:
    """The page as it should be."""
    return PAGE.read_text(encoding="utf-8").partition(START)[0] + START + tables()


def _value(entry: dict[str, Any]) -> str:
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        return "`[low, high]`" if name == "Interval" else f"[{name}](#{name.lower()})"
    if "anyOf" in entry:
        return " or ".join(map(_value, entry["anyOf"]))
    if "const" in entry:
        return f"`{entry['const']}`"
    if "prefixItems" in entry:
        return f"list of {len(entry['prefixItems'])}"
    if entry.get("type") == "array":
        return f"list of {_value(entry['items'])}"
    if "maxProperties" in entry:
        return "`{}`"
    return "null" if entry["type"] == "null" else str(entry["type"])


def _records(entry: Any) -> list[str]:
    """The records that an entry may be made of."""
    if isinstance(entry, dict):
        own = [entry["$ref"].rpartition("/")[2]] if "$ref" in entry else []
        return own + [each for value in entry.values() for each in _records(value)]
    return [each for value in entry for each in _records(value)] if isinstance(entry, list) else []


def _text(description: str) -> str:
    """On one line, with the marks of Markdown, and null for None."""
    words = " ".join(description.replace("``", "`").split())
    return words.replace("None", "null").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
