"""YAML as people mean it: ``no`` is a word, ``1e-4`` a number, and what is wanted as text stays as it was written."""

import re
from collections.abc import Mapping
from typing import Any

import yaml


class Written(float):
    """A number that is also known as it was written, for where text is wanted: ``model: 1.10``."""

    def __new__(cls, text: str) -> "Written":
        return super().__new__(cls, re.sub(r"\.(inf|nan)", r"\1", text.lower()))

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, where other plain scalars are text: no dates, no base 60, no words for booleans.

    A whole number is one as Python writes it; ``007`` and ``0x10`` stay text, which entries for numbers can read.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
_NUMBER = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"-?(?:0|[1-9][0-9]{0,4000})", "-0123456789"),
    ("float", _NUMBER + r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _written(loader: _Loader, node: yaml.ScalarNode) -> Written:
    return Written(str(loader.construct_scalar(node)))


_Loader.add_constructor("tag:yaml.org,2002:float", _written)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what either version of YAML would take for something else than text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_NUMBER})\Z"), list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The content of a YAML document; numbers with a point or an exponent are ``Written``. Raises ValueError."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(str(error)) from error


def write_yaml(entries: Mapping[str, Any]) -> str:
    """What ``read_yaml`` reads, in the order of the entries."""
    return str(yaml.dump(entries, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Words that say true or false, where one of the two is wanted."""


def truth(value: Any) -> Any:
    """True or False where ``value`` says one of them, and otherwise ``value`` itself."""
    return TRUTH.get(value.casefold(), value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """The same without ``Written`` numbers, as other libraries take it."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return float(value) if isinstance(value, Written) else value
