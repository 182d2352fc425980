"""Labels as people write them, in columns of many names."""

from typing import Any

from .oddity import oddity
from .table import Table

CLASSIFIERS = ("SequenceClassification",)


def _column(table: Table, name: str) -> None:
    if table.labels is not None:
        table.labels = name


@oddity(Table, slot="label column", only=CLASSIFIERS)
def column_target(table: Table) -> None:
    _column(table, "target")


@oddity(Table, slot="label column", only=CLASSIFIERS)
def column_class(table: Table) -> None:
    _column(table, "class")


@oddity(Table, slot="label column", only=CLASSIFIERS)
def column_with_a_blank(table: Table) -> None:
    _column(table, " label")


@oddity(Table, slot="label column", only=CLASSIFIERS)
def column_in_capitals(table: Table) -> None:
    _column(table, "Label")


@oddity(Table, slot="label column", only=CLASSIFIERS, outcome="works")
def column_labels(table: Table) -> None:
    _column(table, "labels")


@oddity(Table, slot="label column", only=CLASSIFIERS, outcome="works")
def column_named_by_a_flag(table: Table) -> None:
    _column(table, "What is it? [red]")
    table.flags += ["--label-column", "What is it? [red]"]


@oddity(Table, slot="label column", only=CLASSIFIERS, outcome="refused", commands=("eval", "compress-eval"))
def column_that_is_missing(table: Table) -> None:
    table.flags += ["--label-column", "not there"]


@oddity(Table, slot="more columns")
def two_columns_of_labels(table: Table) -> None:
    table.extra["fine_label"] = 1


@oddity(Table, slot="more columns", outcome="works")
def column_of_numbers(table: Table) -> None:
    table.extra["idx"] = 7


@oddity(Table, slot="more columns")
def column_without_a_name(table: Table) -> None:
    table.extra[""] = 3


@oddity(Table, slot="spelling", only=CLASSIFIERS, outcome="works")
def labels_are_indices(table: Table) -> None:
    table.spell = lambda index, _name: index


@oddity(Table, slot="spelling", only=CLASSIFIERS)
def labels_are_floats(table: Table) -> None:
    table.spell = lambda index, _name: float(index)


@oddity(Table, slot="spelling", only=CLASSIFIERS)
def labels_are_booleans(table: Table) -> None:
    table.spell = lambda index, _name: bool(index)
    table.sure = False


@oddity(Table, slot="spelling", only=CLASSIFIERS)
def labels_are_placeholders(table: Table) -> None:
    table.spell = lambda index, _name: f"LABEL_{index}"


@oddity(Table, slot="spelling", only=CLASSIFIERS, outcome="works")
def labels_in_capitals(table: Table) -> None:
    table.spell = lambda _index, name: name.upper()


@oddity(Table, slot="spelling", only=CLASSIFIERS)
def labels_count_from_one(table: Table) -> None:
    table.spell = lambda index, _name: index + 1
    table.sure = False


@oddity(Table, slot="spelling", only=CLASSIFIERS)
def labels_are_lists(table: Table) -> None:
    table.spell = lambda index, _name: [index]


@oddity(Table, slot="spelling", only=CLASSIFIERS)
def labels_of_others(table: Table) -> None:
    table.spell = lambda index, _name: f"thing {index}"


def _first(table: Table, value: Any) -> None:
    def change(records: list[dict[str, Any]]) -> None:
        if table.labels is not None:
            records[0][table.labels] = value

    table.sure = False
    table.changes.append(change)


@oddity(Table, slot="one label", only=CLASSIFIERS)
def a_label_missing(table: Table) -> None:
    _first(table, None)


@oddity(Table, slot="one label", only=CLASSIFIERS)
def a_label_is_nan(table: Table) -> None:
    table.spell = lambda index, _name: index
    _first(table, float("nan"))


@oddity(Table, slot="one label", only=CLASSIFIERS)
def a_label_is_minus_one(table: Table) -> None:
    table.spell = lambda index, _name: index
    _first(table, -1)


@oddity(Table, slot="one label", only=CLASSIFIERS, outcome="refused", commands=("eval", "compress-eval"))
def a_label_out_of_range(table: Table) -> None:
    table.spell = lambda index, _name: index
    _first(table, 10**9)


@oddity(Table, slot="one label", only=CLASSIFIERS)
def a_label_of_many_digits(table: Table) -> None:
    table.spell = lambda index, _name: index
    _first(table, 10**30)


@oddity(Table, slot="all labels", only=CLASSIFIERS)
def all_labels_missing(table: Table) -> None:
    table.spell = lambda _index, _name: None
    table.sure = False


@oddity(Table, slot="all labels", only=CLASSIFIERS)
def no_column_of_labels(table: Table) -> None:
    table.labels = None
