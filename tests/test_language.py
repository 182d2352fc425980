"""The project is written in American English."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("vitshrink", "docs", "benchmarks", "tests", "examples", "calibration")
ENDINGS = {".py", ".md", ".html", ".yaml", ".yml", ".sh", ".toml"}
STEMS = (
    *("quantis", "optimis", "factoris", "normalis", "initialis", "minimis", "maximis", "recognis", "generalis"),
    *("summaris", "randomis", "utilis", "organis", "specialis", "parametris", "vectoris", "tokenis", "regularis"),
    *("synchronis", "localis", "visualis", "serialis", "behaviour", "colour", "neighbour", "favour", "honour"),
    *("licence", "defence", "centred", "centre", "catalogue", "whilst", "labelled", "labelling", "modelling"),
    *("levelled", "judgement", "learnt", "artefact", "grey"),
)
BRITISH = re.compile("|".join(STEMS), re.IGNORECASE)
NAMES = re.compile(r"imagenet-unlabelled|LICENCE\*")
"""What others named: a data set, and a file beside weights."""


def texts() -> list[Path]:
    inside = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*")]
    files = [file for file in (*inside, *ROOT.glob("*")) if file.suffix in ENDINGS and file.is_file()]
    return [file for file in files if "fixtures" not in file.parts and file != Path(__file__)]


def test_the_spelling_is_american() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match[0]}"
        for file in texts()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        for match in [BRITISH.search(NAMES.sub("", line))]
        if match
    ]
    assert not found, "\n".join(found)
    assert len(texts()) > 300  # the folders are where they were
