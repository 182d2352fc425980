"""Recovery: training brings a compressed model nearer to the dense one, and never takes it further away."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor, SampleSet, open_samples
from vitshrink.errors import DataError, NumericsError, UsageError
from vitshrink.models.checkpoint import compressed_layers, replace_layers
from vitshrink.models.pivoting import fix_gauge
from vitshrink.models.targets import blocks_of, find_targets
from vitshrink.recovery import Material, Recovery, recover
from vitshrink.recovery.optimizer import optimizer_of
from vitshrink.recovery.progress import MOST_RETREATS, Progress
from vitshrink.recovery.techniques.factors import pack, unpack
from vitshrink.recovery.techniques.hidden import FEATURES, MOST_FEATURES, weight_from
from vitshrink.recovery.training import Loop
from vitshrink.runtime.observer import Job, Observer, Silent


class Listening(Silent):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


QUICK = FinetuneConfig(epochs=4, batch_size=8, learning_rate=2e-3)


def truncated(dense: PreTrainedModel, rank: int = 8, *, pivots: bool = True) -> PreTrainedModel:
    """All linear layers of the blocks at one rank, by plain SVD."""
    model = copy.deepcopy(dense)
    targets = find_targets(model)
    replace_layers(model, {t.name: tiny.low_rank(model.get_submodule(t.name), rank) for t in targets})
    if pivots:
        fix_gauge(model, targets)
    return model


@pytest.fixture(scope="module")
def train(
    checkpoint: Callable[[str], Path], flat_images: Path, text_file: Path
) -> Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]]:
    """``train(name, **settings)``: the compressed model before and after, and what is said of it."""

    def run(
        name: str,
        *,
        config: FinetuneConfig = QUICK,
        data: Path | None = None,
        seen: Callable[[SampleSet], Iterable[str]] = lambda _samples: (),
        observer: Observer | None = None,
        **settings: Any,
    ) -> tuple[PreTrainedModel, PreTrainedModel, Recovery]:
        kind = "text" if name in tiny.TEXT_MODELS else "image"
        dense = tiny.build(name)
        before = truncated(dense)
        after = copy.deepcopy(before)
        samples = open_samples(data or (text_file if kind == "text" else flat_images), kind)
        label_of = None
        if config.objective == "supervised" or settings.get("objective") == "supervised":
            label_of = tiny.IMAGE_CLASSES.index
        preprocessor = Preprocessor.from_checkpoint(checkpoint(name), kind)
        recovery = recover(
            after,
            dense,
            Material(samples, label_of, seen=frozenset(seen(samples))),
            preprocessor,
            replace(config, **settings),
            Job(observer or Silent()),
        )
        return before, after, recovery

    return run


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_architecture_comes_nearer_to_its_dense_model_and_keeps_its_size(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]], name: str
) -> None:
    before, after, recovery = train(name)
    assert recovery.after < 0.9 * recovery.before
    assert recovery.history[0]["held_out"] == recovery.before
    specs = [{n: (s.rank, s.spec.pivot is None) for n, s in compressed_layers(m).items()} for m in (before, after)]
    assert specs[0] == specs[1]
    assert sum(p.numel() for p in before.parameters()) == sum(p.numel() for p in after.parameters())
    x = tiny.inputs(name)
    dense = tiny.build(name)
    with torch.no_grad():
        errors = [(m(**x)[0] - dense(**x)[0]).square().sum().item() for m in (before, after)]
    assert errors[1] < errors[0]
    assert not after.training
    assert "forward" not in after.__dict__, "what accelerate wrapped around the model is gone"


@pytest.mark.parametrize(
    "settings",
    [
        {"blockwise": 2},
        {"reversible": True},
        {"reversible": True, "gamma": 0.125, "momentum": True},
        {"bdia": True, "decatt": 0.1},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "decatt": 0.1},
        {"accumulation": 2, "train": "factors"},
        {"views": 2, "features": 1.0},
        {"augment": False, "precision": "bf16"},
        {"mixing": 0.5, "temperature": 2.0},
        {"features": 0.0, "views": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", pytest.param("BertForSequenceClassification", marks=pytest.mark.slow)]
)
def test_every_technique_trains(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]], name: str, settings: dict[str, Any]
) -> None:
    _, after, recovery = train(name, **settings)
    assert recovery.after < recovery.before
    assert all("forward" not in block.__dict__ for block in blocks_of(after))


def test_only_factors_learn_where_only_they_should(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
) -> None:
    before, after, _ = train("ViTForImageClassification", train="factors")
    assert torch.equal(before.classifier.weight, after.classifier.weight)
    changed = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    # the biases of the layers before an MLP's second one follow its pivots
    assert all(n.endswith((".weight", ".down", "fc1.bias")) for n in changed)
    assert all(p.requires_grad for p in after.parameters()), "what is frozen is frozen for the training only"


def test_gradient_checkpointing_changes_memory_and_nothing_else(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
) -> None:
    plain, recomputed = (
        train("ViTForImageClassification", gradient_checkpointing=flag, precision="no")[1] for flag in (False, True)
    )
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_model(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
) -> None:
    assert same(train("ViTForImageClassification")[1], train("ViTForImageClassification")[1])


def test_a_training_that_only_harms_leaves_the_model_as_it_was(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
) -> None:
    before, after, recovery = train("ViTForImageClassification", learning_rate=1e4, patience=2)
    assert recovery.after == recovery.before
    assert recovery.ended in ("early", "done", "diverged")
    assert recovery.best_step == 0
    x = tiny.inputs("ViTForImageClassification")
    with torch.no_grad():
        torch.testing.assert_close(before(**x).logits, after(**x).logits, rtol=1e-3, atol=1e-3)


def test_a_learning_rate_that_destroys_is_lowered_and_training_begins_again(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
) -> None:
    observer = Listening()
    _, _, recovery = train("ViTForImageClassification", learning_rate=0.3, epochs=40, patience=100, observer=observer)
    assert recovery.after < 0.9 * recovery.before
    first = next(message for message in observer.messages if "starts again" in message)
    assert "learning rate 3.0e-01" in first
    rates = [entry["learning_rate"] for entry in recovery.history]
    assert max(rates[len(rates) // 2 :]) <= 0.1


def test_a_learning_rate_that_gains_nothing_for_so_long_as_patience_lasts_is_lowered() -> None:
    progress = Progress(steps_an_epoch=10, epochs=10, history=[{"held_out": 2.0, "step": 0}])
    assert progress.keeps([2.0])
    for step in (10, 20):
        progress.step = step
        progress.history.append({"held_out": 2.1, "step": step})
        assert not progress.keeps([2.1])
        assert not progress.destroyed(2.1)
    assert progress.stale(2)
    before = progress.learning_rate
    progress.retreat()
    assert not progress.stale(2)
    assert progress.learning_rate < before / 2
    progress.step = 30
    assert progress.keeps([1.9])
    assert not progress.destroyed(20.0), "only what has gained nothing is given up at once"
    for _ in range(MOST_RETREATS - 1):
        assert progress.may_retreat
        progress.retreat()
    assert not progress.may_retreat


def test_after_gains_too_a_rate_that_brings_nothing_more_is_lowered_from_the_best_state(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
) -> None:
    observer = Listening()
    _, _, recovery = train("ViTForImageClassification", learning_rate=0.02, epochs=60, patience=1, observer=observer)
    assert recovery.best_step > 0
    assert not any("starts again" in message for message in observer.messages)
    rates = [entry["learning_rate"] for entry in recovery.history[1:]]
    lowered = [number for number, rate in enumerate(rates[1:], 1) if rate < rates[number - 1] / 2.5]
    assert lowered
    start = [entry["held_out"] for entry in recovery.history][lowered[0] + 1]
    assert start < recovery.before, "what was gained is not given up for another rate"


def test_of_states_that_cannot_be_told_apart_the_later_is_kept_but_none_worse_than_the_start() -> None:
    def judged(*rows: float) -> bool:
        progress.step += 1
        return progress.keeps(list(rows))

    progress = Progress(steps_an_epoch=10, epochs=1, history=[{"held_out": 2.0, "step": 0}])
    assert progress.keeps([1.0, 2.0, 3.0])
    assert judged(0.5, 1.0, 1.5), "better"
    assert judged(0.4, 1.3, 1.4), "worse by less than chance"
    assert (progress.best_step, progress.best) == (2, pytest.approx(1.0333, abs=1e-4))
    assert not judged(0.6, 1.1, 1.6), "worse by as much in every row"
    assert not judged(0.1, 0.1, 5.9), "perhaps not worse than the best, but worse than the start"
    assert not judged(float("nan"), 0.0, 0.0)
    assert progress.best_step == 2


def test_a_training_that_gains_nothing_says_so(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
) -> None:
    observer = Listening()
    _, _, recovery = train("ViTForImageClassification", learning_rate=1e-12, epochs=1, observer=observer)
    gained = recovery.after < recovery.before
    assert gained != any("gained nothing" in message for message in observer.messages)
    _, _, recovery = train("ViTForImageClassification", learning_rate=1e4, epochs=1, observer=observer)
    assert recovery.after == recovery.before
    assert "gained nothing" in observer.messages[-1]


def test_samples_that_the_model_was_not_fitted_to_judge_it_or_else_other_views_of_the_same(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
) -> None:
    *_, unseen = train("ViTForImageClassification", seen=lambda samples: samples.marks[10:], epochs=1)
    assert not unseen.familiar
    *_, familiar = train("ViTForImageClassification", seen=lambda samples: samples.marks, epochs=1)
    assert familiar.familiar
    *_, plain = train("ViTForImageClassification", epochs=1)
    assert not plain.familiar
    assert familiar.before != plain.before, "the same samples as another view of them"
    *_, fixed = train("ViTForImageClassification", seen=lambda samples: samples.marks, epochs=1, augment=False)
    assert fixed.before == plain.before
    assert len(plain.fitted_to) == plain.samples
    assert len(familiar.fitted_to) == familiar.samples + familiar.held_out


def test_labels_teach_too(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]], learned_images: Path
) -> None:
    _, _, recovery = train("ViTForImageClassification", data=learned_images, objective="supervised", epochs=8)
    assert recovery.after < recovery.before
    assert recovery.objective == "supervised"


def test_time_ends_a_training(train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]]) -> None:
    _, _, recovery = train("ViTForImageClassification", epochs=1000, minutes=1 / 60, patience=10**6)
    assert recovery.ended == "time"
    assert recovery.history[-1]["learning_rate"] < 1e-4, "the schedule ends with the time"


def test_numbers_that_are_not_finite_take_training_back_to_the_last_good_state(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitshrink.recovery.criteria import Criterion

    healthy, calls = Criterion.training_loss, []

    def sick(self: Criterion, batch: Any, epoch: int) -> torch.Tensor:
        calls.append(epoch)
        loss = healthy(self, batch, epoch)
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(Criterion, "training_loss", sick)
    _, after, recovery = train("ViTForImageClassification")
    assert recovery.after < recovery.before
    assert all(p.isfinite().all() for p in after.parameters())

    monkeypatch.setattr(Criterion, "training_loss", lambda *args: healthy(*args) * float("inf"))
    _, after, recovery = train("ViTForImageClassification")
    assert recovery.ended == "diverged"
    assert recovery.after == recovery.before


def test_a_killed_training_goes_on_where_it_was_and_ends_the_same(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        pass

    whole = train("ViTForImageClassification", precision="no")[1]
    healthy = Loop._after_step

    def dies(loop: Loop) -> str:
        if loop.progress.step == 7:
            raise Killed
        return healthy(loop)

    checkpoints = str(tmp_path / "state")
    monkeypatch.setattr(Loop, "_after_step", dies)
    with pytest.raises(Killed):
        train("ViTForImageClassification", precision="no", checkpoints=checkpoints)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"another job .*settings"):
        train("ViTForImageClassification", precision="no", checkpoints=checkpoints, epochs=9)
    _, resumed, recovery = train("ViTForImageClassification", precision="no", checkpoints=checkpoints)
    assert same(whole, resumed)
    assert [entry["step"] for entry in recovery.history] == [0, 2, 4, 6, 8]
    assert (Path(checkpoints) / "state").is_dir(), "nothing is lost before the model is saved"


@pytest.mark.slow
def test_a_training_killed_after_it_went_back_goes_on_from_there(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        pass

    settings = {"precision": "no", "learning_rate": 0.02, "patience": 1, "epochs": 60}
    _, whole, undisturbed = train("ViTForImageClassification", **settings)
    healthy = Loop._after_step

    def dies(loop: Loop) -> str:
        if loop.progress.retreats:
            raise Killed
        return healthy(loop)

    checkpoints = str(tmp_path / "state")
    monkeypatch.setattr(Loop, "_after_step", dies)
    with pytest.raises(Killed):
        train("ViTForImageClassification", **settings, checkpoints=checkpoints)
    monkeypatch.undo()
    _, resumed, recovery = train("ViTForImageClassification", **settings, checkpoints=checkpoints)
    assert same(whole, resumed)
    steps = [[(entry["step"], entry["held_out"]) for entry in each.history] for each in (undisturbed, recovery)]
    assert steps[0] == steps[1]


def test_what_cannot_be_trained_is_refused(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="at least 16"):
        train("ViTForImageClassification", data=tiny.write_images(tmp_path / "few", 5))
    with pytest.raises(UsageError, match="predicts labels"):
        train("BertForMaskedLM", objective="supervised")
    samples = open_samples(tiny.write_images(tmp_path / "more", 20), "image")
    model = truncated(tiny.build("ViTForImageClassification"))
    preprocessor = Preprocessor.from_checkpoint(tiny.write("ViTForImageClassification", tmp_path / "vit"), "image")
    with pytest.raises(UsageError, match="--teacher"):
        recover(model, None, Material(samples), preprocessor, QUICK, Job(Silent()))
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    dense = tiny.build("ViTForImageClassification")
    with pytest.raises(NumericsError, match="not finite"):
        recover(model, dense, Material(samples), preprocessor, QUICK, Job(Silent()))


def test_a_broken_image_is_left_out_and_named(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]], tmp_path: Path
) -> None:
    folder = tiny.write_images(tmp_path / "images", 24)
    (folder / "broken.png").write_bytes(b"not an image")
    _, _, recovery = train("ViTForImageClassification", data=folder)
    assert recovery.samples + recovery.held_out == 24
    (folder / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"broken\.png|empty\.png"):
        train("ViTForImageClassification", data=folder)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertModel"])
def test_plain_factors_and_back_lose_nothing(name: str) -> None:
    model = truncated(tiny.build(name))
    x = tiny.inputs(name)
    with torch.no_grad():
        before = model(**x)[0]
        pivots = unpack(model)
        assert all(layer.spec.pivot is None for layer in compressed_layers(model).values())
        for layer in compressed_layers(model).values():
            up, down = layer.factors()
            torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**x)[0], before, rtol=1e-4, atol=1e-4)
        pack(model, pivots)
        assert all(layer.spec.pivot is not None for layer in compressed_layers(model).values())
        torch.testing.assert_close(model(**x)[0], before, rtol=1e-4, atol=1e-4)


def test_a_step_moves_all_directions_of_a_matrix_alike_and_its_state_can_be_taken_up() -> None:
    model = tiny.build("ViTForImageClassification")
    parameters = dict(model.named_parameters())
    matrix = next(p for name, p in parameters.items() if name.endswith("q_proj.weight") or "query.weight" in name)

    def step(optimizer: torch.optim.Optimizer, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        U, S, Vh = torch.linalg.svd(torch.randn(matrix.shape, generator=generator))
        matrix.grad = U @ torch.logspace(0, -1, len(S)).diag() @ Vh
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * group["share"]
        before = matrix.detach().clone()
        optimizer.step()
        return matrix.detach() - before

    first = optimizer_of(model, parameters.values())
    groups = [{id(p) for p in group["params"]} for group in first.param_groups]
    assert [id(matrix) in group for group in groups] == [True, False]
    assert sum(map(len, groups)) == len(parameters)
    assert all(p.ndim == 2 for p in first.param_groups[0]["params"])
    values = torch.linalg.svdvals(step(first, 0).double())
    assert values[0] / values[-1] < 2, "of the gradient they differ tenfold"

    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(first.state_dict())
    want = step(first, 1)
    model.load_state_dict(weights)
    again = optimizer_of(model, parameters.values())
    again.load_state_dict(state)
    assert torch.equal(step(again, 1), want)


def test_what_blocks_hand_on_counts_the_less_the_more_was_lost_at_the_start(
    train: Callable[..., tuple[PreTrainedModel, PreTrainedModel, Recovery]], learned_images: Path
) -> None:
    weights = [weight_from(start, 2.0) for start in (0.0, 0.5, 1.0, 1.9, 2.0, 5.0)]
    assert weights == sorted(weights, reverse=True)
    assert (weights[0], weights[-1]) == (MOST_FEATURES, FEATURES)
    *_, usual = train("ViTForImageClassification", epochs=1)
    assert FEATURES <= usual.settings["features"] <= MOST_FEATURES
    *_, given = train("ViTForImageClassification", epochs=1, features=7.0)
    assert given.settings["features"] == 7.0
    *_, labels = train("ViTForImageClassification", data=learned_images, objective="supervised", distillation=0.5)
    assert labels.settings["features"] == FEATURES
