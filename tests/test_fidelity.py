"""One notion of distance for each kind of head: in curvature, bounds, recovery and reports."""

import pytest
import tiny
import torch
from torch import Tensor

from vitshrink.data.batches import Batch
from vitshrink.evaluation import evaluate
from vitshrink.models.fidelity import (
    BERNOULLI,
    FEATURES,
    REGRESSION,
    SOFTMAX,
    Head,
    classification_head,
    feature_rows,
    measured,
)
from vitshrink.models.tasks import head_of
from vitshrink.recovery.answers import Reader
from vitshrink.recovery.objectives import Distillation, Supervision
from vitshrink.recovery.training_set import TrainingBatch
from vitshrink.statistics.functionals import divergences, random_functional

HEADS = {"softmax": SOFTMAX, "bernoulli": BERNOULLI, "regression": REGRESSION, "features": FEATURES}
PROBLEMS = {
    "single_label_classification": SOFTMAX,
    "multi_label_classification": BERNOULLI,
    "regression": REGRESSION,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int = 5, width: int = 4, seed: int = 0) -> Tensor:
    return 2 * torch.randn(count, width, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_divergence_is_zero_at_the_same_answer_and_positive_elsewhere(head: Head) -> None:
    dense, other = rows(), rows(seed=1)
    assert measured(head, dense, dense).abs().max() < 1e-12
    assert (measured(head, dense, other) > 0).all()
    assert measured(head, dense, other).shape == (5,)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_second_moment_of_the_probe_is_the_second_derivative_of_the_divergence(head: Head) -> None:
    dense = rows(1)[0]
    hessian = torch.func.hessian(lambda other: head.divergence(dense[None], other[None])[0])(dense)
    v = head.probe(dense.expand(60_000, 4), generator(1)).double()
    factor = 1 if head.measure == "kl" else 2  # KL ≈ ½ ΔᵀFΔ, and a squared error is ΔᵀΔ
    torch.testing.assert_close(factor * v.T @ v / len(v), hessian, rtol=0, atol=0.02)


def test_independent_labels_are_the_product_of_their_own_divergences() -> None:
    dense, other = rows(), rows(seed=1)

    def two(logits: Tensor) -> Tensor:
        return torch.stack([logits, torch.zeros_like(logits)], -1)  # yes and no as two classes

    each = SOFTMAX.divergence(two(dense), two(other))
    torch.testing.assert_close(measured(BERNOULLI, dense, other), each.sum(-1))
    certain = torch.tensor([[80.0, -80.0]])
    assert measured(BERNOULLI, certain, -certain).item() == pytest.approx(160)  # no infinity far out


def test_a_shift_of_all_logits_changes_labels_and_no_class() -> None:
    dense = rows()
    assert measured(SOFTMAX, dense, dense + 1).max() < 1e-12
    assert (measured(BERNOULLI, dense, dense + 1) > 0.1).all()


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_temperature_keeps_the_size_of_gradients(head: Head) -> None:
    dense = rows()
    near = dense + 1e-3 * rows(seed=1)
    plain, warm = head.divergence(dense, near), head.divergence(dense, near, temperature=1.0 + 1e-6)
    torch.testing.assert_close(plain, warm, rtol=1e-4, atol=0)


def test_no_constant_answer_is_better_than_the_one_that_errors_are_a_share_of() -> None:
    dense = rows(50, 3) + 7
    best = REGRESSION.spread(dense).sum()
    for shift in (-0.1, 0.1):
        assert REGRESSION.divergence(dense, REGRESSION.constant(dense) + shift).sum() > best
    torch.testing.assert_close(best, dense.var(0, correction=0).sum() * len(dense))


def test_feature_rows_weigh_real_tokens_and_their_mean() -> None:
    hidden, other = torch.randn(2, 5, 3, generator=generator()), torch.randn(2, 5, 3, generator=generator(1))
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    found = FEATURES.divergence(feature_rows(hidden, mask), feature_rows(other, mask))
    for sample, length in enumerate((5, 3)):
        d = (hidden - other)[sample, :length]
        assert found[sample].item() == pytest.approx(float(d.square().sum(-1).mean() + d.mean(0).square().sum()))


@pytest.mark.parametrize(("problem_type", "outputs", "head"), [
    (None, 4, SOFTMAX),
    (None, 1, REGRESSION),
    ("single_label_classification", 2, SOFTMAX),
    ("multi_label_classification", 4, BERNOULLI),
    ("multi_label_classification", 1, BERNOULLI),
    ("regression", 1, REGRESSION),
    ("regression", 3, REGRESSION),
])  # fmt: skip
def test_the_head_is_what_the_config_says(problem_type: str | None, outputs: int, head: Head) -> None:
    assert classification_head(problem_type, outputs) is head


def batch_of(name: str, count: int = 6) -> Batch:
    inputs = tiny.inputs(name, batch=count)
    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    return Batch(inputs, mask, [None] * count, [f"row {i}" for i in range(count)])


@pytest.mark.parametrize(
    ("name", "problem_type"),
    [
        *(("BertForSequenceClassification", problem_type) for problem_type in PROBLEMS),
        ("ViTForImageClassification", "multi_label_classification"),
        ("BertModel", None),
        ("ViTModel", None),
    ],
)
@torch.no_grad()
def test_curvature_recovery_and_report_agree(name: str, problem_type: str | None) -> None:
    """The same small step away from the dense model costs the same in all three."""
    dense, near = tiny.build(name), tiny.build(name)
    for model in (dense, near):
        model.config.problem_type = problem_type
    for parameter in near.encoder.layer.parameters() if name == "BertModel" else near.parameters():
        parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator(3)))
    batch = batch_of(name)
    task = {"BertForSequenceClassification": "text-classification", "ViTForImageClassification": "image-classification"}
    evaluation = evaluate(near, [batch], task=task.get(name, "features"), baseline=dense)
    head = head_of(dense)
    assert head is (PROBLEMS[problem_type] if problem_type else FEATURES)
    assert evaluation.fidelity is not None
    reported = getattr(evaluation.fidelity, head.measure)

    training = TrainingBatch(batch.inputs, batch.mask, torch.arange(6))
    answers = Reader(dense)(training), Reader(near)(training)
    scale = float(head.spread(answers[0]).mean()) if head.measure == "relative_error" else 1.0
    trained = float(Distillation(head, scale=scale).loss(answers[1], answers[0]).mean())
    assert trained == pytest.approx(reported, rel=2e-2)

    wanted, found = dense(**batch.inputs), near(**batch.inputs)
    squares = []
    for seed in range(3000):
        functional = random_functional(dense, wanted, batch, generator(seed))
        squares.append((functional(wanted) - functional(found)).double().square().mean())
    direct = divergences(dense, wanted, found, batch, generator(0))
    assert direct.shape == (6, 2)
    assert float(direct[:, 0].mean()) / scale == pytest.approx(reported, rel=2e-2)
    assert float(direct[:, 1].mean()) == pytest.approx(float(head.spread(answers[0]).mean()), rel=1e-3)
    factor = 0.5 if head.measure == "kl" else 1 / scale
    assert factor * float(torch.stack(squares).mean()) == pytest.approx(reported, rel=0.1)


def test_supervision_is_the_loss_that_transformers_trains_with() -> None:
    answer, labels = rows(6, 4).float(), torch.tensor([[1, 0, 1, 0]] * 6)
    loss = Supervision(BERNOULLI, smoothing=0.0).loss(answer, labels, None).mean()
    torch.testing.assert_close(loss, torch.nn.BCEWithLogitsLoss()(answer, labels.float()))
    scores = rows(6, 2, seed=1).float()
    loss = Supervision(REGRESSION, smoothing=0.0).loss(answer[:, :2], scores, None).mean()
    torch.testing.assert_close(loss, torch.nn.MSELoss()(answer[:, :2], scores))
    smooth = Supervision(BERNOULLI, smoothing=0.2).loss(answer, labels, None)
    torch.testing.assert_close(smooth.mean(), torch.nn.BCEWithLogitsLoss()(answer, 0.8 * labels + 0.1))
