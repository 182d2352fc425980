"""Texts that are unusual."""

from typing import Any

from .oddity import oddity
from .table import Row, Table


@oddity(Table, outcome="works")
def long_text(table: Table) -> None:
    table.rows[1].text = "good film " * 2000


@oddity(Table)
def very_long_field(table: Table) -> None:
    table.rows[1].text = "good film " * 20_000


@oddity(Table, outcome="works")
def text_of_one_letter(table: Table) -> None:
    table.rows[1].text = "a"


@oddity(Table)
def lone_surrogate(table: Table) -> None:
    table.form, table.delimiter = "jsonl", ","
    table.rows[2].text = "film \ud83d good"
    table.rows[2].good = False
    table.sure = False


@oddity(Table)
def empty_rows(table: Table) -> None:
    def add(records: list[dict[str, Any]]) -> None:
        records[3:3] = [dict.fromkeys(records[0], "")]

    table.sure = False
    table.changes.append(add)


@oddity(Table)
def blank_text(table: Table) -> None:
    table.rows[4].text, table.rows[4].good = "   ", False
    table.sure = table.sure and table.labels is not None  # a blank line is no row where there is one column


@oddity(Table)
def missing_text(table: Table) -> None:
    table.rows[5].text, table.rows[5].good = None, False
    table.sure = table.sure and table.form != "txt"


@oddity(Table)
def all_texts_blank(table: Table) -> None:
    for row in table.rows:
        row.text, row.good = " ", False


@oddity(Table)
def quotation_marks(table: Table) -> None:
    table.rows[1].text = 'a "good" film, it is'
    table.rows[2].text = '"unpaired'


@oddity(Table)
def line_within_a_text(table: Table) -> None:
    table.rows[1].text = "good\nfilm"
    table.sure = table.sure and table.form not in ("txt", "tsv")


@oddity(Table)
def tab_within_a_text(table: Table) -> None:
    table.rows[1].text = "good\tfilm"


@oddity(Table, outcome="works")
def duplicate_rows(table: Table) -> None:
    table.rows += [Row(table.rows[0].text) for _ in range(5)]


@oddity(Table)
def one_row(table: Table) -> None:
    del table.rows[1:]


@oddity(Table, outcome="works")
def other_scripts(table: Table) -> None:
    table.rows[0].text = "Фильм 映画 فيلم 🙂👩‍👩‍👧"
    table.rows[1].text = "\u202egood\u202c \u200b e\u0301"


@oddity(Table)
def control_characters(table: Table) -> None:
    table.rows[0].text = "good \x1b[31m film \x07\x08"


@oddity(Table, outcome="works")
def special_tokens_in_texts(table: Table) -> None:
    table.rows[0].text = "[CLS] good [SEP] [MASK] [PAD] film"


@oddity(Table, outcome="works")
def texts_of_unknown_words(table: Table) -> None:
    table.rows[0].text = "€ ¥ ☃"


@oddity(Table)
def numbers_as_texts(table: Table) -> None:
    table.form, table.delimiter = "jsonl", ","
    table.rows[0].text = "7"
    table.changes.append(lambda records: records[0].update(text=7) if "text" in records[0] else None)


@oddity(Table)
def lists_as_texts(table: Table) -> None:
    table.form, table.delimiter = "jsonl", ","
    table.sure = False
    table.changes.append(lambda records: records[0].update(text=["a", "b"]) if "text" in records[0] else None)


@oddity(Table)
def pairs(table: Table) -> None:
    table.paired = True
    for row in table.rows:
        row.pair = f"it is {row.text[:10] if row.text else 'so'}"
    table.sure = False


@oddity(Table)
def a_second_text_missing(table: Table) -> None:
    pairs_of(table)
    table.rows[2].pair = None


def pairs_of(table: Table) -> None:
    table.paired, table.sure = True, False
    for row in table.rows:
        row.pair = "it is so"


@oddity(Table)
def header_of_a_bad_row(table: Table) -> None:
    def add(records: list[dict[str, Any]]) -> None:
        records[6]["surplus"] = "x"

    table.sure = False
    table.changes.append(add)
