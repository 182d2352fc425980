"""Tables of text: their dialects, suffixes and encodings, what a recipe says of them, and their columns of labels."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset, DatasetDict
from datasets.utils import disable_progress_bars
from typer.testing import CliRunner

from vitshrink.cli.app import app
from vitshrink.data import BadSamples, Preprocessor, SampleSet, open_samples
from vitshrink.errors import DataError, UsageError

disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Arrow copies of shards go to a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


def contents(samples: SampleSet) -> list[tuple[object, object]]:
    return [(sample.text, sample.label) for sample in samples.samples]


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


# Recipes


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("1\thello\n0\tit, and so on\n", "header: false\ndelimiter: tab\ncolumns: [label, text]"),
        ("1\thello\n0\tit, and so on\n", "header: false\ncolumns: [label, text]"),
        ("label|text\n1|hello\n0|it, and so on\n", "delimiter: pipe"),
        ("label;text\n1;hello\n0;it, and so on\n", "header: true"),
        ('label,text\n1,"hello"\n0,"it, and so on"\n', "quoting: minimal"),
    ],
)
def test_a_recipe_makes_a_table_of_a_txt_file(tmp_path: Path, text: str, keys: str) -> None:
    write(tmp_path / "t.txt", text)
    recipe = write(tmp_path / "t.yaml", f"kind: text\npath: t.txt\n{keys}\n")
    assert contents(open_samples(recipe, "text")) == [("hello", 1), ("it, and so on", 0)]


def test_a_recipe_may_say_that_running_text_has_no_header(tmp_path: Path) -> None:
    write(tmp_path / "t.txt", "one, two\nthree\n")
    recipe = write(tmp_path / "t.yaml", "kind: text\npath: t.txt\nheader: false\n")
    assert contents(open_samples(recipe, "text")) == [("one, two", None), ("three", None)]


SOURCES = {
    "t.txt": {"delimiter", "header", "columns", "quoting"},
    "t.csv": {"delimiter", "header", "columns", "quoting"},
    "t.jsonl": set(),
    "t.json": set(),
    "t.parquet": set(),
    "saved": {"split"},
    "shards": {"split", "config"},
}
KEYS = {
    "config": "config: other",
    "split": "split: train",
    "labels": "labels: names.txt",
    "delimiter": "delimiter: comma",
    "header": "header: false",
    "columns": "header: false\ncolumns: [text]",
    "quoting": "quoting: none",
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_key_of_a_recipe_is_honored_or_refused_by_name(tmp_path: Path, source: str, key: str) -> None:
    table = Dataset.from_dict({"text": ["hello"]})
    match source:
        case "t.json" | "t.jsonl":
            write(tmp_path / source, '{"text": "hello"}\n')
        case "t.parquet":
            table.to_parquet(tmp_path / source)
        case "saved":
            DatasetDict({"train": table}).save_to_disk(tmp_path / source)
        case "shards":
            (tmp_path / source).mkdir()
            table.to_parquet(tmp_path / source / "train-0.parquet")
            table.map(lambda _: {"text": "another"}).to_parquet(tmp_path / source / "another-0.parquet")
            configs = "".join(
                f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}-*.parquet\n"
                for name, path in (("first", "another"), ("other", "train"))
            )
            (tmp_path / source / "README.md").write_text(f"---\nconfigs:\n{configs if key == 'config' else ''}---\n")
        case _:
            write(tmp_path / source, "text\nhello\n")
    recipe = write(tmp_path / "r.yaml", f"kind: text\npath: {source}\n{KEYS[key]}\n")
    if key in SOURCES[source]:
        assert open_samples(recipe, "text").samples[-1].text == "hello"
    else:
        with pytest.raises(
            (UsageError, DataError), match=rf"names\.txt|`{key}`|splits" if key != "columns" else "`h|`c"
        ):
            open_samples(recipe, "text")


@pytest.mark.parametrize("key", ["delimiter", "header", "quoting"])
def test_keys_of_tables_are_refused_for_folders_of_images_and_for_the_hub(tmp_path: Path, key: str) -> None:
    tiny.write_images(tmp_path / "images", 1)
    for source in ("path: images", "id: owner/name"):
        recipe = write(tmp_path / "r.yaml", f"kind: image\n{source}\n{KEYS[key]}\n")
        with pytest.raises(UsageError, match=f"recipe r has `{key}`, which is for tables"):
            open_samples(recipe, "image")
    recipe = write(tmp_path / "r.yaml", "kind: image\nid: owner/name\nlabels: names.txt\n")
    with pytest.raises(UsageError, match=r"names\.txt.* is for a flat folder"):
        open_samples(recipe, "image")


@pytest.mark.parametrize(("kind", "column"), [("image", "text_column"), ("text", "image_column")])
def test_columns_of_the_other_kind_are_refused_in_a_recipe(tmp_path: Path, kind: str, column: str) -> None:
    recipe = write(tmp_path / "r.yaml", f"kind: {kind}\npath: x.csv\n{column}: a\n")
    with pytest.raises(UsageError, match=f"`{column}` cannot be used with the kind {kind}"):
        open_samples(recipe, "text")


def test_a_txt_file_that_looks_like_a_table_is_told_of(tmp_path: Path) -> None:
    samples = open_samples(write(tmp_path / "t.txt", "1\thello\n0\tbye\n"), "text")
    assert contents(samples)[0] == ("1\thello", None)
    assert "every line contains a tab" in samples.notes[0]
    assert "recipe" in samples.notes[0]


# Dialects


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_the_delimiter_is_found(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [("text", "label"), ("so, it is; a film | of that", "1"), ("not bad", "0")]
    lines = [delimiter.join(f'"{field}"' if delimiter in field else field for field in row) for row in rows]
    samples = open_samples(write(tmp_path / name, "\n".join(lines) + "\n"), "text")
    assert contents(samples) == [("so, it is; a film | of that", 1), ("not bad", 0)]


def test_the_delimiter_that_fits_all_lines_goes_before_one_in_the_header(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", "text;label, of two\na, b, c;1\nd;0\n")
    assert contents(open_samples(file, "text", label_column="label, of two")) == [("a, b, c", 1), ("d", 0)]


def test_tabs_with_all_names_quoted_are_read_with_quoting(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", '"text"\t"label"\n"so ""it"" is\ta film"\t"1"\n')
    assert contents(open_samples(file, "text")) == [('so "it" is\ta film', 1)]


def test_a_delimiter_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"comma or semicolon could divide its lines\. Choose one with `delimiter` in a recipe"
    ):
        open_samples(write(tmp_path / "x.csv", "text,label;id\na,1;2\n"), "text")


def test_one_column_of_sentences_is_not_divided(tmp_path: Path) -> None:
    for name in ("x.csv", "x.tsv"):
        content = 'review\n"so, it is"\n"a; b, c"\n' if name == "x.csv" else "review\nso, it is\na; b, c\n"
        samples = open_samples(write(tmp_path / name, content), "text")
        assert [sample.text for sample in samples.samples] == ["so, it is", "a; b, c"]


# Columns of labels


@pytest.mark.parametrize(
    "column",
    ["label", " label", "Label", "LABELS", "target", "class", "Class Name", "category", "y", "sentiment", "gold"],
)
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_labels_are_found_by_their_usual_names(tmp_path: Path, name: str, column: str) -> None:
    table = pd.DataFrame({"Text": ["a", "b"], column: [1, 0]})
    file = tmp_path / name
    if name == "x.csv":
        table.to_csv(file, encoding="utf-8-sig")  # with pandas' index, which has no name, and a byte order mark
    elif name == "x.jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        table.to_parquet(file)
    samples = open_samples(file, "text")
    assert contents(samples) == [("a", 1), ("b", 0)]
    assert samples.unlabeled is None


def test_names_that_only_may_be_labels_make_way_for_those_that_are(tmp_path: Path) -> None:
    samples = open_samples(write(tmp_path / "x.csv", "text,category,label\na,film,1\n"), "text")
    assert contents(samples) == [("a", 1)]
    samples = open_samples(write(tmp_path / "x.csv", "text,category,class\na,film,1\n"), "text")
    assert samples.labels_are is None
    assert "class and category could each be the label. Give --label-column." in str(samples.unlabeled)


def test_an_evaluation_without_labels_says_which_columns_there_are(bert_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "x.csv", "text,verdict\na,1\nb,0\n")
    arguments = ["eval", str(bert_directory), "--baseline", str(bert_directory), "--data", str(tmp_path / "x.csv")]
    run = CliRunner().invoke(app, [*arguments, "--json"])
    assert run.exit_code == 0, run.output
    (warning, *_) = json.loads(run.stdout)["warnings"]
    assert (
        "used without labels: no column looks like the label. Give --label-column. Columns: text, verdict." in warning
    )
    named = CliRunner().invoke(app, [*arguments, "--json", "--label-column", "verdict"])
    assert not any("label" in warning for warning in json.loads(named.stdout)["warnings"])
    alone = CliRunner().invoke(app, ["eval", str(bert_directory), "--data", str(tmp_path / "x.csv"), "--json"])
    assert alone.exit_code == 2
    assert "there is no --baseline to compare with: no column looks like the label" in " ".join(alone.stderr.split())


def test_duplicate_columns_are_refused_where_one_is_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 2 columns with the name 'label': rename all but one"):
        open_samples(write(tmp_path / "x.csv", "text,label,label\na,1,0\n"), "text")
    assert contents(open_samples(write(tmp_path / "x.csv", "text,label,id,id\na,1,0,0\n"), "text")) == [("a", 1)]
    with pytest.raises(DataError, match=r"line 1: not JSON .'text' occurs twice"):
        open_samples(write(tmp_path / "x.jsonl", '{"text": "a", "text": "b"}\n'), "text")


# Suffixes


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("X.CSV", None),
        ("x.csv.gz", gzip.compress),
        ("x.tsv.GZ", gzip.compress),
        ("x.jsonl.gz", gzip.compress),
        ("x.csv.bz2", bz2.compress),
        ("x.csv.xz", lzma.compress),
    ],
)
def test_suffixes_in_capitals_and_of_compressed_files(tmp_path: Path, name: str, compress: object) -> None:
    content = {"j": '{"text": "a", "label": 1}\n', "t": "text\tlabel\na\t1\n"}.get(
        name[2], "text,label\na,1\n"
    ).encode()
    samples = open_samples(write(tmp_path / name, compress(content) if callable(compress) else content), "text")
    assert contents(samples) == [("a", 1)]


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    for content in (b"text", gzip.compress(b"text\na\n" * 100)[:30]):
        with pytest.raises(DataError, match=r"x\.csv\.gz: cannot be read"):
            open_samples(write(tmp_path / "x.csv.gz", content), "text")


@pytest.mark.parametrize("orient", ["records", "columns", "list", "lines"])
def test_every_form_of_json(tmp_path: Path, orient: str) -> None:
    table = pd.DataFrame({"text": ["a", "b"], "label": [1, 0]})
    file = tmp_path / "x.json"
    if orient == "list":
        file.write_text(json.dumps(table.to_dict("list")))
    else:
        table.to_json(file, orient="records" if orient == "lines" else orient, lines=orient == "lines")
    assert contents(open_samples(file, "text")) == [("a", 1), ("b", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "is empty"),
        ("{}", "is empty"),
        ('[{"text": "a"}, 3]', "row 2: expected a JSON object, not int"),
        ('{"text": ["a", "b"], "label": [1]}', "not a table: expected a list of objects"),
        ('"text"', "not a table"),
        ('[{"text": "a"', r"x\.json: not JSON .*line 1"),
        ("[" * 100_000, "not JSON"),
        ('{"text": "a"}\n{"text": }\n', "line 2: not JSON"),
        ('[{"text": ["a"]}]', "row 1: column 'text' contains a list, not text"),
        ('[{"text": "a", "label": [[1], 2]}]', "row 1: .* is not a class, a score or a list of them"),
    ],
)
def test_json_that_is_no_table_is_explained(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_samples(write(tmp_path / "x.json", content), "text")


# Contents


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize(("name", "content"), [("x.csv", "text,label\ncafé,1\n"), ("x.txt", "café\n")])
def test_a_byte_order_mark_says_the_encoding(tmp_path: Path, encoding: str, name: str, content: str) -> None:
    assert open_samples(write(tmp_path / name, content.encode(encoding)), "text").samples[0].text == "café"


@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\nb\ncafé\n".encode("latin-1"), r"line 3: not UTF-8 .*Save the file as UTF-8.*iconv"),
        ("text\nb\n".encode("utf-16-le"), "line 1: contains a NUL byte.*UTF-16"),
        (b"text\na\0b\n", "line 2: contains a NUL byte"),
    ],
)
def test_other_encodings_are_named_with_line_and_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=rf"{name}, {message}"):
        open_samples(write(tmp_path / name, content), "text")


def test_a_field_may_be_of_any_length(tmp_path: Path) -> None:
    text = "so it is, " * 100_000
    samples = open_samples(write(tmp_path / "x.csv", f'text,label\n"{text}",1\n'), "text")
    assert contents(samples) == [(text, 1)]


def test_fields_that_cannot_be_told_name_their_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.csv, line 3: cannot be read as a table.*quoting"):
        open_samples(write(tmp_path / "x.csv", 'text,label\na,1\n"b" c,0\n'), "text")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (r'{"text": "so \ud83d", "label": 1}', r"has half a character (\ud83d) in its text"),
        ('{"text": null, "label": 1}', "has no text"),
        ('{"text": NaN, "label": 1}', "has no text"),
        (r'{"text": " \n\t", "label": 1}', "has no text"),
    ],
)
def test_a_text_that_is_none_is_a_bad_sample(bert_directory: Path, tmp_path: Path, row: str, reason: str) -> None:
    good = '{"text": "it is good", "label": 0}'
    samples = open_samples(write(tmp_path / "x.jsonl", f"{good}\n{row}\n{good}\n"), "text")
    preprocessor = Preprocessor.from_checkpoint(bert_directory, "text", offline=True)
    bad = BadSamples(limit=1)
    assert sum(len(batch.keys) for batch in preprocessor.batches(samples, 2, bad=bad)) == 2
    assert bad.reasons == {"row 2": reason}
    with pytest.raises(DataError, match=r"row 2 has .*--max-bad-samples"):
        list(preprocessor.batches(samples, 2))


def test_a_very_long_text_is_cut(bert_directory: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", "text\n" + "a" * 1_000_000 + "\n")
    preprocessor = Preprocessor.from_checkpoint(bert_directory, "text", offline=True)
    (batch,) = preprocessor.batches(open_samples(file, "text"), 2)
    assert batch.truncated <= 1


# Arrow


@pytest.mark.parametrize("split", [None, "train"])
def test_folders_of_save_to_disk(tmp_path: Path, split: str | None) -> None:
    table = Dataset.from_dict({"text": ["a", "b"], "label": [1.0, 0.0]})
    if split is None:
        table.save_to_disk(tmp_path / "saved")
    else:
        DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "saved")
    samples = open_samples(tmp_path / "saved", "text", split=split)
    assert (contents(samples), samples.labels_are) == ([("a", 1), ("b", 0)], "integers")
    with pytest.raises(DataError, match="no split 'dev'.*train, test" if split else "without splits"):
        open_samples(f"{tmp_path / 'saved'}:dev", "text")
    if split:
        with pytest.raises(DataError, match="has the splits train, test: choose one"):
            open_samples(tmp_path / "saved", "text")


def test_folders_of_several_save_to_disk_are_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        Dataset.from_dict({"text": [split]}).save_to_disk(tmp_path / split)
    with pytest.raises(DataError, match="has the splits train, test: choose one"):
        open_samples(tmp_path, "text")
    assert contents(open_samples(f"{tmp_path}:test", "text")) == [("test", None)]


def test_a_parquet_file_with_a_column_twice_is_explained(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array([1]), pa.array([0])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "label", "label"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read .*label"):
        open_samples(tmp_path / "x.parquet", "text")


def test_a_damaged_folder_of_save_to_disk_is_named(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"garbage")
    with pytest.raises(DataError, match="saved: cannot be read"):
        open_samples(tmp_path / "saved", "text")


def test_a_shard_in_capitals_or_of_arrow(tmp_path: Path) -> None:
    table = Dataset.from_dict({"text": ["a"], "label": [1]})
    table.to_parquet(tmp_path / "X.PARQUET")
    table.save_to_disk(tmp_path / "saved")
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    for file in (tmp_path / "X.PARQUET", shard):
        assert contents(open_samples(file, "text")) == [("a", 1)]
