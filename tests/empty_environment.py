"""An environment that holds a wheel and what it declares that it needs, and nothing else. Made without a network."""

import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed_by(requirements: list[str]) -> set[str]:
    """The names of the distributions that these requirements bring, with all that those need."""
    found, ahead = set[tuple[str, frozenset[str]]](), [(Requirement(each), {""}) for each in requirements]
    while ahead:
        requirement, extras = ahead.pop()
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in found:
            found.add(key)
            needs = distribution(requirement.name).requires or []
            ahead += [(Requirement(each), {"", *requirement.extras}) for each in needs]
    return {name for name, _ in found}


def install(wheel: Path, requirements: list[str], folder: Path) -> Path:
    """The interpreter of a new environment with ``wheel`` in it, and links to what ``requirements`` bring."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(sysconfig.get_paths()["purelib"])
    for name in needed_by(requirements):
        tops = {file.parts[0] for file in distribution(name).files or []} - {"..", "__pycache__"}
        for top in tops:
            if (here / top).exists() and not (site / top).exists():
                (site / top).symlink_to(here / top)
    return python


def _run(*command: str | Path) -> None:
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
