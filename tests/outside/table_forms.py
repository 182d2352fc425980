"""Tables in unusual files: forms, delimiters, encodings, folders and recipes."""

import tarfile
from pathlib import Path

from .oddity import oddity
from .table import Table


def _form(table: Table, form: str, delimiter: str = ",") -> None:
    table.form, table.delimiter = form, delimiter


@oddity(Table, slot="form", outcome="works")
def tabs(table: Table) -> None:
    _form(table, "tsv", "\t")


@oddity(Table, slot="form", outcome="works")
def semicolons(table: Table) -> None:
    _form(table, "csv", ";")


@oddity(Table, slot="form")
def pipes(table: Table) -> None:
    _form(table, "csv", "|")


@oddity(Table, slot="form", outcome="works")
def tabs_in_csv(table: Table) -> None:
    _form(table, "csv", "\t")


@oddity(Table, slot="form")
def capital_suffix(table: Table) -> None:
    table.name = "DATA.CSV"


@oddity(Table, slot="form")
def gzipped(table: Table) -> None:
    table.compressed = True


@oddity(Table, slot="form")
def one_json_document(table: Table) -> None:
    _form(table, "json")


@oddity(Table, slot="form", outcome="works")
def json_lines(table: Table) -> None:
    _form(table, "jsonl")


@oddity(Table, slot="form", outcome="works")
def parquet(table: Table) -> None:
    _form(table, "parquet")


@oddity(Table, slot="form")
def plain_text(table: Table) -> None:
    _form(table, "txt")
    table.labels = None


@oddity(Table, slot="form", outcome="refused")
def unknown_suffix(table: Table) -> None:
    table.name = "data.xlsx"


@oddity(Table, slot="form", outcome="refused")
def no_suffix(table: Table) -> None:
    table.name = "data"


@oddity(Table, slot="form")
def saved_to_disk(table: Table) -> None:
    def save(file: Path) -> Path:
        import datasets

        table_of_all = datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parent / "cache"))
        table_of_all.save_to_disk(file.parent / "saved")
        file.unlink()
        return file.parent / "saved"

    _form(table, "parquet")
    table.files.append(save)


@oddity(Table, slot="form", outcome="works")
def folder_of_parquet(table: Table) -> None:
    def move(file: Path) -> Path:
        (file.parent / "shards" / "data").mkdir(parents=True)
        file.rename(file.parent / "shards" / "data" / "train-00000-of-00001.parquet")
        return file.parent / "shards"

    _form(table, "parquet")
    table.files.append(move)


@oddity(Table, slot="form", outcome="refused")
def archive(table: Table) -> None:
    def pack(file: Path) -> Path:
        with tarfile.open(file.parent / "data.tar.gz", "w:gz") as packed:
            packed.add(file, file.name)
        return file.parent / "data.tar.gz"

    table.files.append(pack)


@oddity(Table, slot="form")
def folder_of_a_table(table: Table) -> None:
    table.files.append(lambda file: file.parent)


@oddity(Table, slot="form", outcome="works")
def recipe(table: Table) -> None:
    def write(file: Path) -> Path:
        lines = ["kind: text", f"path: {file.name}", "text_column: text", "samples: 5", "seed: 3"]
        lines += [f"label_column: {table.labels}"] if table.labels else []
        (file.parent / "recipe.yaml").write_text("\n".join(lines))
        return file.parent / "recipe.yaml"

    table.files.append(write)


@oddity(Table, slot="form")
def recipe_of_a_text_without_header(table: Table) -> None:
    def write(file: Path) -> Path:
        content = file.read_bytes().decode(table.encoding).splitlines()[1:]
        (file.parent / "rows.txt").write_bytes("\n".join(content).encode(table.encoding))
        columns = ["text", *table.extra, *([table.labels] if table.labels else [])]
        lines = ["kind: text", "path: rows.txt", "delimiter: tab", "header: false", f"columns: [{', '.join(columns)}]"]
        (file.parent / "recipe.yaml").write_text("\n".join(lines))
        return file.parent / "recipe.yaml"

    _form(table, "tsv", "\t")
    table.files.append(write)


@oddity(Table, slot="encoding", outcome="works")
def byte_order_mark(table: Table) -> None:
    table.encoding = "utf-8-sig"


@oddity(Table, slot="encoding")
def utf16(table: Table) -> None:
    table.encoding = "utf-16"


@oddity(Table, slot="encoding")
def latin1(table: Table) -> None:
    table.encoding = "latin-1"
    table.rows[3].text = "the film is a cliché"


@oddity(Table, slot="newline", outcome="works")
def windows_lines(table: Table) -> None:
    table.newline = "\r\n"


@oddity(Table, slot="newline")
def old_mac_lines(table: Table) -> None:
    table.newline = "\r"


@oddity(Table, slot="end", outcome="works")
def no_last_newline(table: Table) -> None:
    def cut(file: Path) -> Path:
        if table.form in ("csv", "tsv", "txt", "jsonl") and not table.compressed and file.is_file():
            file.write_bytes(file.read_bytes().rstrip(b"\r\n"))
        return file

    table.files.insert(0, cut)


@oddity(Table, slot="end")
def half_written(table: Table) -> None:
    def cut(file: Path) -> Path:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return file

    table.sure = False
    table.files.insert(0, cut)


@oddity(Table, slot="end", outcome="refused")
def empty_file(table: Table) -> None:
    def cut(file: Path) -> Path:
        file.write_bytes(b"")
        return file

    table.files.insert(0, cut)


@oddity(Table, slot="end")
def zero_byte_within(table: Table) -> None:
    table.rows[2].text = "good\0film"


@oddity(Table, slot="link", outcome="works")
def linked_file(table: Table) -> None:
    def link(file: Path) -> Path:
        (file.parent / "links").mkdir()
        target = file.parent / "links" / file.name
        target.symlink_to(file)
        return target

    table.files.append(link)
