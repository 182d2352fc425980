"""``open_samples``: folders, tables, shards and recipes, and the message for each that cannot be used."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.utils import disable_progress_bars

from vitshrink.config.options import CompressConfig, DataConfig
from vitshrink.data import BadSamples, Kind, Preprocessor, SampleSet, decode_image, open_samples
from vitshrink.errors import DataError, UsageError
from vitshrink.jobs.compress import compress
from vitshrink.jobs.evaluate import evaluate_checkpoint

disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Arrow copies of shards go to a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


def labels(samples: SampleSet) -> list[object]:
    return [sample.label for sample in samples.samples]


def texts(samples: SampleSet) -> list[str | None]:
    return [sample.text for sample in samples.samples]


# Folders of images


def test_class_folders(class_images: Path) -> None:
    samples = open_samples(class_images, "image")
    assert (len(samples), samples.labels_are, samples.label_names) == (32, "names", list(tiny.IMAGE_CLASSES))
    assert samples.samples[0].label == "bird"
    assert samples.samples[0].key.startswith("bird/")
    assert samples.source == str(class_images)


def test_a_flat_folder_has_no_labels(flat_images: Path) -> None:
    samples = open_samples(str(flat_images), "image")
    assert (len(samples), samples.labels_are, samples.label_names) == (24, None, None)


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "cat", 2)
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "cat" / "._cover.jpg").write_bytes(b"x")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "README.md").write_text("x")
    samples = open_samples(tmp_path, "image")
    assert (len(samples), samples.label_names) == (2, ["cat"])


def test_empty_class_folders_shift_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tiny.write_images(tmp_path / "b", 2)
    samples = open_samples(tmp_path, "image")
    assert (samples.label_names, set(labels(samples))) == (["a", "b"], {"b"})


def test_images_below_a_class_folder_belong_to_it_and_links_are_followed(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "elsewhere" / "deeper", 2)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    assert labels(open_samples(tmp_path / "set", "image")) == ["cat", "cat"]


def test_a_split_is_a_folder_above_the_classes(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "train" / "cat", 3)
    tiny.write_images(tmp_path / "val" / "cat", 2)
    assert len(open_samples(tmp_path, "image", split="train")) == 3
    assert len(open_samples(tmp_path, "image", split="validation")) == 2
    assert len(open_samples(f"{tmp_path}:val", "image")) == 2
    with pytest.raises(DataError, match=r"splits train, val: choose one, such as .*:val"):
        open_samples(tmp_path, "image")
    with pytest.raises(DataError, match=r"no folder for the split 'vale'.*Did you mean 'val'.*train, val"):
        open_samples(tmp_path, "image", split="vale")


def test_the_only_split_is_taken_and_a_class_may_be_called_like_one(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "a" / "val" / "cat", 2)
    assert labels(open_samples(tmp_path / "a", "image")) == ["cat", "cat"]
    for name in ("bus", "train"):
        tiny.write_images(tmp_path / "b" / name, 1)
    assert labels(open_samples(tmp_path / "b", "image")) == ["bus", "train"]


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "cat", 1)
    tiny.write_images(tmp_path, 1)
    with pytest.raises(DataError, match="beside folders of images"):
        open_samples(tmp_path, "image")


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        open_samples(tmp_path, "image")
    (tmp_path / "x.tsv").write_text("text\nhello\n")
    with pytest.raises(DataError, match=r"pass one file of text\. There are: x\.tsv"):
        open_samples(tmp_path, "text")


def test_a_flat_folder_with_a_list_of_labels(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "val", 3)
    (tmp_path / "synsets.txt").write_text("n01440764\nn02102040\nn01440764\n")
    recipe = tmp_path / "val.yaml"
    recipe.write_text("kind: image\npath: val\nlabels: synsets.txt\n")
    samples = open_samples(recipe, "image")
    assert labels(samples) == ["n01440764", "n02102040", "n01440764"]
    assert samples.label_names == ["n01440764", "n02102040"]
    (tmp_path / "synsets.txt").write_text("n01440764\n")
    with pytest.raises(DataError, match="has 1 lines for the 3 images"):
        open_samples(recipe, "image")


SERVICE = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "@eaDir/photo.jpg", "$RECYCLE.BIN", ".cache/deep/er")


@pytest.mark.parametrize("depth", ["", "cat", "cat/tabby"])
def test_hidden_and_service_folders_are_left_out_at_every_depth_and_counted(tmp_path: Path, depth: str) -> None:
    tiny.write_images(tmp_path / "cat" / "tabby", 3)
    for name in SERVICE:
        tiny.write_images(tmp_path / depth / name, 2)
    (tmp_path / depth / "._x.PNG").write_bytes(b"Mac OS X")
    (tmp_path / depth / "Thumbs.db").write_bytes(b"x")
    samples = open_samples(tmp_path, "image")
    assert (len(samples), samples.label_names) == (3, ["cat"])
    folders, files = samples.notes
    assert "12 images in hidden or service folders were left out" in folders
    assert all(name.partition("/")[0] in folders for name in SERVICE)
    assert files.endswith("1 hidden files were left out (._x.PNG).")


def test_what_was_left_out_is_told_where_the_job_ends(vit_directory: Path, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "images", 24)
    tiny.write_images(tmp_path / "images" / "@eaDir", 5)
    config = CompressConfig(
        str(vit_directory),
        str(tmp_path / "out"),
        calibration=str(tmp_path / "images"),
        keep=(0.8,),
        samples=8,
        holdout=8,
        method="svd",
    )
    (result,) = compress(config)
    assert [w for w in result.report.warnings if "5 images in hidden or service folders" in w and "@eaDir" in w]


def test_images_of_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "cat", 1)
    for name in ("a.HEIC", "b.heic", "c.svg", "notes.txt", "Makefile"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    (tmp_path / "cat" / "000.png").rename(tmp_path / "cat" / "000.JFIF")
    samples = open_samples(tmp_path, "image")
    assert len(samples) == 1
    assert samples.notes == (f"{tmp_path}: 3 images of other kinds were left out (.heic, .svg): convert them.",)


def test_links_are_followed_once_and_circles_are_survived(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tiny.write_images(tmp_path / "elsewhere", 2)
    tiny.write_images(tmp_path / "elsewhere" / "deeper", 1)
    tiny.write_images(data / "cat", 1)
    tiny.write_images(data / "dog", 1)
    (data / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "cat" / "again").symlink_to(tmp_path / "elsewhere")
    (data / "cat" / "deeper").symlink_to(tmp_path / "elsewhere" / "deeper")
    (data / "cat" / "other class").symlink_to(data / "dog")
    (data / "cat" / "self").symlink_to("self")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    for number, target in enumerate((data / "cat", data, tmp_path, Path("/"))):
        (data / "cat" / f"circle {number}").symlink_to(target)
    samples = open_samples(data, "image")
    assert labels(samples) == ["cat"] * 4 + ["dog"]
    assert len({sample.key for sample in samples.samples}) == 5
    assert "links to folders that are also read elsewhere were skipped" in samples.notes[0]


def test_a_folder_called_images_is_no_class(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "a" / "Images", 2)
    (tmp_path / "a" / "annotations").mkdir()
    assert open_samples(tmp_path / "a", "image").labels_are is None
    tiny.write_images(tmp_path / "b" / "images" / "VAL" / "cat", 2)
    assert labels(open_samples(f"{tmp_path / 'b'}:validation", "image")) == ["cat", "cat"]
    tiny.write_images(tmp_path / "c" / "images", 1)
    tiny.write_images(tmp_path / "c" / "sketches", 1)
    assert labels(open_samples(tmp_path / "c", "image")) == ["images", "sketches"]


def test_a_folder_without_images_beside_splits_makes_no_classes_of_them(tmp_path: Path) -> None:
    for split in ("train", "val"):
        tiny.write_images(tmp_path / split / "cat", 1)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="has the splits train, val"):
        open_samples(tmp_path, "image")
    tiny.write_images(tmp_path, 1)
    with pytest.raises(DataError, match="beside folders of images"):
        open_samples(tmp_path, "image")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_images(tmp_path / "cat", 1)
    (tmp_path / "cat" / "locked").mkdir()
    scandir = os.scandir  # tests may run as root, whom no permission stops

    def locked(path: str | Path) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match=r"locked cannot be read \(Permission denied\)"):
        open_samples(tmp_path, "image")


def write_metadata(file: Path, rows: list[dict[str, object]]) -> None:
    table = pd.DataFrame(rows)
    match file.suffix:
        case ".csv":
            table.to_csv(file, index=False)
        case ".jsonl":
            table.to_json(file, orient="records", lines=True)
        case ".parquet":
            table.to_parquet(file)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_of_a_metadata_file(tmp_path: Path, suffix: str) -> None:
    tiny.write_images(tmp_path / "images", 3)
    rows: list[dict[str, object]] = [
        {"file_name": f"images/{number:03}.png", "text": "a film", "label": name}
        for number, name in enumerate(("cat", "dog", "cat"))
    ]
    write_metadata(tmp_path / f"metadata{suffix}", rows[::-1])
    samples = open_samples(tmp_path, "image")
    assert (labels(samples), samples.label_names, samples.notes) == (["cat", "dog", "cat"], ["cat", "dog"], ())
    write_metadata(tmp_path / f"metadata{suffix}", [*rows[:2], {"file_name": "gone.png", "label": "cat"}])
    samples = open_samples(tmp_path, "image")
    assert labels(samples) == ["cat", "dog", None]
    assert [note for note in samples.notes if "1 images are not in" in note and "002.png" in note]


def test_metadata_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        tiny.write_images(tmp_path / split, 2)
    for number, split in enumerate(("train", "test")):
        rows = [{"file_name": f"{n:03}.png", "class": number + n} for n in range(2)]
        write_metadata(tmp_path / split / "metadata.csv", rows)  # type: ignore[arg-type]
    samples = open_samples(f"{tmp_path}:test", "image")
    assert (labels(samples), samples.labels_are) == ([1, 2], "integers")
    for split in ("train", "test"):
        (tmp_path / split / "metadata.csv").unlink()
    rows = [
        {"file_name": f"{split}/00{n}.png", "label": split, "score": n} for split in ("train", "test") for n in (0, 1)
    ]
    write_metadata(tmp_path / "metadata.jsonl", rows)
    samples = open_samples(f"{tmp_path}:test", "image", label_column="label")
    assert (labels(samples), samples.notes) == (["test", "test"], ())


def test_metadata_without_labels_leave_class_folders_and_say_why_a_flat_folder_has_none(tmp_path: Path) -> None:
    for folder in ("flat", "classes/cat"):
        tiny.write_images(tmp_path / folder, 1)
        write_metadata(tmp_path / folder / "metadata.csv", [{"file_name": "000.png", "caption": "a cat"}])
    assert labels(open_samples(tmp_path / "classes", "image")) == ["cat"]
    flat = open_samples(tmp_path / "flat", "image")
    assert flat.labels_are is None
    assert "metadata.csv: no column looks like the label. Give --label-column. Columns: file_name, caption." in str(
        flat.unlabeled
    )
    assert labels(open_samples(tmp_path / "flat", "image", label_column="caption")) == ["a cat"]
    (tmp_path / "flat" / "metadata.csv").write_text("name,size\nx,1\n")
    assert "was not read: it has no column file_name (name, size)" in open_samples(tmp_path / "flat", "image").notes[0]


def test_a_table_beside_a_flat_folder_is_pointed_out(vit_directory: Path, tmp_path: Path) -> None:
    tiny.write_images(tmp_path, 4)
    (tmp_path / "labels.csv").write_text("image,label\n")
    found = evaluate_checkpoint(str(vit_directory), DataConfig(str(tmp_path)), baseline=str(vit_directory))
    assert "If labels.csv contains labels, pass it with --labels." in found.warnings[0]


# Tables


def test_quotation_marks_in_a_tsv_eat_no_rows(tmp_path: Path) -> None:
    lines = ['a "quoted word', "it 's", 'the " end', '""', "plain"]
    (tmp_path / "x.tsv").write_text("sentence\tlabel\n" + "".join(f"{line}\t{n % 2}\n" for n, line in enumerate(lines)))
    samples = open_samples(tmp_path / "x.tsv", "text")
    assert texts(samples) == lines
    assert (labels(samples), samples.labels_are) == ([0, 1, 0, 1, 0], "integers")
    assert samples.samples[2].key == "row 3"


def test_a_csv_may_quote_commas_and_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], ["a, b\nc", "Sci/Tech"], ["d", "World"]])
    samples = open_samples(file, "text")
    assert texts(samples) == ["a, b\nc", "d"]
    assert (labels(samples), samples.labels_are, samples.label_names) == (
        ["Sci/Tech", "World"],
        "names",
        ["Sci/Tech", "World"],
    )


@pytest.mark.parametrize(
    "header", ["premise\thypothesis\tlabel", "sentence1;sentence2;label", "question,sentence,label"]
)
def test_pairs_are_found_by_their_usual_names(tmp_path: Path, header: str) -> None:
    delimiter = next(character for character in "\t;," if character in header)
    (tmp_path / "x.csv").write_text(f"{header}\n{delimiter.join(['a', 'b', '1'])}\n")
    sample = open_samples(tmp_path / "x.csv", "text").samples[0]
    assert (sample.text, sample.text_pair, sample.label) == ("a", "b", 1)


def test_naming_the_text_alone_means_no_pair(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("premise,hypothesis,label\na,b,1\n")
    sample = open_samples(tmp_path / "x.csv", "text", text_column="hypothesis").samples[0]
    assert (sample.text, sample.text_pair) == ("b", None)


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "a", "score": 2}, {"score": 3.5, "text": "b"}, {"text": "c"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    samples = open_samples(tmp_path / "x.jsonl", "text")
    assert (texts(samples), labels(samples), samples.labels_are) == (["a", "b", "c"], [2.0, 3.5, None], "scores")


def test_running_text_is_one_sample_a_line_without_the_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(" \n = Title = \n\nbody\n", encoding="utf-8-sig")
    samples = open_samples(tmp_path / "x.txt", "text")
    assert (texts(samples), samples.labels_are) == (["= Title =", "body"], None)


FORMATS = ("csv", "json", "jsonl", "parquet")


def write_column(file: Path, values: list[object]) -> Path:
    """A table of texts with this column of labels, written as pandas does."""
    table = pd.DataFrame({"text": [f"text {number}" for number in range(len(values))], "label": values})
    match file.suffix:
        case ".csv":
            table.to_csv(file)
        case ".json":
            table.to_json(file)
        case ".jsonl":
            table.to_json(file, orient="records", lines=True)
        case ".parquet":
            table.to_parquet(file)
    return file


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("values", "expected", "labels_are"),
    [
        ([1.0, 0.0], [1, 0], "integers"),
        ([1.0, None, 0.0], [1, None, 0], "integers"),
        (["1", "0", "nan"], [1, 0, None], "integers"),
        ([0.5, 3.0], [0.5, 3.0], "scores"),
        (["0.5", " ", "3"], [0.5, None, 3.0], "scores"),
        (["1_0", "2_0"], ["1_0", "2_0"], "names"),
        ([" World", "nan", "1"], ["World", "nan", "1"], "names"),
    ],
)
def test_labels_are_the_same_whatever_the_format(
    tmp_path: Path, name: str, values: list[object], expected: list[object], labels_are: str
) -> None:
    samples = open_samples(write_column(tmp_path / f"x.{name}", values), "text")
    assert (labels(samples), samples.labels_are) == (expected, labels_are)
    assert samples.label_names == (sorted(map(str, expected)) if labels_are == "names" else None)


def test_a_table_of_image_paths(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "images", 2)
    names = sorted(file.name for file in (tmp_path / "images").iterdir())
    (tmp_path / "x.csv").write_text("image,label\n" + "".join(f"images/{name},cat\n" for name in names))
    samples = open_samples(tmp_path / "x.csv", "image")
    assert samples.samples[0].image is not None
    assert decode_image(samples.samples[0].image).mode == "RGB"
    assert labels(samples) == ["cat", "cat"]


def test_rows_without_an_image_are_bad_samples_that_say_where_it_was_looked_for(
    tmp_path: Path, vit_directory: Path
) -> None:
    tiny.write_images(tmp_path / "images", 1)
    (tmp_path / "x.csv").write_text("image,label\nimages/000.png,cat\n ,cat\n000.png,cat\n")
    preprocessor = Preprocessor.from_checkpoint(vit_directory, "image", offline=True)
    bad = BadSamples(limit=2)
    samples = open_samples(tmp_path / "x.csv", "image")
    assert sum(len(batch.keys) for batch in preprocessor.batches(samples, 4, bad=bad)) == 1
    assert bad.reasons == {
        "row 2": "has no image",
        "row 3": f"cannot be read (there is no file {tmp_path / '000.png'})",
    }
    (tmp_path / "x.json").write_text('[{"image": {"bytes": "", "path": "000.png"}}]')
    with pytest.raises(DataError, match="row 1: column 'image' contains a dict, not text"):
        open_samples(tmp_path / "x.json", "image")


def test_a_table_without_header_by_a_recipe(tmp_path: Path) -> None:
    rows = ['news\tf\t2012\t1\t5.000\ta "b\tc', "news\tf\t2012\t2\t2.5\td\te\tlicense\tsource"]
    (tmp_path / "sts.csv").write_text("\n".join(rows) + "\n")
    recipe = tmp_path / "sts.yaml"
    recipe.write_text(
        "kind: text\npath: sts.csv\nheader: false\ndelimiter: tab\nquoting: none\nsamples: 1\n"
        "columns: [genre, file, year, id, score, sentence1, sentence2]\n"
    )
    samples = open_samples(recipe, "text")
    assert [(s.text, s.text_pair, s.label) for s in samples.samples] == [('a "b', "c", 5.0), ("d", "e", 2.5)]
    assert samples.recipe is not None
    assert (samples.labels_are, samples.recipe.samples) == ("scores", 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.csv",
            "body,label\na,1\n",
            r"no column looks like the text.*--text-column.*a recipe that names.*body, label",
        ),
        ("x.csv", "text,sentence,label\na,b,1\n", "text and sentence could each be the text"),
        ("x.csv", "text,label,score\na,1,2\n", "label and score could each be the label"),
        ("x.csv", "text,label\na,1\nb\n", "row 2: 1 fields, but 2"),
        ("x.csv", 'text,label\n"a,1\n', "cannot be read as a table"),
        ("x.csv", "", "is empty"),
        ("x.csv", "text,label\n", "contains no samples"),
        ("x.txt", "\n \n", "contains no samples"),
        ("x.jsonl", "", "is empty"),
        ("x.jsonl", '{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("x.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("x.docx", "PK", "not a data file that vitshrink can read"),
    ],
)
def test_tables_that_cannot_be_used_are_explained(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_samples(tmp_path / name, "text")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(b"text\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(DataError, match=r"x\.tsv, line 2: not UTF-8 .*iconv"):
        open_samples(tmp_path / "x.tsv", "text")


def test_a_column_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na,1\n")
    with pytest.raises(DataError, match=r"no column 'lable'.*Did you mean 'label'.*text, label"):
        open_samples(tmp_path / "x.csv", "text", label_column="lable")


# Shards


@pytest.fixture
def shards(tmp_path: Path, class_images: Path) -> Path:
    """A folder as written by `datasets`: two splits of images with class names."""
    features = Features({"picture": Image(), "label": ClassLabel(names=["cat", "dog"])})
    files = sorted((class_images / "cat").iterdir())
    for split, count in (("train", 4), ("validation", 3)):
        rows = {
            "picture": [{"bytes": file.read_bytes(), "path": None} for file in files[:count]],
            "label": [n % 2 for n in range(count)],
        }
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(path)
    return tmp_path / "set"


def test_a_folder_of_parquet_shards(shards: Path, class_images: Path) -> None:
    samples = open_samples(shards, "image", split="validation")
    assert (len(samples), samples.label_names, samples.labels_are) == (3, ["cat", "dog"], "names")
    assert labels(samples) == [0, 1, 0]
    originals = open_samples(class_images / "cat", "image")
    assert samples.digests == originals.digests[:3]
    with pytest.raises(DataError, match=r"splits train, validation: choose one, such as .*:validation"):
        open_samples(shards, "image")
    with pytest.raises(DataError, match=r"no split 'validatoin'\. Did you mean 'validation'"):
        open_samples(shards, "image", split="validatoin")


def test_a_shard_that_was_replaced_is_read_anew_though_it_kept_its_time(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    seen = []
    for words in (["one", "two"], ["six", "ten"]):
        pq.write_table(pa.table({"text": words}), file, compression="none")
        os.utime(file, (0, 0))
        seen.append((texts(open_samples(file, "text")), file.stat().st_size))
    (first, size), (second, same) = seen
    assert (first, second, size) == (["one", "two"], ["six", "ten"], same)


def test_a_single_shard_and_a_plain_parquet_file(shards: Path, tmp_path: Path, flat_images: Path) -> None:
    assert len(open_samples(shards / "data" / "train-00000-of-00001.parquet", "image")) == 4
    content = next(flat_images.iterdir()).read_bytes()
    table = pa.table({"image": [{"bytes": content, "path": None}, None], "label": [3, 0]})
    pq.write_table(table, tmp_path / "plain.parquet")
    samples = open_samples(tmp_path / "plain.parquet", "image")
    assert (labels(samples), samples.labels_are, samples.label_names) == ([3, 0], "integers", None)
    assert samples.samples[0].image is not None
    assert decode_image(samples.samples[0].image).mode == "RGB"


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for lines in (["a", "b"], ["c", "d"], ["c", "e"]):
        Dataset.from_dict({"text": lines}).to_parquet(tmp_path / "x.parquet")
        assert texts(open_samples(tmp_path / "x.parquet", "text")) == lines
        assert texts(open_samples(tmp_path, "text")) == lines


def test_webdataset_shards(tmp_path: Path, flat_images: Path) -> None:
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for number, file in enumerate(sorted(flat_images.iterdir())[:3]):
            for suffix, content in (("png", file.read_bytes()), ("cls", str(number).encode())):
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    for path in (tmp_path, tmp_path / "shard-0.tar"):
        samples = open_samples(path, "image")
        assert (labels(samples), samples.labels_are) == ([0, 1, 2], "integers")
        assert samples.digests == open_samples(flat_images, "image").digests[:3]


def test_blank_rows_of_unlabeled_text_are_no_samples(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["", "a", " ", "b"]}).to_parquet(tmp_path / "x.parquet")
    samples = open_samples(tmp_path / "x.parquet", "text")
    assert [(s.key, s.text) for s in samples.samples] == [("row 2", "a"), ("row 4", "b")]


@pytest.mark.parametrize(
    ("feature", "values", "labels_are"),
    [
        (Value("float32"), [0.5, 3.0], "scores"),
        (Value("int8"), [0, 1], "integers"),
        (Value("bool"), [False, True], "integers"),
        (Value("string"), ["x", "y"], "names"),
        (ClassLabel(names=["x", "y"]), [0, -1], "names"),
    ],
)
def test_the_type_of_the_label_column_decides(
    tmp_path: Path, feature: object, values: list[object], labels_are: str
) -> None:
    features = Features({"text": Value("string"), "label": feature})
    Dataset.from_dict({"text": ["a", "b"], "label": values}, features=features).to_parquet(tmp_path / "x.parquet")
    samples = open_samples(tmp_path / "x.parquet", "text")
    assert (samples.labels_are, labels(samples)) == (labels_are, values)


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [("number", "text", "contains .*int64.*, not text"), ("number", "image", "contains .*int64.*, not images")],
)
def test_columns_that_hold_something_else_are_refused(tmp_path: Path, column: str, kind: Kind, message: str) -> None:
    Dataset.from_dict({"number": [1, 2]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        open_samples(tmp_path / "x.parquet", kind, **{f"{kind}_column": column})  # type: ignore[arg-type]


def test_an_archive_beside_its_unpacked_images_is_passed_over(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "val" / "cat", 2)
    (tmp_path / "val.tar").write_bytes(b"")
    assert len(open_samples(tmp_path, "image", split="val")) == 2


def test_a_picture_beside_shards_is_passed_over(shards: Path) -> None:
    tiny.write_images(shards / "assets", 1)
    assert len(open_samples(shards, "image", split="train")) == 4


def test_lists_of_labels_are_read_and_lists_of_lists_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b"], "labels": [[1, 2], []]}).to_parquet(tmp_path / "x.parquet")
    samples = open_samples(tmp_path / "x.parquet", "text")
    assert (samples.labels_are, labels(samples)) == ("lists", [(1, 2), ()])
    Dataset.from_dict({"text": ["a"], "labels": [[[1], [2]]]}).to_parquet(tmp_path / "y.parquet")
    with pytest.raises(DataError, match="not a class, a score or a list of them"):
        open_samples(tmp_path / "y.parquet", "text")


@pytest.mark.parametrize("name", ["x.parquet", "x.tar"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_damaged_shards_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        open_samples(tmp_path / name, "image")


# Names


def test_a_path_that_does_not_exist_brings_its_neighbors(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"no file or folder .*Did you mean 'images'"):
        open_samples(tmp_path / "imags", "image")
    with pytest.raises(DataError, match=r"no file or folder missing\.csv"):
        open_samples("missing.csv", "text")


def test_a_recipe_of_the_other_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="recipe sst2 is of the kind text, but image"):
        open_samples("sst2", "image")


def test_a_folder_called_like_a_recipe_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_images(tmp_path / "imagenette", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"write \./imagenette for the file or folder"):
        open_samples("imagenette", "image")
    assert len(open_samples("./imagenette", "image")) == 1


def test_a_recipe_whose_data_are_missing_says_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: text\npath: gone.txt\n")
    with pytest.raises(DataError, match=r"recipe mine reads .*gone\.txt, which does not exist"):
        open_samples(tmp_path / "mine.yaml", "text")


def test_two_different_splits_are_refused() -> None:
    with pytest.raises(UsageError, match="give one"):
        open_samples("owner/name:train", "image", split="test")


def test_a_file_has_no_splits_but_its_name_may_have_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:b.txt").write_text("hello\n")
    assert len(open_samples(tmp_path / "a:b.txt", "text")) == 1
    with pytest.raises(UsageError, match="is one file and has no splits"):
        open_samples(tmp_path / "a:b.txt", "text", split="train")


def test_a_recipe_takes_another_split() -> None:
    with pytest.raises(DataError, match="nyu-mll/glue/sst2:train is not a local path, and the local cache"):
        open_samples("sst2:train", "text")


# Real material


@pytest.mark.real
def test_real_sets_are_read_whole(real_folder: Path, tmp_path: Path) -> None:
    text = real_folder / "text"
    sst2 = open_samples(text / "sst2" / "test.tsv", "text")
    assert (len(sst2), sst2.labels_are) == (872, "integers")
    assert len(open_samples(text / "sst2" / "train.tsv", "text")) == 60614
    recipe = tmp_path / "sts.yaml"
    recipe.write_text(
        f"kind: text\npath: {text / 'stsb' / 'sts-test.csv'}\nheader: false\ndelimiter: tab\nquoting: none\n"
        "columns: [genre, file, year, id, score, sentence1, sentence2]\n"
    )
    sts = open_samples(recipe, "text")
    assert (len(sts), sts.labels_are, sts.samples[0].text_pair) == (1379, "scores", "A girl is brushing her hair.")
    images = open_samples(real_folder / "imagenet-val", "image")
    assert (len(images), len(images.label_names or [])) == (650, 469)
    assert len(open_samples(real_folder / "imagenette", "image", split="val")) == 400
    assert len(open_samples(real_folder / "imagenet-unlabelled", "image")) == 500
