"""Opening a job's data and measuring on them: which samples, which labels, and what is said of those left out."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from test_processes import run_together
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from vitshrink.config.options import DataConfig
from vitshrink.data import Preprocessor, SampleSet
from vitshrink.data.opening import hold_out, open_data, read_calibration
from vitshrink.errors import DataError, UsageError
from vitshrink.evaluation.measurement import Measurement, measure, measure_each
from vitshrink.models.loading import LoadedModel, load_dense
from vitshrink.models.tasks import task_of
from vitshrink.runtime.observer import Job, Silent

Checkpoint = Callable[[str], Path]


class Recorder(Silent):
    """Counts the steps of the stages."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int | None, int]] = {}

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.stages[title] = (total, 0)

        def advance(steps: int) -> None:
            self.stages[title] = (total, self.stages[title][1] + steps)

        yield advance


def job() -> Job:
    return Job(Recorder())


def preprocessor_of(model: LoadedModel) -> Preprocessor:
    return Preprocessor.from_checkpoint(model.directory, model.family.modality)


def shaken(model: nn.Module) -> nn.Module:
    """A copy that answers a little differently."""
    other = tiny.build(type(model).__name__)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return other


def measured(loaded: LoadedModel, samples: SampleSet, own: Job, **entries: object) -> Measurement:
    settings = {"baseline": loaded.model, "batch_size": 5} | entries
    return measure(
        shaken(loaded.model),
        samples,
        preprocessor_of(loaded),
        own,
        task=task_of(loaded.model),
        device=torch.device("cpu"),
        **settings,  # type: ignore[arg-type]
    )


@pytest.fixture
def vit(vit_directory: Path) -> LoadedModel:
    return load_dense(vit_directory)


@pytest.fixture
def bert(bert_directory: Path) -> LoadedModel:
    return load_dense(bert_directory)


@pytest.fixture
def flat(vit: LoadedModel, flat_images: Path) -> SampleSet:
    return open_data(DataConfig(str(flat_images)), vit, offline=True)


# Calibration samples


def test_calibration_samples_are_selected_by_seed_and_preprocessed(vit: LoadedModel, flat: SampleSet) -> None:
    own = job()
    data = read_calibration(flat, preprocessor_of(vit), own, samples=9, seed=3, batch_size=4)
    assert [len(batch.keys) for batch in data.batches] == [4, 4, 1]
    assert [key for batch in data.batches for key in batch.keys] == [s.key for s in flat.select(9, 3).samples]
    assert data.samples.fingerprint() == flat.select(9, 3).fingerprint()
    assert data.tokens is None
    assert isinstance(own.observer, Recorder)
    assert own.observer.stages == {"Reading calibration data": (9, 9)}
    assert own.warnings == []


def test_tokens_of_texts_are_those_that_are_real(bert: LoadedModel, text_file: Path) -> None:
    texts = open_data(DataConfig(str(text_file)), bert, offline=True)
    data = read_calibration(texts, preprocessor_of(bert), job(), samples=10, seed=0, batch_size=4)
    words = [len((sample.text or "").split()) for sample in texts.select(10, 0).samples]
    assert data.tokens == sum(words) + 2 * 10  # every word is in the vocabulary; [CLS] and [SEP]


def test_texts_that_are_cut_are_counted(bert: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("good film\n" + "so " * 100 + "good\nbad film\n" + "not " * 80 + "bad\n")
    texts, own = open_data(DataConfig(str(file)), bert, offline=True), job()
    read_calibration(texts, preprocessor_of(bert), own, samples=4, seed=0, batch_size=2)
    measured(bert, texts, own)
    assert own.warnings == [f"{file}: 2 texts were cut to 64 tokens."] * 2


def test_fewer_samples_than_asked_for_are_warned_of(vit: LoadedModel, flat: SampleSet) -> None:
    own = job()
    data = read_calibration(flat, preprocessor_of(vit), own, samples=100, seed=0, batch_size=32)
    assert len(data.samples) == 24
    assert own.warnings == [f"{flat.source} has 24 samples; --samples asked for 100."]


@pytest.fixture
def spoilt(flat_images: Path, tmp_path: Path) -> Path:
    """11 images, one of them cut off and one no image at all."""
    for index, file in enumerate(sorted(flat_images.iterdir())[:11]):
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes({0: content[:200], 5: b"<html>"}.get(index, content))
    return tmp_path


def test_unreadable_samples_are_left_out_named_and_bounded(vit: LoadedModel, spoilt: Path) -> None:
    samples, own = open_data(DataConfig(str(spoilt)), vit, offline=True), job()
    data = read_calibration(samples, preprocessor_of(vit), own, samples=11, seed=0, batch_size=4, max_bad_samples=2)
    assert sum(len(batch.keys) for batch in data.batches) == 9
    (warning,) = own.warnings
    assert "2 unusable samples were skipped" in warning
    assert "000.png" in warning
    assert "005.png" in warning
    with pytest.raises(DataError, match="--max-bad-samples"):
        read_calibration(samples, preprocessor_of(vit), job(), samples=11, seed=0, batch_size=4)


def test_held_out_samples_are_none_of_those_calibrated_on(flat: SampleSet) -> None:
    own = job()
    held_out = hold_out(flat, own, samples=16, calibrated=True, holdout=6, seed=5)
    assert held_out is not None
    assert len(held_out) == 6
    used = {sample.key for sample in flat.select(16, 5).samples}
    assert not used & {sample.key for sample in held_out.samples}
    rest = hold_out(flat, own, samples=16, calibrated=True, holdout=100, seed=5)
    assert rest is not None
    assert len(rest) == 8
    assert own.warnings == []


def test_methods_that_are_not_calibrated_are_held_to_the_same_samples(flat: SampleSet) -> None:
    both = [hold_out(flat, job(), samples=16, calibrated=each, holdout=6, seed=5) for each in (True, False)]
    keys = [[sample.key for sample in each.samples] for each in both if each is not None]
    assert len(keys) == 2
    assert keys[0] == keys[1]
    rest = hold_out(flat, job(), samples=24, calibrated=False, holdout=6, seed=5)
    assert rest is not None
    assert len(rest) == 6


def test_nothing_left_to_hold_out_is_warned_of(flat: SampleSet) -> None:
    own = job()
    assert hold_out(flat, own, samples=24, calibrated=True, holdout=6, seed=0) is None
    assert "all samples were used for calibration" in own.warnings[0]
    assert hold_out(flat, job(), samples=16, calibrated=True, holdout=0, seed=0) is None


# Measuring


def test_labels_are_used_where_there_are_any_and_wanted(vit: LoadedModel, learned_images: Path) -> None:
    samples = open_data(DataConfig(str(learned_images)), vit, offline=True)
    found = measured(vit, samples, job())
    assert found.evaluation.dense is not None
    assert found.evaluation.dense.correct == 34
    assert found.evaluation.metric == "top1"
    assert found.label_rule is not None
    assert found.label_rule.startswith("class names")
    assert found.fingerprint == samples.fingerprint()
    unlabeled = measured(vit, samples, job(), labeled=False)
    assert unlabeled.evaluation.dense is None
    assert unlabeled.label_rule is None
    assert unlabeled.evaluation.fidelity == found.evaluation.fidelity


def test_unlabeled_samples_need_a_baseline(vit: LoadedModel, flat: SampleSet) -> None:
    found = measured(vit, flat, job())
    assert found.evaluation.fidelity is not None
    assert found.evaluation.fidelity.kl > 0
    with pytest.raises(UsageError, match="--baseline"):
        measured(vit, flat, job(), baseline=None)


def test_a_class_map_says_which_folder_is_which_class(vit: LoadedModel, learned_images: Path, tmp_path: Path) -> None:
    for index, name in enumerate(tiny.IMAGE_CLASSES):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"group {index}").symlink_to(learned_images / name)
    samples = open_data(DataConfig(str(tmp_path / "data")), vit, offline=True)
    with pytest.raises(DataError, match="--class-map"):
        measured(vit, samples, job())
    table = tmp_path / "classes.txt"
    table.write_text("".join(f"group {index}\t{index}\n" for index in range(4)))
    found = measured(vit, samples, job(), class_map=table)
    assert found.evaluation.dense is not None
    assert found.evaluation.dense.correct == 34


def test_unreadable_samples_are_left_out_of_the_figures_and_named(vit: LoadedModel, spoilt: Path) -> None:
    samples, own = open_data(DataConfig(str(spoilt)), vit, offline=True), job()
    found = measured(vit, samples, own, max_bad_samples=2)
    assert found.evaluation.samples == 9
    assert set(found.bad.reasons) == {"000.png", "005.png"}
    assert "2 unusable samples" in own.warnings[0]
    with pytest.raises(DataError, match="cannot be used"):
        measured(vit, samples, job(), max_bad_samples=1)


@pytest.fixture
def text_labels(tmp_path: Path) -> Path:
    lines = ["sentence\tlabel"]
    lines += [f"{'good' if index % 2 else 'bad'} film {'so ' * index}\t{index % 2}" for index in range(12)]
    file = tmp_path / "labels.tsv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_texts_with_labels_are_classified(bert: LoadedModel, text_labels: Path) -> None:
    samples = open_data(DataConfig(str(text_labels)), bert, offline=True)
    with torch.no_grad():  # a tiny model that knows the answer, or the labels would look permuted
        bert.model.classifier.weight.zero_()  # type: ignore[union-attr, operator]
        bert.model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))  # type: ignore[union-attr, operator]
    found = measured(bert, samples, job())
    assert found.evaluation.dense is not None
    assert found.evaluation.dense.correct == 6
    assert found.label_rule is not None
    assert found.label_rule.startswith("integers")


def test_a_regression_is_measured_by_its_correlation(tmp_path: Path) -> None:
    config = tiny.build("BertForSequenceClassification").config
    torch.manual_seed(0)
    directory = tmp_path / "regression"
    BertForSequenceClassification(BertConfig(**(config.to_dict() | {"num_labels": 1}))).save_pretrained(directory)
    tiny.write_tokenizer(directory)
    loaded = load_dense(directory)
    scores = tmp_path / "scores.tsv"
    scores.write_text(
        "sentence\tscore\n" + "".join(f"good film {'so ' * index}\t{index / 3:.2f}\n" for index in range(12))
    )
    samples = open_data(DataConfig(str(scores), label_column="score"), loaded, offline=True)
    found = measure(
        loaded.model,
        samples,
        preprocessor_of(loaded),
        job(),
        task=task_of(loaded.model),
        baseline=None,
        device=torch.device("cpu"),
        batch_size=5,
    )
    assert found.evaluation.metric == "spearman"
    assert found.label_rule == "scores of a regression"
    words = tmp_path / "words.tsv"
    words.write_text("sentence\tlabel\ngood film\thigh\nbad film\tlow\n")
    named = open_data(DataConfig(str(words)), loaded, offline=True)
    with pytest.raises(DataError, match="name the column with the scores"):
        measure(
            loaded.model,
            named,
            preprocessor_of(loaded),
            job(),
            task=task_of(loaded.model),
            baseline=None,
            device=torch.device("cpu"),
            batch_size=5,
        )


def test_several_models_are_measured_in_one_pass_of_the_dense_one(vit: LoadedModel, flat: SampleSet) -> None:
    models = [shaken(vit.model), shaken(shaken(vit.model))]
    options: Any = {"task": task_of(vit.model), "device": torch.device("cpu"), "batch_size": 5}
    alone = [measure(m, flat, preprocessor_of(vit), job(), baseline=vit.model, **options) for m in models]
    passes = []
    handle = vit.model.register_forward_hook(lambda *_: passes.append(1))
    together = measure_each(models, flat, preprocessor_of(vit), job(), baseline=vit.model, **options)
    handle.remove()
    assert [each.evaluation for each in together] == [each.evaluation for each in alone]
    assert together[0].evaluation != together[1].evaluation
    assert len(passes) == 5  # 24 samples


def test_several_models_are_measured_on_pairs(checkpoint: Checkpoint, pairs: Path) -> None:
    loaded = load_dense(checkpoint("BertModel"))
    samples = open_data(DataConfig(str(pairs)), loaded, offline=True)
    models = [shaken(loaded.model), loaded.model]
    options: Any = {"task": task_of(loaded.model), "device": torch.device("cpu"), "batch_size": 5}
    first, second = measure_each(models, samples, preprocessor_of(loaded), job(), baseline=loaded.model, **options)
    assert first.evaluation == measured(loaded, samples, job()).evaluation
    assert second.evaluation.fidelity is not None
    assert second.evaluation.fidelity.pooled_cosine == pytest.approx(1)


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from vitshrink.runtime import processes
from vitshrink.config.options import DataConfig
from vitshrink.data import Preprocessor
from vitshrink.evaluation.measurement import measure
from vitshrink.data.opening import open_data
from vitshrink.models.loading import load_dense
from vitshrink.models.tasks import task_of
from vitshrink.runtime.observer import Job, Silent
processes.join("cpu")
loaded, own = load_dense(Path(sys.argv[1])), Job(Silent())
found = measure(
    loaded.model,
    open_data(DataConfig(sys.argv[2]), loaded, offline=True),
    Preprocessor.from_checkpoint(loaded.directory, loaded.family.modality),
    own,
    task=task_of(loaded.model),
    baseline=loaded.model,
    device=torch.device("cpu"),
    batch_size=4,
    labeled=False,
    max_bad_samples=2,
)
processes.leave()
print(json.dumps([found.evaluation.to_dict(), found.fingerprint, found.bad.reasons, own.warnings]))
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(vit_directory: Path, class_images: Path, tmp_path: Path) -> None:
    """An odd number of samples, of which each process meets a bad one."""
    for number, file in enumerate(sorted(class_images.glob("*/*.png"))[:21]):
        copy = tmp_path / file.parent.name / file.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(b"" if number in (6, 13) else file.read_bytes())
    done = run_together("-c", PROGRAM, str(vit_directory), str(tmp_path))
    assert [each.returncode for each in done] == [0, 0], done
    found = [json.loads(each.stdout) for each in done]
    assert found[0] == found[1]
    loaded, own = load_dense(vit_directory), job()
    alone = measure(
        loaded.model,
        open_data(DataConfig(str(tmp_path)), loaded, offline=True),
        preprocessor_of(loaded),
        own,
        task=task_of(loaded.model),
        baseline=loaded.model,
        device=torch.device("cpu"),
        batch_size=4,
        labeled=False,
        max_bad_samples=2,
    )
    evaluation, fingerprint, reasons, warnings = found[0]
    assert evaluation == json.loads(json.dumps(alone.evaluation.to_dict()))
    assert evaluation["samples"] == 19
    assert fingerprint == alone.fingerprint
    assert reasons == alone.bad.reasons
    assert sorted(reasons) == ["bird/006.png", "cat/005.png"]
    assert warnings == own.warnings


def test_a_masked_language_model_needs_no_labels(masked_lm_directory: Path, text_file: Path) -> None:
    loaded = load_dense(masked_lm_directory)
    samples = open_data(DataConfig(str(text_file)), loaded, offline=True)
    found = measured(loaded, samples, job())
    assert found.evaluation.dense is not None
    assert 40 <= found.evaluation.dense.tokens < 40 * 12
    assert found.evaluation.to_dict() == measured(loaded, samples, job()).evaluation.to_dict()
    other = measured(loaded, samples, job(), seed=1)
    assert other.evaluation.to_dict() != found.evaluation.to_dict()


def test_a_headless_model_is_compared_by_its_features(checkpoint: Checkpoint, text_file: Path) -> None:
    loaded = load_dense(checkpoint("BertModel"))
    samples = open_data(DataConfig(str(text_file)), loaded, offline=True)
    found = measured(loaded, samples, job())
    assert found.evaluation.fidelity is not None
    assert 0.5 < found.evaluation.fidelity.feature_cosine < 1
    with pytest.raises(UsageError, match="no head"):
        measured(loaded, samples, job(), baseline=None)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.tsv"
    rows = [f"{index / 2}\tgood film {'so ' * index}\tbad film {'not ' * (index % 3)}" for index in range(10)]
    file.write_text("score\tsentence1\tsentence2\n" + "\n".join(rows) + "\n")
    return file


def test_sentence_pairs_are_compared_by_their_cosine(checkpoint: Checkpoint, pairs: Path) -> None:
    loaded, own = load_dense(checkpoint("BertModel")), job()
    samples = open_data(DataConfig(str(pairs)), loaded, offline=True)
    found = measured(loaded, samples, own)
    assert found.evaluation.metric == "spearman"
    assert found.evaluation.samples == 10
    assert isinstance(own.observer, Recorder)
    assert own.observer.stages == {"Evaluating": (20, 20)}
    unlabeled = measured(loaded, samples, job(), labeled=False)
    assert unlabeled.evaluation.dense is None
    assert unlabeled.evaluation.fidelity is not None


def test_a_pair_of_which_one_sentence_is_empty_is_left_out(checkpoint: Checkpoint, pairs: Path) -> None:
    rows = pairs.read_text().splitlines()
    score, first, _ = rows[4].split("\t")
    pairs.write_text("\n".join([*rows[:4], f"{score}\t{first}\t ", *rows[5:]]) + "\n")
    loaded, own = load_dense(checkpoint("BertModel")), job()
    found = measured(loaded, open_data(DataConfig(str(pairs)), loaded, offline=True), own)
    assert found.evaluation.samples == 9
    assert list(found.bad.reasons) == ["row 4"]
    assert "row 4" in own.warnings[0]


def test_the_models_keep_their_mode(vit: LoadedModel, flat: SampleSet) -> None:
    vit.model.train()
    measured(vit, flat, job())
    assert vit.model.training


def test_images_of_every_kind_are_measured(vit: LoadedModel, tmp_path: Path) -> None:
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1", "I;16"):
        Image.new(mode, (20, 30)).save(tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}")
    found = measured(vit, open_data(DataConfig(str(tmp_path)), vit, offline=True), job())
    assert found.evaluation.samples == 7
