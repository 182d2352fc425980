"""The interface that docs/versions.md promises to keep: nothing of what is recorded may go away.

What is new is recorded by ``python tests/test_public_api.py``, before a release.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import vitshrink
from vitshrink import errors
from vitshrink.cli.app import app

RECORDED = Path(__file__).parent / "fixtures" / "interface.json"


def interface() -> dict[str, Any]:
    """Names and parameters of the package, flags of the commands."""
    found: dict[str, Any] = {"python": {}, "commands": {}}
    for name in vitshrink.__all__:
        entry = getattr(vitshrink, name)
        found["python"][name] = list(inspect.signature(entry).parameters) if callable(entry) else []
    found["python"] |= {f"errors.{name}": [] for name, entry in vars(errors).items() if inspect.isclass(entry)}
    group: Any = get_command(app)
    for name, command in group.commands.items():
        found["commands"][name] = sorted(flag for each in command.params for flag in [*each.opts, *each.secondary_opts])
    return found


@pytest.mark.parametrize("part", ["python", "commands"])
def test_nothing_that_was_public_is_gone(part: str) -> None:
    recorded, found = json.loads(RECORDED.read_text(encoding="utf-8"))[part], interface()[part]
    assert recorded.keys() <= found.keys()
    for name, entries in recorded.items():
        assert set(entries) <= set(found[name]), f"{name}: see docs/versions.md on how things go away"


def test_parameters_keep_their_places() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))["python"]
    for name, parameters in interface()["python"].items():
        assert parameters[: len(recorded.get(name, []))] == recorded.get(name, [])


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(interface(), indent=1) + "\n", encoding="utf-8")
