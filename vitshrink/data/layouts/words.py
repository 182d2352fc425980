"""Words, and a tag for each of them: for token classification."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitshrink.data.columns import Columns
from vitshrink.data.layouts.layout import Layout, listed, texts
from vitshrink.data.samples import Sample
from vitshrink.data.tables import Table
from vitshrink.data.text_files import read_text, text_suffix
from vitshrink.errors import DataError

_TAG = re.compile(r"O|[BIESLU]-\S+")


class Words(Layout):
    """A list of words a row and a list of their tags; or CoNLL files: a word a line, its tag last, blank lines between
    sentences."""

    labels_are = "tags"
    first = ("tokens", "words", "text", "sentence")
    labels = ("ner_tags", "tags", "labels", "label", "pos_tags", "upos", "ner", "chunk_tags")
    suffixes = (".conll", ".iob", ".iob2", ".bio")

    def table(self, path: Path) -> Table | None:
        """A CoNLL file, which may also be called ``.txt``."""
        suffix = text_suffix(path)
        if suffix not in (*self.suffixes, ".txt"):
            return None
        lines = [line.strip() for line in read_text(path).splitlines()]
        if suffix == ".txt" and not _is_conll(lines):
            return None
        return Table(["tokens", "tags"], list(_sentences(path, lines)))

    def sample(self, key: str, row: Mapping[str, Any], columns: Columns, names: Sequence[str] | None) -> Sample:
        assert columns.text is not None
        given = row[columns.text]
        if isinstance(given, str) and columns.label is None:  # running text, to calibrate on
            return Sample(key, text=given)
        words = texts(listed(given, columns.text), columns.text)
        if columns.label is None:
            return Sample(key, text=" ".join(words), words=words)
        tags = tuple(_tag(tag, names) for tag in listed(row[columns.label], columns.label))
        if len(words) != len(tags):
            raise ValueError(
                f"{len(words)} words in the column {columns.text!r} but {len(tags)} tags in {columns.label!r}: "
                "give one tag per word"
            )
        return Sample(key, text=" ".join(words), words=words, label=tags)


WORDS = Words()


def _tag(tag: Any, names: Sequence[str] | None) -> str | int:
    if isinstance(tag, bool) or not isinstance(tag, str | int):
        raise ValueError(f"the tag {str(tag)[:40]!r} is neither a name nor an index")
    if isinstance(tag, int) and names is not None:
        if not 0 <= tag < len(names):
            raise ValueError(f"the tag {tag} has no name: there are {len(names)}")
        return names[tag]
    return int(tag) if isinstance(tag, str) and tag.isdecimal() else tag


def _is_conll(lines: Sequence[str]) -> bool:
    """Whether all lines are of several fields, the last of which is a tag of IOB."""
    fields = [line.split() for line in lines if line and not line.startswith("-DOCSTART-")]
    return bool(fields) and all(len(each) > 1 and _TAG.fullmatch(each[-1]) for each in fields)


def _sentences(path: Path, lines: Sequence[str]) -> Iterator[list[list[str]]]:
    """Words and tags of each sentence. Raises DataError, which names the line."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.startswith("-DOCSTART-"):
            continue
        if line:
            fields = line.split("\t") if "\t" in line else line.split()
            if len(fields) < 2:
                raise DataError(
                    f"{path}, line {number}: {line[:40]!r} has no tag: write one word and its tag per line."
                )
            words.append(fields[0].strip())
            tags.append(fields[-1].strip())
        elif words:
            yield [words, tags]
            words, tags = [], []
