"""Labels of a flat folder: every form that such files come in, and those that fit no image."""

from pathlib import Path

import pytest
import tiny

from vitshrink.data import align_labels, open_samples
from vitshrink.data.ground_truth import read_ground_truth
from vitshrink.data.labels import imagenet_classes, read_class_map
from vitshrink.errors import DataError, UsageError

IMAGES = ["a.png", "b.png", "c d.png"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("order.txt", "cat\ndog\ncat\n"),
        ("tabs.tsv", "b.png\tdog\nc d.png\tcat\na.png\tcat\nelsewhere.png\tbird\n"),
        ("commas.csv", "ImageId,PredictionString\na,cat\nb,dog\nc d,cat\n"),
        ("folders.csv", 'val/a.png,"cat"\nval/b.png,dog\nval/c d.png,cat\n'),
        ("pipes.txt", "a.png|cat\nb.png|dog\nc d.png|cat\n"),
        ("columns.csv", 'file_name,Label,text\na.png,cat,"a, b"\nb.png,dog,\nc d.png,"cat",x\n'),
        ("columns.tsv", "class\tpath\ncat\tval/a.png\ndog\tval/b.png\ncat\tval/c d.png\n"),
        (
            "rows.jsonl",
            "".join(
                f'{{"file_name": "{n}.png", "label": "{c}"}}\n' for n, c in (("a", "cat"), ("b", "dog"), ("c d", "cat"))
            ),
        ),
        ("object.json", '{"a.png": "cat", "val/b.png": "dog", "c d.png": "cat"}'),
    ],
)
def test_every_form_of_a_list_of_labels(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_ground_truth(tmp_path / name, IMAGES) == ["cat", "dog", "cat"]


def test_the_boxes_of_a_solution_file_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "LOC_val_solution.csv"
    file.write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000002,n01443537 1 2 3 4 n01443537 5 6 7 8\n"
        "ILSVRC2012_val_00000001,n01440764 85 1 499 272 \n"
    )
    images = ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    assert read_ground_truth(file, images) == ["n01440764", "n01443537"]


def test_a_part_of_the_numbered_images_takes_its_own_lines(tmp_path: Path) -> None:
    file = tmp_path / "ground_truth.txt"
    file.write_text("\n".join(f"{i}" for i in range(101, 151)))
    images = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (2, 7, 50)]
    assert read_ground_truth(file, images) == ["102", "107", "150"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"cat\ndog\n", "2 lines for the 3 images"),
        ("two.tsv", b"a.png\tcat\nb.png\tdog\n", r"no label for 1 of the 3 images: c d\.png"),
        ("list.json", b'["cat"]', "a JSON object"),
        ("bad.json", b"{", "cannot read the labels"),
        ("latin.txt", b"caf\xe9\n", "1 lines for the 3 images"),
    ],
)
def test_labels_that_do_not_fit_are_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_ground_truth(tmp_path / name, IMAGES)


def test_a_flat_folder_with_a_file_of_labels(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "val", 3)
    (tmp_path / "truth.txt").write_text("001.png n01443537\n000.png n01440764\n002.png n01440764\n")
    samples = open_samples(images, "image", labels=tmp_path / "truth.txt")
    assert [sample.label for sample in samples.samples] == ["n01440764", "n01443537", "n01440764"]
    classes, rule = align_labels(samples, {}, 1000)
    assert classes == {"n01440764": 0, "n01443537": 1}
    assert "WordNet" in rule


def test_labels_where_there_is_nothing_to_label_are_refused(tmp_path: Path, class_images: Path) -> None:
    (tmp_path / "truth.txt").write_text("cat\n")
    (tmp_path / "table.csv").write_text("image,label\na.png,cat\n")
    for source in (class_images, tmp_path / "table.csv"):
        with pytest.raises(UsageError, match=r"truth\.txt.* flat folder"):
            open_samples(source, "image", labels=tmp_path / "truth.txt")


def test_numbers_of_the_development_kit_by_its_own_table(tmp_path: Path) -> None:
    """A file of the form of meta.mat: the numbers are in an order of their own, and synsets that hold others follow."""
    scipy_io = pytest.importorskip("scipy.io")
    import numpy as np

    wnids = list(imagenet_classes())
    rows = [(n, wnid, "words", "gloss", 0) for n, wnid in enumerate(reversed(wnids), start=1)]
    rows.append((1001, "n00001740", "entity", "gloss", 3))
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object), ("children", object)]
    synsets = np.array(rows, dtype=kinds).reshape(-1, 1)
    scipy_io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    table = read_class_map(tmp_path / "meta.mat")
    assert len(table) == 1000
    assert (table["1"], table["1000"]) == (999, 0)
    images = tiny.write_images(tmp_path / "val", 2)
    (tmp_path / "truth.txt").write_text("1\n1000\n")
    samples = open_samples(images, "image", labels=tmp_path / "truth.txt")
    assert align_labels(samples, {}, 1000, tmp_path / "meta.mat")[0] == {"1": 999, "1000": 0}
    with pytest.raises(DataError, match=r"development kit.*meta\.mat"):
        align_labels(samples, {}, 1000)
    (tmp_path / "other.mat").write_bytes(b"MATLAB 5.0 no")
    with pytest.raises(DataError, match=r"other\.mat: not meta\.mat"):
        read_class_map(tmp_path / "other.mat")
