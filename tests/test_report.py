import base64
import copy
import html
import html.parser
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import schema_tables
import tiny
import yaml
from PIL import Image

from vitshrink import report as reports
from vitshrink.data import Sample, SampleSet
from vitshrink.errors import DataError
from vitshrink.evaluation.quality import Disagreement
from vitshrink.report import Report, drawing, figures, headline, summary_rows
from vitshrink.report.making import Environment
from vitshrink.report.wording import prepared
from vitshrink.runtime.records import plain

PLACES = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")


def layer(block: int, place: str) -> dict[str, Any]:
    outputs, inputs = {"mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}.get(place, (192, 192))
    rank = None if block == 0 and place == "attention.v_proj" else 24 + 6 * block + 20 * place.startswith("mlp")
    return {
        "name": f"vit.layers.{block}.{place}",
        "shape": [outputs, inputs],
        "rank": rank,
        "parameters": outputs * inputs if rank is None else rank * (outputs + inputs),
        "relative_error": 0.0 if rank is None else 0.4 - 0.02 * block,
        "reason": "the plan keeps this layer dense because that loses less" if rank is None else None,
    }


EVALUATION = {
    "task": "image-classification",
    "metric": "top1",
    "samples": 650,
    "dense": {"top1": 0.8138, "correct": 529, "interval": [0.782, 0.842], "top5": 0.95, "top5_interval": [0.93, 0.96]},
    "compressed": {"top1": 0.62, "correct": 403, "interval": [0.58, 0.656], "top5": 0.8, "top5_interval": [0.77, 0.83]},
    "fidelity": {"agreement": 0.68, "agreement_interval": [0.64, 0.71], "kl": 0.51, "kl_interval": [0.47, 0.56]},
    "difference": {
        "drop": 0.1938,
        "drop_interval": [0.16, 0.23],
        "p_value": 1e-20,
        "significant": True,
        "test": "McNemar, exact",
    },
    "classes": [
        {"class": "tench, Tinca tinca", "samples": 2, "dense": 1.0, "compressed": 0.0},
        {"class": "goldfish", "samples": 1, "dense": 1.0, "compressed": 1.0},
    ],
    "disagreements": [
        {"sample": "n01440764/x.jpg", "label": "tench", "dense": "tench", "compressed": "goldfish", "kl": 3.2}
    ],
    "source": "imagenet-val",
    "fingerprint": "ab12",
    "label_rule": "WordNet ids",
    "bad_samples": {},
    "preprocessing": {"resize": [224, 224]},
}


def made(*, blocks: int = 3, **changes: Any) -> Report:
    """The report with these entries: plain ones as in its JSON, others as they are."""
    entries: dict[str, Any] = {
        "vitshrink": "0.1.0",
        "model": "facebook/deit-tiny-patch16-224",
        "task": "image-classification",
        "method": "whitened",
        "allocation": "uniform-ratio",
        "compensation": "none",
        "parameters": reports.before_after(5_717_416, 4_116_539),
        "layers_parameters": reports.before_after(5_308_416, 3_707_539),
        "bytes": reports.before_after(22_878_656, 16_480_000),
        "macs": reports.before_after(1_258_000_000, 905_000_000),
        "evaluation": copy.deepcopy(EVALUATION),
        "layers": [layer(block, place) for block in range(blocks) for place in PLACES],
        "calibration": {
            "source": "imagenet-unlabelled",
            "samples": 500,
            "tokens": None,
            "seed": 0,
            "fingerprint": "cd",
        },
        "timings": {"load": 0.4, "calibrate": 21.0, "evaluate": 75.2},
        "environment": {"python": "3.11.2", "torch": "2.13.0", "device": "cpu", "threads": 2, "peak_memory": 10**9},
        "command": "vitshrink compress deit-tiny out --method whitened --keep 0.72",
        "recipe": {"method": "whitened", "keep": [0.72]},
        "warnings": ["imagenet-unlabelled has 500 samples; --samples asked for 512."],
    }
    read = {name: value for name, value in changes.items() if isinstance(value, dict | list)}
    report = Report.from_json(json.dumps(entries | read, default=asdict))
    return replace(report, **{name: value for name, value in changes.items() if name not in read})


def changed(path: str, value: Any) -> Report:
    """The report with one entry of its evaluation set, or with ``...`` removed."""
    evaluation = copy.deepcopy(EVALUATION)
    *groups, name = path.split(".")
    group: dict[str, Any] = evaluation
    for part in groups:
        group = group[part]
    if value is ...:
        del group[name]
    else:
        group[name] = value
    return made(evaluation=evaluation)


def cells(report: Report) -> dict[str, tuple[str, str, str]]:
    return {row.name: (row.dense, row.compressed, row.change) for row in summary_rows(report)}


UNLABELED = made(evaluation=EVALUATION | {"metric": None, "dense": None, "compressed": None, "difference": None})
BARE = made(
    evaluation=None,
    bytes={},
    macs={},
    calibration=None,
    timings={},
    environment={},
    command=None,
    recipe=None,
    warnings=[],
)
HEADLESS = made(
    task="features",
    evaluation={
        "task": "features",
        "metric": None,
        "samples": 64,
        "fidelity": {"feature_cosine": 0.97, "pooled_cosine": 0.99},
    },
)
SIMILARITY = made(
    task="features",
    evaluation={
        "task": "similarity",
        "metric": "spearman",
        "samples": 1379,
        "dense": {"spearman": 0.8203, "pearson": 0.83, "interval": [0.8, 0.84]},
        "compressed": {"spearman": None, "pearson": None, "interval": [-1, 1]},
        "fidelity": {"feature_cosine": 0.97, "pooled_cosine": 0.99, "prediction_spearman": None},
        "difference": {"drop": None, "drop_interval": [-2, 2], "p_value": 1.0, "significant": False, "test": "b"},
        "classes": [],
        "disagreements": [],
    },
)
ONE_MODEL = made(evaluation=EVALUATION | {"dense": None, "difference": None, "fidelity": None})
every_kind = pytest.mark.parametrize(
    "report",
    [made(), UNLABELED, BARE, HEADLESS, SIMILARITY, ONE_MODEL, made(layers=[])],
    ids=["full", "unlabeled", "bare", "headless", "similarity", "one-model", "no-layers"],
)


@every_kind
def test_json_gives_the_same_report_back(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again.to_dict() == report.to_dict()
    assert again.to_json() == report.to_json()


def test_json_is_strict_and_its_keys_keep_their_order() -> None:
    timings: Any = {"load": math.nan, "save": math.inf}
    text = replace(made(), timings=timings, environment=Environment(device=Path("cpu"))).to_json()
    entries = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert entries["timings"] == {"load": None, "save": None}
    assert entries["environment"] == {"device": "cpu"}
    assert list(entries)[:4] == ["vitshrink", "model", "task", "method"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a report"),
        ('{"vitshrink": "0.1"}', "it has no .*model"),
        (made().to_json().replace('"layers": [', '"layers": 3, "x": ['), "'layers' cannot be 3"),
        (
            made().to_json().replace('"task": "image-classification",\n  "method"', '"task": null,\n  "method"'),
            "'task'",
        ),
    ],
)
def test_what_is_no_report_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        Report.from_json(text, "out/report.json")
    assert "out/report.json" in str(raised.value)


def test_a_missing_report_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vitshrink compress wrote"):
        Report.read(tmp_path)


def test_entries_of_a_newer_version_are_left_out() -> None:
    text = json.dumps(made().to_dict() | {"energy": 3})
    assert Report.from_json(text).to_dict() == made().to_dict()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("evaluation.dense.top1", "much", "'evaluation.dense.top1' cannot be 'much'"),
        ("evaluation.compressed", {"spearman": 0.5, "interval": [0, 1]}, "'evaluation.compressed' has no 'pearson'"),
        ("evaluation.classes.1.samples", None, "'evaluation.classes.1.samples' cannot be None"),
        ("layers.2.shape", [3], r"'layers.2.shape'"),
        ("bytes.kept", [], r"'bytes.kept' cannot be \[\]"),
        ("schema", 2, "newer vitshrink .schema 2"),
    ],
)
def test_a_damaged_entry_is_named_wherever_it_lies(path: str, value: Any, message: str) -> None:
    entries = group = made().to_dict()
    *groups, name = path.split(".")
    for part in groups:
        group = group[int(part) if isinstance(group, list) else part]
    group[name] = value
    with pytest.raises(DataError, match=message):
        Report.from_json(json.dumps(entries))


def test_a_report_of_before_the_schema_had_a_version_is_read() -> None:
    entries = made().to_dict()
    assert entries.pop("schema") == 1
    assert Report.from_json(json.dumps(entries)) == made()


def test_the_page_about_reports_says_what_the_schema_says() -> None:
    assert schema_tables.PAGE.read_text(encoding="utf-8") == schema_tables.written(), "run tests/schema_tables.py"


@pytest.mark.parametrize(
    ("entries", "stored"),
    [
        ({"rank": 24}, "24"),
        ({"rank": None}, "dense"),
        ({"rank": None, "form": "dense"}, "dense"),
        ({"rank": 24, "form": "low-rank", "bits": 4}, "24, int4"),
        ({"rank": None, "form": "integer", "bits": 8}, "int8"),
        ({"rank": None, "form": "tucker"}, "tucker"),
    ],
)
def test_a_layer_says_in_which_form_it_is_stored(entries: dict[str, Any], stored: str) -> None:
    (entry,) = made(layers=[layer(1, "mlp.fc1") | entries]).layers
    assert f"768 × 192 | {stored} | " in reports.render_markdown(made(layers=[layer(1, "mlp.fc1") | entries]))
    assert {key: value for key, value in plain(entry).items() if key in ("form", "bits")} == {
        key: value for key, value in entries.items() if key != "rank"
    }


def test_write_leaves_json_markdown_page_and_card(tmp_path: Path) -> None:
    reports.write(made(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "report.html", "report.json", "report.md"]
    assert Report.read(tmp_path).to_dict() == made().to_dict()


def test_rows_carry_units_and_the_change() -> None:
    rows = cells(made())
    assert rows["Parameters"] == ("5.72 M", "4.12 M", "72.0 % kept")
    assert rows["Weight files"] == ("22.9 MB", "16.5 MB", "72.0 % kept")
    assert rows["MACs per sample"] == ("1.26 G", "905 M", "71.9 % kept")
    assert rows["Top-1"] == ("81.4 %", "62.0 %", "−19.4 points")
    assert rows["95 % interval"][2] == "−23.0 to −16.0 points"
    assert rows["KL(dense ‖ compressed), nats"][1] == "0.510"


def timings(dense: float, compressed: float, size: int = 8) -> dict[str, dict[str, Any]]:
    return {
        role: {
            "median": t,
            "lower_quartile": 0.95 * t,
            "upper_quartile": 1.05 * t,
            "batch_size": size,
            "throughput": size / t,
            "repeats": 10,
            "threads": 1,
        }
        for role, t in (("dense", dense), ("compressed", compressed))
    }


def timed(dense: float, compressed: float) -> Report:
    return made(latency=timings(dense, compressed))


def test_every_batch_size_has_its_time_with_the_spread_and_its_throughput() -> None:
    others = [timings(2.0, 1.0, 64), timings(0.5, 0.25, 32)]
    rows = cells(made(latency=timings(0.02, 0.016, 1) | {"others": others}))
    assert rows["Latency, batch of 1"] == ("20.0 ms (19.0–21.0)", "16.0 ms (15.2–16.8)", "1.25× as fast")
    assert "Throughput, batch of 1" not in rows
    assert rows["Latency, batch of 64"][:2] == ("2.0 s (1.9–2.1)", "1.0 s (0.9–1.1)")
    assert rows["Throughput, batch of 32"] == ("64 /s", "128 /s", "")


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"kind": "text", "tokenizer": "BertTokenizer", "max_length": 128}, "BertTokenizer, up to 128 tokens"),
        (
            {"kind": "image", "size": {"height": 224, "width": 224}, "resample": "bilinear", "image_mean": [0.5] * 3},
            "resize to 224 × 224, bilinear; mean 0.5 0.5 0.5",
        ),
        (
            {"kind": "image", "geometry": "timm", "size": {"shortest_edge": 248}, "resample": "bicubic"}
            | {"crop_size": {"height": 224, "width": 224}},
            "timm geometry: resize to a short side of 248, bicubic; crop the middle 224 × 224",
        ),
        ({}, ""),
    ],
)
def test_preprocessing_is_told_in_a_line(description: dict[str, Any], said: str) -> None:
    assert prepared(description) == said


@pytest.mark.parametrize(
    ("dense", "compressed", "change"),
    [
        (0.02, 0.016, "1.25× as fast"),
        (0.02, 0.025, "0.80× as fast"),
        (0.02, 0.0195, "no clear difference in time"),
    ],
)
def test_a_difference_in_latency_is_claimed_only_beyond_the_spread(
    dense: float, compressed: float, change: str
) -> None:
    report = timed(dense, compressed)
    assert cells(report)["Latency, batch of 8"][2] == change
    assert change in Page(reports.render_html(report)).text


def test_titles_and_cards_do_not_tell_local_paths() -> None:
    evaluation = EVALUATION | {"source": "/home/me/val"}
    report = made(
        model="/home/me/my-vit", evaluation=evaluation, calibration={"source": "/home/me/photos/", "samples": 9}
    )
    card = reports.render_card(report)
    assert "# my-vit, compressed" in card
    assert "photos" in card
    assert "/home" not in card


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (made(), "−19.4 points top-1 (81.4 % → 62.0 % on 650 samples); a real drop"),
        (changed("difference.significant", False), "within noise"),
        (changed("difference.drop", -0.02), "a real gain"),
        (UNLABELED, "68.0 % same predictions"),
        (HEADLESS, "0.970 cosine to dense features"),
        (ONE_MODEL, "the dense model was not run"),
        (BARE, "not measured"),
    ],
)
def test_the_headline_says_no_more_than_was_measured(report: Report, said: str) -> None:
    assert said in headline(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (22_050_000, "22.1 M"),
        (999_999, "1.00 M"),
        (None, "–"),
    ],
)
def test_counts_have_three_digits(value: float | None, text: str) -> None:
    assert reports.wording.count(value) == text


def test_small_figures_are_not_rounded_to_zero() -> None:
    assert reports.wording.number(0.0001) == "<0.001"
    assert reports.wording.number(0) == "0.000"


@every_kind
def test_markdown_has_whole_tables(report: Report) -> None:
    for text in (reports.render_markdown(report), reports.render_card(report)):
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(widths) == 1
        assert "None" not in text


def test_markdown_keeps_hostile_names_as_text() -> None:
    name = "a|b <script>alert(1)</script> `x` *y*\n# z"
    report = made(model=name, warnings=[name], command="echo ```\n# not a heading")
    text = reports.render_markdown(report)
    assert "<script>" not in text
    assert "\n# z" not in text
    assert r"\`x\`" in text
    assert "attention.q_proj" in text
    assert "````\necho ```" in text


def test_the_card_has_front_matter_and_says_how_to_load() -> None:
    text = reports.render_card(made())
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "facebook/deit-tiny-patch16-224"
    assert front["pipeline_tag"] == "image-classification"
    assert "import vitshrink" in text
    assert "AutoModelForImageClassification.from_pretrained" in text
    assert "| Top-1 |" in text


@pytest.mark.parametrize("model", ["/home/me/deit", "./deit", "deit", "a/b/c"])
def test_the_card_names_no_base_model_that_the_hub_does_not_have(model: str) -> None:
    assert "base_model" not in reports.render_card(made(model=model)).split("---\n")[1]


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects addresses and scripts."""

    EMPTY = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@every_kind
def test_the_page_is_self_contained(report: Report) -> None:
    page = Page(reports.render_html(report))
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "url(http" not in reports.render_html(report)
    assert "None" not in page.text


def test_the_page_opens_with_the_answers_and_ends_with_how_to_repeat_it() -> None:
    text = Page(reports.render_html(made())).text.replace("\u00a0", " ").replace("\u2011", "-")
    order = ["28.0 % smaller", "28.1 % fewer operations", "−19.4 points top-1", "a real drop", "Before and after"]
    order += ["Rank plan", "Error by layer", "Classes that lost most", "Layers", "Calibration", "vitshrink compress"]
    places = [text.index(piece) for piece in order]
    assert places == sorted(places)
    assert "imagenet-unlabelled has 500 samples" in text


def test_the_page_escapes_every_name() -> None:
    attack = '<img src=x onerror=alert(1)>"&'
    evaluation = copy.deepcopy(EVALUATION) | {"source": attack, "label_rule": attack, "bad_samples": {attack: attack}}
    evaluation["classes"][0]["class"] = attack  # type: ignore[index]
    evaluation["disagreements"][0] |= {"sample": attack, "label": attack, "dense": attack}  # type: ignore[index]
    bad_layer = layer(1, "mlp.fc1") | {"name": f"vit.layers.1.{attack}", "reason": attack}
    report = made(
        model=attack,
        method=attack,
        warnings=[attack],
        command=attack,
        recipe={attack: attack},
        environment={"device": attack},
        calibration={"source": attack, "samples": 1, "preprocessing": {attack: attack}},
        evaluation=evaluation,
        layers=[bad_layer],
    )
    for text in (reports.render_html(report), reports.render_comparison_html([report, report])):
        assert "img" not in Page(text).tags
        assert "onerror" in Page(text).text


def test_thumbnails_stand_in_the_page() -> None:
    address = "data:image/png;base64,AAAA"
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["disagreements"][0]["thumbnail"] = address  # type: ignore[index]
    report = made(evaluation=evaluation)
    page = Page(reports.render_html(Report.from_json(report.to_json())))
    assert page.addresses.count(address) == 1


def disagreement(sample: str) -> Disagreement:
    return Disagreement(sample, label=None, dense="a", compressed="b", kl=1.0)


def test_thumbnails_are_small_images_of_the_samples_asked_for(tmp_path: Path) -> None:
    tiny.write_images(tmp_path, 2)
    Image.new("L", (900, 300)).save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = sorted(tmp_path.iterdir())
    samples = SampleSet("here", "image", [Sample(file.name, image=file) for file in files])
    keys = ["wide.png", "broken.png", "missing.png", "000.png", "001.png"]
    found = reports.with_thumbnails([disagreement(key) for key in keys], samples, most=4)
    assert [entry.sample for entry in found] == keys
    assert [entry.sample for entry in found if entry.thumbnail] == ["wide.png", "000.png"]
    head, _, content = found[0].thumbnail.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(BytesIO(base64.b64decode(content))).size == (160, 53)


def test_texts_have_no_thumbnails() -> None:
    samples = SampleSet("here", "text", [Sample("row 1", text="good film")])
    assert reports.with_thumbnails([disagreement("row 1")], samples) == (disagreement("row 1"),)


def test_pictures_are_valid_svg_in_the_colors_of_the_page() -> None:
    drawn = [figures.rank_plan(made()), figures.error_by_layer(made()), figures.trade_off([made(), smaller()])]
    for svg in drawn:
        assert svg is not None
        ElementTree.fromstring(svg)
        assert "currentColor" in svg
        assert "DejaVu" not in svg
        assert drawing.INK not in svg
    assert ">dense<" in str(drawn[0])
    assert figures.rank_plan(made()) == drawn[0]


def test_models_of_one_size_stand_below_each_other_with_their_methods() -> None:
    """An axis of sizes that differ in the fifth digit says nothing."""
    methods = ("svd", "whitened", "$x_{y}$ \udce9")
    alike = [made(method=m, parameters=reports.before_after(10**6, 499_800 + 5 * i)) for i, m in enumerate(methods)]
    text = "".join(ElementTree.fromstring(str(figures.trade_off(alike))).itertext())
    for said in ("svd", "whitened", "$x_{y}$ \\xe9", "dense", "with 50.0 % of the parameters kept"):
        assert said in text
    assert "fraction" not in text
    assert "1e" not in text
    twice = [made(allocation=allocation) for allocation in ("loss", "energy")]
    assert "whitened, energy" in "".join(ElementTree.fromstring(str(figures.trade_off(twice))).itertext())
    close = [made(), made(parameters=reports.before_after(10**6, 730_000))]
    text = "".join(ElementTree.fromstring(str(figures.trade_off(close))).itertext())
    assert "fraction of the parameters kept" in text
    assert not re.search(r"\de[−-]?\d", text)


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    for text in (reports.render_html(made()), reports.render_comparison_html([made(), smaller()])):
        page = Page(text)
        assert "matplotlib is not installed" in page.text
        assert "svg" not in page.tags


def smaller() -> Report:
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["compressed"] |= {"top1": 0.3, "interval": [0.26, 0.34]}  # type: ignore[operator]
    return made(parameters=reports.before_after(5_717_416, 2_858_708), evaluation=evaluation)


def test_comparison_has_a_line_a_model_and_no_empty_columns() -> None:
    lines = reports.comparison_markdown([made(), smaller()]).splitlines()
    assert len(lines) == 4
    assert "latency" not in lines[0]
    assert "72.0 %" in lines[2]
    assert "50.0 %" in lines[3]
    assert "30.0 %" in lines[3]


def test_comparison_page_warns_of_scores_from_different_samples() -> None:
    warning = "cannot be compared"
    assert warning not in reports.render_comparison_html([made(), smaller()])
    assert warning in reports.render_comparison_html([made(), changed("fingerprint", "ff")])


@every_kind
def test_comparison_takes_every_kind_of_report(report: Report) -> None:
    page = Page(reports.render_comparison_html([report, made()]))
    assert "None" not in page.text
    assert reports.comparison_markdown([report]).count("\n") == 3


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<script>
addEventListener("load", () => {
  const style = getComputedStyle(document.body);
  const boxes = [...document.querySelectorAll(".scroll")];
  const tables = boxes.every((box) => box.getBoundingClientRect().right <= innerWidth);
  parent.postMessage(JSON.stringify({
    width: innerWidth, content: document.documentElement.scrollWidth, tables,
    paper: style.backgroundColor, ink: style.color,
  }), "*");
});
</script>"""
FRAME = """<!doctype html><body style="margin: 0"><script>
addEventListener("message", (event) => { document.body.textContent = event.data; });
</script><iframe style="border: 0; width: WIDTHpx; height: 900px" srcdoc="PAGE"></iframe></body>"""
"""A window cannot be as narrow as a phone, but a frame can."""

browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")


@browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True), (320, False)])
def test_a_browser_shows_the_pages_without_overflow(tmp_path: Path, width: int, dark: bool) -> None:
    evaluation = copy.deepcopy(EVALUATION)
    address = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    evaluation["disagreements"][0]["thumbnail"] = address  # type: ignore[index]
    long_name = made(warnings=["x" * 200], command="vitshrink " + "y" * 300, evaluation=evaluation)
    for page in (reports.render_html(long_name), reports.render_comparison_html([made(), smaller()])):
        probed = html.escape(page.replace("</body>", f"{PROBE}</body>"))
        file = tmp_path / "page.html"
        file.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", probed), encoding="utf-8")
        shown = browse(file, tmp_path / "profile", dark)
        assert shown["width"] == width
        assert shown["content"] <= width
        assert shown["tables"]
        light = sum(map(int, re.findall(r"\d+", shown["paper"])[:3])) > 384
        assert light != dark
        assert (sum(map(int, re.findall(r"\d+", shown["ink"])[:3])) > 384) == dark


@browser
def test_a_browser_prints_the_pages(tmp_path: Path) -> None:
    for name, page in (
        ("report", reports.render_html(made(blocks=12))),
        ("comparison", reports.render_comparison_html([made(), smaller()])),
    ):
        file, printed = tmp_path / f"{name}.html", tmp_path / f"{name}.pdf"
        file.write_text(page, encoding="utf-8")
        run_browser(file, tmp_path / "profile", f"--print-to-pdf={printed}", "--no-pdf-header-footer")
        content = printed.read_bytes()
        assert content.startswith(b"%PDF")
        assert 1 <= len(re.findall(rb"/Type */Page\b", content)) <= 10


def browse(file: Path, profile: Path, dark: bool) -> dict[str, Any]:
    """What the probe in the page found."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    shown = run_browser(file, profile, scheme, "--window-size=1300,950", "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r"\{.*\}", shown)
    assert found, shown
    return dict(json.loads(html.unescape(found[0])))


def run_browser(file: Path, profile: Path, *flags: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}", *flags, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
