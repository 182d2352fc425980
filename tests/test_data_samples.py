"""Selection by seed, fingerprints and overlaps."""

from pathlib import Path

import pytest
import tiny

from vitshrink.data import Sample, SampleSet, open_samples, overlap
from vitshrink.errors import DataError, UsageError


def texts(*lines: str) -> SampleSet:
    return SampleSet("lines", "text", [Sample(f"row {number}", text=line) for number, line in enumerate(lines, 1)])


ALPHABET = texts(*"abcdefghij")


def letters(samples: SampleSet) -> str:
    return "".join(str(sample.text) for sample in samples.samples)


def test_a_seed_gives_the_same_order_and_another_seed_another() -> None:
    assert letters(ALPHABET.select(10, 0)) == letters(ALPHABET.select(10, 0))
    assert letters(ALPHABET.select(10, 0)) != letters(ALPHABET.select(10, 1))
    assert sorted(letters(ALPHABET.select(10, 1))) == sorted(letters(ALPHABET))


def test_disjoint_ranges_of_one_seed_are_disjoint() -> None:
    parts = [ALPHABET.select(4, 3), ALPHABET.select(4, 3, skip=4), ALPHABET.select(None, 3, skip=8)]
    assert sorted("".join(map(letters, parts))) == sorted(letters(ALPHABET))


def test_all_keep_the_order_of_the_source() -> None:
    assert letters(ALPHABET.select(None, 5)) == "abcdefghij"


def test_more_than_there_are_gives_all() -> None:
    assert len(ALPHABET.select(99, 0)) == 10


@pytest.mark.parametrize(("count", "skip"), [(0, 0), (-1, 0), (1, -1)])
def test_senseless_counts_are_refused(count: int, skip: int) -> None:
    with pytest.raises(UsageError, match="at least"):
        ALPHABET.select(count, 0, skip)


def test_nothing_left_is_refused() -> None:
    with pytest.raises(DataError, match="no sample is left"):
        ALPHABET.select(1, 0, skip=10)


def test_the_fingerprint_follows_the_content_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        tiny.write_images(folder, 3)
    assert open_samples(first, "image").fingerprint() == open_samples(second, "image").fingerprint()
    next(second.iterdir()).write_bytes(b"other")
    assert open_samples(first, "image").fingerprint() != open_samples(second, "image").fingerprint()


def test_texts_and_pairs_have_different_fingerprints() -> None:
    pair = SampleSet("pair", "text", [Sample("row 1", text="a", text_pair="b")])
    assert len({texts("a").fingerprint(), texts("ab").fingerprint(), pair.fingerprint()}) == 3


def test_overlap_counts_equal_contents_under_other_names(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "calibration", 4)
    evaluation = tmp_path / "evaluation" / "class"
    evaluation.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "calibration").iterdir())[:3]):
        (evaluation / f"renamed-{number}.png").write_bytes(file.read_bytes())
    a, b = open_samples(tmp_path / "calibration", "image"), open_samples(tmp_path / "evaluation", "image")
    assert (overlap(a, b), overlap(b, a), overlap(a, a)) == (3, 3, 4)
    assert overlap(texts("x"), texts("y")) == 0


def test_unreadable_files_are_fingerprinted_all_the_same(tmp_path: Path) -> None:
    tiny.write_images(tmp_path, 2)
    samples = open_samples(tmp_path, "image")
    next(tmp_path.iterdir()).unlink()
    assert len(samples.fingerprint()) == 64
