"""Labels against the classes of a model: matched by meaning, by value where that is all there is, or refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from vitshrink.data import Sample, SampleSet, align_labels, open_samples
from vitshrink.data.labels import imagenet_classes, read_class_map
from vitshrink.data.samples import Label, LabelsAre
from vitshrink.errors import DataError

IMAGENET = list(imagenet_classes())
IMAGENET_NAMES = list(imagenet_classes().values())


def labeled(labels: Sequence[Label], labels_are: LabelsAre | None, names: list[str] | None = None) -> SampleSet:
    samples = [Sample(f"row {number}", text="x", label=label) for number, label in enumerate(labels, 1)]
    return SampleSet("set", "text", samples, names, labels_are)


def folders(*names: str) -> SampleSet:
    return labeled(names, "names", sorted(names))


def placeholders(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}


# By name


def test_names_are_matched_whatever_their_order_case_and_punctuation() -> None:
    model = {0: "Sci/Tech", 1: "world news", 2: "SPORTS"}
    mapping, rule = align_labels(folders("World_News", "sci-tech", "Sports"), model, 3)
    assert mapping == {"World_News": 1, "sci-tech": 0, "Sports": 2}
    assert rule == "class names; 3 of 3 classes occur"


def test_one_synonym_is_enough() -> None:
    mapping, _ = align_labels(folders("tench", "car, automobile"), {0: "automobile", 1: "Tinca tinca, tench"}, 2)
    assert mapping == {"tench": 1, "car, automobile": 0}


def test_the_full_name_goes_before_a_synonym() -> None:
    model = {0: "missile", 1: "projectile, missile"}
    assert align_labels(folders("missile", "projectile, missile"), model, 2)[0] == {
        "missile": 0,
        "projectile, missile": 1,
    }


def test_class_label_names_in_another_order_are_permuted_back() -> None:
    samples = labeled([0, 1, 2], "names", ["entailment", "neutral", "contradiction"])
    model = {0: "contradiction", 1: "entailment", 2: "neutral"}
    assert align_labels(samples, model, 3)[0] == {0: 1, 1: 2, 2: 0}


def test_equal_names_in_the_same_order_are_told_apart_by_position() -> None:
    samples = labeled([134, 517], "names", IMAGENET_NAMES)
    assert IMAGENET_NAMES[134] == IMAGENET_NAMES[517] == "crane"
    mapping, rule = align_labels(samples, dict(enumerate(IMAGENET_NAMES)), 1000)
    assert mapping == {134: 134, 517: 517}
    assert "2 of 1000 classes occur" in rule


def test_classes_without_samples_need_no_match() -> None:
    samples = labeled([0], "names", ["cat", "unicorn"])
    assert align_labels(samples, {0: "dog", 1: "cat"}, 2)[0] == {0: 1}


@pytest.mark.parametrize(
    ("names", "model", "message"),
    [
        (
            ["cat", "unicorn"],
            ["dog", "cat"],
            " has the label 'unicorn', which is not one of the model's.*'dog', 'cat'.*--class-map",
        ),
        (["crane", "dog"], ["crane", "crane", "dog"], "'crane', which could be 'crane', 'crane'"),
        (["tabby", "tabby cat"], ["tabby, tabby cat", "dog"], "both look like"),
        (
            ["entailment", "neutral", "contradiction"],
            ["LABEL_0", "LABEL_1", "LABEL_2"],
            "they cannot be matched",
        ),
        (["negative", "positive"], ["LABEL_0", "LABEL_1"], "--class-map"),
    ],
)
def test_names_that_fit_nowhere_are_refused(names: list[str], model: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        align_labels(folders(*names), dict(enumerate(model)), len(model))
    with pytest.raises(DataError, match=message):
        align_labels(labeled(range(len(names)), "names", names), dict(enumerate(model)), len(model))


# WordNet ids


def test_some_of_the_thousand_folders_keep_the_standard_indices() -> None:
    mapping, rule = align_labels(folders(IMAGENET[3], IMAGENET[998]), dict(enumerate(IMAGENET_NAMES)), 1000)
    assert mapping == {IMAGENET[3]: 3, IMAGENET[998]: 998}
    assert "standard order" in rule


@pytest.mark.parametrize("model", [placeholders(1000), dict(enumerate(IMAGENET))])
def test_the_standard_order_holds_for_models_with_placeholders_or_ids(model: dict[int, str]) -> None:
    assert align_labels(folders(IMAGENET[7], IMAGENET[500]), model, 1000)[0] == {IMAGENET[7]: 7, IMAGENET[500]: 500}


def test_a_model_with_another_order_of_the_thousand_is_matched_by_name() -> None:
    mapping, rule = align_labels(folders(IMAGENET[0], IMAGENET[9]), dict(enumerate(IMAGENET_NAMES[::-1])), 1000)
    assert mapping == {IMAGENET[0]: 999, IMAGENET[9]: 990}
    assert rule.startswith("names of the WordNet ids")


def test_few_classes_are_matched_by_the_names_of_the_ids() -> None:
    model = {0: "parachute", 1: "tench", 2: "church"}
    mapping, _ = align_labels(folders("n01440764", "n03028079", "n03888257"), model, 3)
    assert mapping == {"n01440764": 1, "n03028079": 2, "n03888257": 0}


def test_ids_that_cannot_be_placed_are_refused() -> None:
    with pytest.raises(DataError, match="10 without names"):
        align_labels(folders("n01440764"), placeholders(10), 10)
    with pytest.raises(DataError, match="not among the 1000 classes"):
        align_labels(folders("n00000000"), dict(enumerate(IMAGENET_NAMES)), 1000)
    with pytest.raises(DataError, match=r"'n01440764' \(tench, Tinca tinca\), which is not one of the model's"):
        align_labels(folders("n01440764"), {0: "dog", 1: "cat"}, 2)


# By value


def test_integer_folders_go_by_value_not_by_string_order() -> None:
    mapping, rule = align_labels(folders("10", "2", "0"), {i: f"class {i}" for i in range(11)}, 11)
    assert mapping == {"10": 10, "2": 2, "0": 0}
    assert "by value" in rule


def test_integer_names_of_the_model_go_by_name() -> None:
    assert align_labels(folders("0", "1"), {0: "1", 1: "0"}, 2)[0] == {"0": 1, "1": 0}


def test_integers_without_names_go_by_value_and_the_rule_says_so() -> None:
    mapping, rule = align_labels(labeled([1, 0, 1], "integers"), {0: "negative", 1: "positive"}, 2)
    assert mapping == {0: 0, 1: 1}
    assert "no class names to check" in rule


def test_truth_values_are_zero_and_one() -> None:
    assert align_labels(labeled([True, False], "integers"), placeholders(2), 2)[0] == {True: 1, False: 0}


def test_one_class_is_allowed_and_said() -> None:
    assert align_labels(labeled([1, 1], "integers"), placeholders(3), 3)[1].endswith("1 of 3 classes occur")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (labeled([0, 1, 2], "integers"), "row 3 has the label '2', class 2, but the model has the classes 0 to 1"),
        (folders("0", "7"), "label '7', class 7"),
        (labeled([-1, -1], "integers"), "every label is -1.*use a labeled split"),
        (labeled([0, -1], "names", ["a", "b"]), r"row 2 has no label \(-1\)"),
        (labeled([None, "a"], "names"), r"row 1 has no label \(None\)"),
        (labeled([0, 5], "names", ["a", "b"]), "row 2 has the label 5, but there are 2 class names"),
        (labeled([0.5], "scores"), "scores, not classes"),
        (labeled([None], None), "has no labels"),
    ],
)
def test_labels_that_cannot_be_classes_are_refused(samples: SampleSet, message: str) -> None:
    with pytest.raises(DataError, match=message):
        align_labels(samples, placeholders(2), 2)


def test_integers_go_by_name_where_the_classes_are_called_by_other_numbers() -> None:
    stars = {index: str(index + 1) for index in range(5)}
    mapping, rule = align_labels(labeled([1, 5], "integers"), stars, 5)
    assert mapping == {1: 0, 5: 4}
    assert rule.startswith("class names, which are numbers")
    with pytest.raises(DataError, match=r"labels '1', '4' could be class indices, or the names.*--class-map"):
        align_labels(labeled([1, 4], "integers"), stars, 5)
    with pytest.raises(DataError, match="'6', which is not one of the model's"):
        align_labels(labeled([1, 6], "integers"), stars, 5)


@pytest.mark.parametrize("names", [("LABEL_1", "LABEL_0"), ("label 1", "label 0")])
def test_the_names_of_a_model_without_names_are_its_own(names: tuple[str, ...]) -> None:
    expected = dict(zip(names, (1, 0), strict=True))
    assert align_labels(folders(*names), placeholders(3), 3) == (expected, "class names; 2 of 3 classes occur")
    with pytest.raises(DataError, match="'LABEL_7', which is not one of the model's"):
        align_labels(folders("LABEL_0", "LABEL_7"), placeholders(3), 3)


@pytest.mark.parametrize("model", [placeholders(2), {0: "negative", 1: "positive"}])
def test_truth_values_by_name_are_zero_and_one(model: dict[int, str]) -> None:
    mapping, rule = align_labels(folders("False", "true"), model, 2)
    assert mapping == {"False": 0, "true": 1}
    assert rule.startswith("truth values")
    assert align_labels(folders("False", "true"), {0: "True", 1: "False"}, 2)[0] == {"False": 1, "true": 0}


def test_numbers_of_a_stream_are_classes_where_they_are_whole() -> None:
    assert align_labels(labeled([1.0, 0.0], "scores"), placeholders(2), 2)[0] == {1.0: 1, 0.0: 0}


# Class maps


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.tsv", "great cat\t1\ndog\t0\n"),
        ("map.csv", '"great cat",1\ndog,0\n'),
        ("map.txt", "great cat 1\ndog 0\n"),
        ("map.txt", "dog\ngreat cat\n"),
        ("map.json", json.dumps({"great cat": 1, "dog": 0})),
        ("map.json", json.dumps({"0": "dog", "1": "great cat"})),
        ("map.json", json.dumps(["dog", "great cat"])),
    ],
)
def test_every_form_of_a_class_map(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_class_map(tmp_path / name) == {"great cat": 1, "dog": 0}
    mapping, rule = align_labels(folders("Great_Cat", "dog"), placeholders(2), 2, class_map=tmp_path / name)
    assert mapping == {"Great_Cat": 1, "dog": 0}
    assert name in rule


def test_lists_of_wordnet_ids(tmp_path: Path) -> None:
    (tmp_path / "synsets.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert read_class_map(tmp_path / "synsets.txt") == {"n01440764": 0, "n01443537": 1}
    (tmp_path / "index.json").write_text(json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}))
    table = read_class_map(tmp_path / "index.json")
    assert (table["n01440764"], table["goldfish"]) == (0, 1)


def test_a_class_map_renumbers_integers(tmp_path: Path) -> None:
    (tmp_path / "map.tsv").write_text("1\t0\n2\t1\n")
    assert align_labels(labeled([1, 2], "integers"), placeholders(2), 2, tmp_path / "map.tsv")[0] == {1: 0, 2: 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("map.tsv", "cat\t0\n", "has no entry for 'dog'"),
        ("map.tsv", "cat\t0\ndog\t9\n", "class 9, but the model has the classes 0 to 1"),
        ("map.tsv", "cat\t0\ncat\t1\n", "gives 'cat' two classes, 0 and 1"),
        ("map.tsv", "", "is empty"),
        ("map.txt", "490\n361\n", "numbers without names"),
        ("map.json", "{", "cannot read the class map"),
        ("map.json", "3", "cannot read the class map"),
        ("map.json", '{"a": "b"}', "cannot read the class map"),
    ],
)
def test_class_maps_that_do_not_fit_are_explained(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        align_labels(folders("cat", "dog"), placeholders(2), 2, class_map=tmp_path / name)


def test_a_missing_class_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the class map .*gone\.json"):
        read_class_map(tmp_path / "gone.json")


# The shipped classes


def test_the_thousand_classes_are_sorted_and_named() -> None:
    assert len(IMAGENET) == 1000
    assert sorted(IMAGENET) == IMAGENET
    assert all(IMAGENET_NAMES)


@pytest.mark.real
def test_real_folders(real_folder: Path) -> None:
    def id2label(name: str) -> dict[int, str]:
        config = json.loads((real_folder / name / "config.json").read_text())
        return {int(index): label for index, label in config["id2label"].items()}

    validation = open_samples(real_folder / "imagenet-val", "image")
    mapping, rule = align_labels(validation, id2label("deit-tiny"), 1000)
    assert all(IMAGENET[index] == wnid for wnid, index in mapping.items())
    assert "469 of 1000 classes occur" in rule
    imagenette = open_samples(real_folder / "imagenette" / "val", "image")
    mapping, _ = align_labels(imagenette, id2label("deit-tiny-imagenette"), 10)
    assert list(mapping.items()) == [(wnid, index) for index, wnid in enumerate(sorted(map(str, mapping)))]
