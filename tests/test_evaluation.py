import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed
import torch.multiprocessing
from killing import CONTEXT
from torch import Tensor, nn

from vitshrink import load
from vitshrink.data import Preprocessor, align_labels, open_samples
from vitshrink.errors import DataError, NumericsError, UsageError, VitshrinkError
from vitshrink.evaluation import Evaluation, Masking, check_labels, evaluate, evaluate_pairs, metrics
from vitshrink.evaluation.quality import ClassScore
from vitshrink.models.sentences import masked_mean
from vitshrink.models.structures.low_rank import LowRankLinear

MASK, SPECIAL = tiny.VOCABULARY.index("[MASK]"), frozenset(range(len(tiny.SPECIAL_TOKENS)))


@dataclass
class EncodedBatch:
    inputs: dict[str, Tensor]
    mask: Tensor | None
    labels: list[Any]
    keys: list[str]


def batches(name: str, count: int, size: int, labels: list[Any] | None = None) -> list[EncodedBatch]:
    """``count`` samples of the tiny architecture, the same ones whatever the batch size."""
    made = [tiny.inputs(name, batch=1, seed=i) for i in range(count)]
    labels = labels if labels is not None else [None] * count
    result = []
    for start in range(0, count, size):
        rows = range(start, min(start + size, count))
        inputs = {key: torch.cat([made[i][key] for i in rows]) for key in made[0]}
        mask = inputs.get("attention_mask")
        result.append(
            EncodedBatch(
                inputs,
                None if mask is None else mask.bool(),
                [labels[i] for i in rows],
                [f"row {i}" for i in rows],
            )
        )
    return result


def compressed(name: str, rank: int = 6) -> nn.Module:
    """The tiny architecture with every layer of its blocks at ``rank``."""
    model = tiny.build(name)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layer" in path and "pooler" not in path:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], tiny.low_rank(module, rank))
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    return model


class Answers(nn.Module):
    """Gives the logits it was told, the input being a sample's number."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, index: Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.logits[index])  # type: ignore[arg-type]


def numbered(labels: list[Any], size: int = 4) -> Iterable[EncodedBatch]:
    for start in range(0, len(labels), size):
        rows = list(range(start, min(start + size, len(labels))))
        yield EncodedBatch(
            {"index": torch.tensor(rows)}, None, [labels[i] for i in rows], [f"{i:03d}.png" for i in rows]
        )


def one_hot(classes: list[int], num_labels: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(classes), num_labels).float() * 5


def test_accuracy_intervals_and_the_drop_come_from_the_same_samples() -> None:
    labels = [i % 10 for i in range(100)]
    wrong = [(label + 1) % 10 for label in labels]
    dense = Answers(one_hot(labels[:90] + wrong[90:], 10))
    worse = Answers(one_hot(wrong[:30] + labels[30:90] + wrong[90:], 10))
    found = evaluate(worse, numbered(labels), task="image-classification", label_of=int, baseline=dense)
    assert found.metric == "top1"
    assert found.samples == 100
    assert found.dense is not None
    assert found.compressed is not None
    assert found.fidelity is not None
    assert found.difference is not None
    assert (found.dense.top1, found.dense.correct) == (0.9, 90)
    assert found.dense.interval == metrics.wilson_interval(90, 100)
    assert found.compressed.top1 == pytest.approx(0.6)
    assert found.fidelity.agreement == pytest.approx(0.7)
    assert found.difference.drop == pytest.approx(0.3)
    assert found.difference.p_value == pytest.approx(2**-29)
    assert found.difference.significant
    low, high = found.difference.drop_interval
    assert 0.18 < low < 0.3 < high < 0.42


def test_equal_models_have_no_drop_and_no_divergence() -> None:
    model = tiny.build("ViTForImageClassification")
    data = batches("ViTForImageClassification", 12, 5, [i % 4 for i in range(12)])
    found = evaluate(model, data, task="image-classification", label_of=int, baseline=model).to_dict()
    assert found["dense"] == found["compressed"]
    assert found["fidelity"]["kl"] == 0
    assert found["fidelity"]["agreement"] == 1
    assert found["difference"]["drop"] == 0
    assert not found["difference"]["significant"]
    assert found["disagreements"] == []


def test_top5_is_left_out_where_it_means_nothing() -> None:
    labels = [0, 1, 2]
    few = evaluate(Answers(one_hot(labels, 5)), numbered(labels), task="text-classification", label_of=int)
    many = evaluate(Answers(one_hot(labels, 6)), numbered(labels), task="text-classification", label_of=int)
    assert few.dense is not None
    assert many.dense is not None
    assert few.dense.top5 is None
    assert many.dense.top5 == 1


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("ViTForImageClassification", "image-classification"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForMaskedLM", "masked-lm"),
    ],
)
def test_figures_do_not_depend_on_the_batch_size(name: str, task: str) -> None:
    first, *others = (
        evaluate(
            compressed(name),
            batches(name, 9, size, [i % 2 for i in range(9)]),
            task=task,
            label_of=int,
            masking=Masking(MASK, SPECIAL),
            baseline=tiny.build(name),
        )
        for size in (1, 4, 9)
    )
    for other in others:
        assert (other.dense, other.compressed) == (first.dense, first.compressed)
        assert other.fidelity is not None
        assert first.fidelity is not None
        assert other.fidelity.kl == pytest.approx(first.fidelity.kl, abs=1e-5)
        assert other.fidelity.agreement == first.fidelity.agreement


def test_without_labels_only_fidelity_is_measured() -> None:
    name = "DeiTForImageClassificationWithTeacher"
    found = evaluate(compressed(name), batches(name, 6, 3), task="image-classification", baseline=tiny.build(name))
    assert (found.dense, found.compressed, found.difference, found.metric) == (None, None, None, None)
    assert found.fidelity is not None
    assert found.fidelity.kl > 0
    assert {row.class_ for row in found.classes} <= set(tiny.IMAGE_CLASSES)


def test_one_model_alone_is_named_by_what_it_is() -> None:
    name = "ViTForImageClassification"
    data = batches(name, 4, 4, [0, 1, 2, 3])
    assert evaluate(tiny.build(name), data, task="image-classification", label_of=int).compressed is None
    assert evaluate(compressed(name), data, task="image-classification", label_of=int).dense is None


@pytest.mark.parametrize("task", ["image-classification", "text-classification", "features"])
def test_nothing_to_measure_is_said_with_the_remedy(task: str) -> None:
    with pytest.raises(UsageError, match="--baseline"):
        evaluate(tiny.build("ViTModel"), [], task=task)


def test_headless_models_are_compared_over_real_tokens_only() -> None:
    dense, worse = tiny.build("BertModel"), compressed("BertModel", rank=20)
    data = [EncodedBatch(inputs := tiny.inputs("BertModel"), inputs["attention_mask"].bool(), [None] * 3, list("abc"))]
    found = evaluate(worse, data, task="features", baseline=dense).fidelity
    with torch.no_grad():
        states = [model(**inputs).last_hidden_state.double() for model in (dense, worse)]
    real = inputs["attention_mask"].bool()
    expected = [torch.cosine_similarity(*(s[i][real[i]] for s in states), dim=-1).mean() for i in range(3)]
    assert found is not None
    assert found.feature_cosine == pytest.approx(float(torch.stack(expected).mean()))
    pooled = [torch.stack([s[i][real[i]].mean(0) for i in range(3)]) for s in states]
    assert found.pooled_cosine == pytest.approx(float(torch.cosine_similarity(*pooled, dim=-1).mean()))


def test_masked_tokens_are_scored_as_the_full_model_scores_them() -> None:
    name, masking = "BertForMaskedLM", Masking(MASK, SPECIAL, fraction=0.3, seed=7)
    model, data = tiny.build(name), batches(name, 5, 5)
    found = evaluate(model, data, task="masked-lm", masking=masking)
    tokens = data[0].inputs["input_ids"]
    hidden = masking.positions(tokens, data[0].mask, data[0].keys)
    with torch.no_grad():
        inputs = data[0].inputs | {"input_ids": tokens.masked_fill(hidden, MASK)}
        logits = model(**inputs).logits[hidden]
    hits = metrics.top_k_hits(logits, tokens[hidden], 5).sum()
    assert found.dense is not None
    assert found.dense.tokens == int(hidden.sum())
    assert found.dense.top5_correct == int(hits)


def test_masking_spares_special_and_padding_tokens_and_depends_on_the_key_alone() -> None:
    masking = Masking(MASK, SPECIAL, fraction=0.5, seed=1)
    tokens = torch.tensor([[2, 10, 11, 12, 13, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    alone = masking.positions(tokens, mask, ["row 3"])
    assert alone.sum() == 2
    assert not alone[0, [0, 5, 6, 7]].any()
    among = masking.positions(torch.cat([tokens + 1, tokens]), torch.cat([mask, mask]), ["row 2", "row 3"])
    assert torch.equal(among[1], alone[0])
    shorter = masking.positions(tokens[:, :6], None, ["row 3"])
    assert torch.equal(shorter[0], alone[0, :6])
    chosen = {tuple(masking.positions(tokens, mask, [f"row {i}"])[0].tolist()) for i in range(30)}
    assert len(chosen) > 3


def test_a_sample_without_ordinary_tokens_has_none_hidden() -> None:
    masking = Masking(MASK, SPECIAL)
    assert not masking.positions(torch.tensor([[2, 3]]), None, ["empty"]).any()
    one = masking.positions(torch.tensor([[2, 9, 3]]), None, ["short"])
    assert one.tolist() == [[False, True, False]]


def test_texts_of_special_tokens_alone_count_for_nothing() -> None:
    model, masking = tiny.build("BertForMaskedLM"), Masking(MASK, SPECIAL, fraction=0.4)
    nothing = torch.tensor([[2, 3, 0, 0, 0, 0, 0, 0, 0, 0]])
    empty = EncodedBatch({"input_ids": nothing, "attention_mask": (nothing != 0).long()}, nothing != 0, [None], ["a"])
    data = batches("BertForMaskedLM", 4, 2)
    found = evaluate(model, [empty, *data], task="masked-lm", masking=masking, baseline=model)
    without = evaluate(model, data, task="masked-lm", masking=masking, baseline=model)
    assert found.dense is not None
    assert without.dense is not None
    assert found.dense.top1 == without.dense.top1
    assert found.fidelity is not None
    assert found.fidelity.kl == 0
    with pytest.raises(DataError, match="no token could be masked"):
        evaluate(model, [empty], task="masked-lm", masking=masking)


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    class Plain:
        mask_token_id = None
        all_special_ids: list[int] = []  # noqa: RUF012

    with pytest.raises(UsageError, match="no mask token"):
        Masking.from_tokenizer(Plain())


def test_regression_heads_are_scored_by_correlation() -> None:
    scores = [0.1 * i for i in range(30)]
    dense, noisy = torch.tensor(scores)[:, None], torch.tensor(scores).flip(0)[:, None]
    found = evaluate(
        Answers(noisy), numbered(scores), task="text-classification", label_of=float, baseline=Answers(dense)
    ).to_dict()
    assert found["metric"] == "spearman"
    assert found["dense"]["spearman"] == pytest.approx(1)
    assert found["compressed"]["spearman"] == pytest.approx(-1)
    assert found["difference"]["drop"] == pytest.approx(2)
    assert found["difference"]["significant"]
    assert found["fidelity"]["prediction_spearman"] == pytest.approx(-1)


def test_constant_predictions_have_no_correlation_but_a_report() -> None:
    found = evaluate(Answers(torch.zeros(8, 1)), numbered(list(range(8))), task="text-classification", label_of=float)
    assert found.dense is not None
    assert found.dense.spearman is None


def test_sentence_pairs_are_pooled_over_their_own_tokens() -> None:
    model = tiny.build("BertModel")
    first, second = batches("BertModel", 6, 4, [0.5 * i for i in range(6)]), batches("BertModel", 6, 4)
    found = evaluate_pairs([model], first, second, baseline=model)[0].to_dict()
    assert found["task"] == "similarity"
    assert found["fidelity"]["pooled_cosine"] == pytest.approx(1)
    assert found["difference"]["drop"] == pytest.approx(0)
    with pytest.raises(DataError, match="has a partner"):
        evaluate_pairs([model], first[:1], second[1:])[0]


def test_sentence_pairs_are_joined_by_key_whatever_the_order_and_the_batches() -> None:
    model = tiny.build("BertModel")
    first, second = batches("BertModel", 9, 4, list(range(9))), batches("BertModel", 9, 2)
    for batch in second:
        batch.inputs["input_ids"] = batch.inputs["input_ids"].roll(1, 1)
    whole = evaluate_pairs([model], first, second)[0].dense
    assert whole is not None
    shuffled = evaluate_pairs([model], first[::-1], second[2:] + second[:2])[0].dense
    assert shuffled is not None
    assert shuffled.pearson == pytest.approx(whole.pearson, abs=1e-5)
    fewer = evaluate_pairs([model], first, second[:3])[0]
    assert fewer.samples == 6


def test_pair_similarity_is_the_cosine_of_the_two_sentences() -> None:
    model = compressed("BertModel")
    first, second = batches("BertModel", 8, 8, list(range(8))), batches("BertModel", 8, 8)
    second[0].inputs["input_ids"] = second[0].inputs["input_ids"].flip(0)
    with torch.no_grad():
        one, other = (masked_mean(model(**side[0].inputs).last_hidden_state, side[0].mask) for side in (first, second))
    expected = metrics.spearman(torch.cosine_similarity(one, other), torch.arange(8))
    found = evaluate_pairs([model], first, second)[0].compressed
    assert found is not None
    assert found.spearman == pytest.approx(expected)


def test_worst_class_comes_first_and_disagreements_are_named() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    dense, worse = Answers(one_hot(labels, 3)), Answers(one_hot([0, 0, 2, 2, 2, 1], 3))
    found = evaluate(worse, numbered(labels), task="image-classification", label_of=int, baseline=dense)
    assert [row.class_ for row in found.classes] == ["1", "2", "0"]
    assert found.classes[0] == ClassScore("1", samples=2, dense=1.0, compressed=0.0)
    assert {row.sample for row in found.disagreements} == {"002.png", "003.png", "005.png"}


@pytest.mark.parametrize("label", [-1, 3, "1", None, True])
def test_labels_outside_the_model_name_the_sample(label: Any) -> None:
    with pytest.raises(DataError, match=r"001\.png.*0 to 2"):
        evaluate(
            Answers(one_hot([0, 1], 3)),
            numbered([0, label]),
            task="image-classification",
            label_of=lambda label: label,
        )


def test_labels_that_the_mapping_does_not_have_name_the_sample() -> None:
    with pytest.raises(DataError, match=r"001\.png.*'dog'"):
        evaluate(
            Answers(one_hot([0, 1], 3)),
            numbered(["cat", "dog"]),
            task="image-classification",
            label_of={"cat": 0}.__getitem__,
        )


def test_scores_that_are_no_numbers_name_the_sample() -> None:
    with pytest.raises(DataError, match=r"001\.png.*finite"):
        evaluate(Answers(torch.zeros(2, 1)), numbered([1.0, float("nan")]), task="text-classification", label_of=float)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample"):
        evaluate(Answers(torch.zeros(2, 2)), [], task="image-classification", label_of=int)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_stop_with_the_sample_and_the_model(value: float) -> None:
    logits = one_hot([0, 1], 3)
    broken = logits.clone()
    broken[1, 0] = value
    with pytest.raises(NumericsError, match=r"compressed model.*001\.png"):
        evaluate(Answers(broken), numbered([0, 1]), task="image-classification", label_of=int, baseline=Answers(logits))


class Cramped(Answers):
    """Runs out of memory above ``room`` samples a batch, and counts what it was asked."""

    def __init__(self, logits: Tensor, room: int) -> None:
        super().__init__(logits)
        self.room, self.asked = room, []  # type: tuple[int, list[int]]

    def forward(self, index: Tensor) -> Any:
        self.asked.append(len(index))
        if len(index) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(index)


def test_out_of_memory_halves_the_batch_and_remembers_it() -> None:
    labels = [i % 3 for i in range(20)]
    model, done = Cramped(one_hot(labels, 3), room=3), []
    found = evaluate(model, numbered(labels, size=8), task="image-classification", label_of=int, on_batch=done.append)
    assert found.dense is not None
    assert found.dense.correct == 20
    assert model.asked == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert sum(done) == 20


def test_out_of_memory_with_one_sample_says_so() -> None:
    with pytest.raises(VitshrinkError, match=r"one sample, 000\.png.*--device cpu"):
        evaluate(Cramped(one_hot([0, 1], 3), room=0), numbered([0, 1]), task="image-classification", label_of=int)


def test_out_of_memory_splits_pairs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("BertModel")
    first, second = batches("BertModel", 6, 6, list(range(6))), batches("BertModel", 6, 6)
    second[0].inputs["input_ids"] = second[0].inputs["input_ids"].roll(1, 0)
    whole = evaluate_pairs([model], first, second)[0]
    forward = model.forward

    def cramped(**inputs: Tensor) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", cramped)
    halves = evaluate_pairs([model], first, second)[0]
    assert whole.dense is not None
    assert halves.dense is not None
    assert halves.dense.pearson == pytest.approx(whole.dense.pearson, abs=1e-5)


def test_the_models_keep_their_training_mode_and_get_no_gradient() -> None:
    model = tiny.build("ViTForImageClassification").train()
    evaluate(model, batches("ViTForImageClassification", 2, 2, [0, 1]), task="image-classification", label_of=int)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_models_take_float32_batches() -> None:
    name = "ViTForImageClassification"
    half = tiny.build(name).to(torch.bfloat16)
    found = evaluate(half, batches(name, 4, 2), task="image-classification", baseline=tiny.build(name))
    assert found.fidelity is not None
    assert 0 < found.fidelity.kl < 0.5


def labeled(correct: int, samples: int, num_labels: int) -> Evaluation:
    labels = [i % num_labels for i in range(samples)]
    answers = [label if i < correct else (label + 1) % num_labels for i, label in enumerate(labels)]
    return evaluate(
        Answers(one_hot(answers, num_labels)), numbered(labels, 64), task="image-classification", label_of=int
    )


@pytest.mark.parametrize(
    ("correct", "samples", "num_labels"), [(0, 650, 1000), (20, 200, 10), (25, 60, 2), (1, 60, 100)]
)
def test_an_accuracy_near_chance_is_called_permuted_labels(correct: int, samples: int, num_labels: int) -> None:
    with pytest.raises(DataError, match="permuted"):
        check_labels(labeled(correct, samples, num_labels), num_labels)


@pytest.mark.parametrize(
    ("correct", "samples", "num_labels"),
    [(20, 650, 1000), (60, 200, 10), (45, 60, 2), (0, 5, 1000), (2, 4, 2), (55, 100, 5)],
)
def test_weak_models_and_few_samples_pass_the_label_check(correct: int, samples: int, num_labels: int) -> None:
    check_labels(labeled(correct, samples, num_labels), num_labels)


def test_the_label_check_leaves_other_tasks_alone() -> None:
    name = "BertForMaskedLM"
    found = evaluate(
        tiny.build(name), batches(name, 40, 8), task="masked-lm", masking=Masking(MASK, SPECIAL, fraction=0.5)
    )
    check_labels(found, len(tiny.VOCABULARY))


def share(rank: int, folder: str) -> None:
    """What one of two processes does: every second batch, and the figures to a file."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = two_models(batches("BertForMaskedLM", 10, 2)[rank::2])
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def two_models(data: list[EncodedBatch]) -> dict[str, Any]:
    name = "BertForMaskedLM"
    masking = Masking(MASK, SPECIAL, fraction=0.4)
    return evaluate(compressed(name), data, task="masked-lm", masking=masking, baseline=tiny.build(name)).to_dict()


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        share, args=(str(tmp_path),), nprocs=2, start_method=CONTEXT.get_start_method()
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == two_models(batches("BertForMaskedLM", 10, 2))


def test_batches_of_images_from_disk_are_evaluated(vit_directory: Path, class_images: Path) -> None:
    model = load(vit_directory)
    samples = open_samples(str(class_images), "image")
    classes, _ = align_labels(samples, model.config.id2label, 4)
    batches = Preprocessor.from_checkpoint(vit_directory, "image").batches(samples, 6)
    found = evaluate(model, batches, task="image-classification", label_of=classes.__getitem__)
    assert found.samples == 32
    assert {row.class_ for row in found.classes} == set(tiny.IMAGE_CLASSES)


@pytest.mark.parametrize("batch_size", [3, 40])
def test_masks_of_text_from_disk_do_not_depend_on_the_batch_size(
    masked_lm_directory: Path, text_file: Path, batch_size: int
) -> None:
    model, preprocessor = load(masked_lm_directory), Preprocessor.from_checkpoint(masked_lm_directory, "text")
    samples = open_samples(str(text_file), "text")
    masking = Masking.from_tokenizer(preprocessor.processor)
    found = evaluate(model, preprocessor.batches(samples, batch_size), task="masked-lm", masking=masking)
    whole = evaluate(model, preprocessor.batches(samples, 1), task="masked-lm", masking=masking)
    assert found.dense == whole.dense
    assert found.samples == 40


def real_accuracy(checkpoint: Path, data: Path, kind: Any) -> Evaluation:
    model = load(checkpoint, dtype=torch.float32)
    samples = open_samples(str(data), kind)
    classes, _ = align_labels(samples, model.config.id2label, model.config.num_labels)
    batches = Preprocessor.from_checkpoint(checkpoint, kind).batches(samples, 32)
    task = "image-classification" if kind == "image" else "text-classification"
    return evaluate(model, batches, task=task, label_of=classes.__getitem__)


@pytest.mark.real
def test_deit_tiny_has_its_known_accuracy_on_a_part_of_imagenet(real_folder: Path) -> None:
    found = real_accuracy(real_folder / "deit-tiny", real_folder / "imagenet-val", "image")
    assert found.dense is not None
    assert (found.dense.correct, found.samples) == (529, 650)
    assert found.dense.interval == pytest.approx((0.782, 0.842), abs=0.001)
    check_labels(found, 1000)


@pytest.mark.real
def test_a_sentiment_classifier_has_its_known_accuracy(real_folder: Path) -> None:
    found = real_accuracy(real_folder / "minilm-sst2", real_folder / "text" / "sst2" / "test.tsv", "text")
    assert found.dense is not None
    assert (found.dense.correct, found.samples) == (776, 872)
