"""What a job is lent comes back as it was: modes, random numbers, what accelerate keeps; and nothing is noise."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

import vitshrink
from vitshrink.compression.repairs.sequential import compensate_residuals
from vitshrink.config.options import CompressConfig, FinetuneConfig
from vitshrink.data import Preprocessor, open_samples
from vitshrink.evaluation import evaluate
from vitshrink.jobs.compress import compress
from vitshrink.jobs.inspection.activations import sample_activations
from vitshrink.models import checkpoint, cost
from vitshrink.models.targets import blocks_of, find_targets
from vitshrink.recovery import Material, recover
from vitshrink.recovery.techniques.augmentation import Augmentation
from vitshrink.recovery.training_set import TrainingBatch
from vitshrink.report import figures
from vitshrink.runtime.observer import Job, Silent
from vitshrink.runtime.seeds import generator_of
from vitshrink.statistics.calibration import collect
from vitshrink.statistics.curvature import collect_curvature
from vitshrink.statistics.effects import Components, component_effects, shortfall
from vitshrink.statistics.needs import Needs
from vitshrink.statistics.reference import DenseOutputs

CLASSIFIER = "BertForSequenceClassification"
"""Its dropout is 10 %, as usual for BERT."""


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    mask: Tensor
    labels: list[Any]
    keys: list[str]


def batch() -> Batch:
    inputs = tiny.inputs(CLASSIFIER, 6)
    return Batch(inputs, inputs["attention_mask"].bool(), [0] * 6, [str(row) for row in range(6)])


def lent(seed: int = 0) -> PreTrainedModel:
    """A model that somebody trains, but for one block and for the parameters of another."""
    model = tiny.build(CLASSIFIER, seed).train()
    blocks_of(model)[0].eval()
    blocks_of(model)[1].requires_grad_(False)
    return model


def state(model: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )


def truncated(dense: PreTrainedModel, rank: int = 8) -> PreTrainedModel:
    model = copy.deepcopy(dense)
    layers = {target.name: tiny.low_rank(model.get_submodule(target.name), rank) for target in find_targets(model)}
    checkpoint.replace_layers(model, layers)
    return model


def components(model: PreTrainedModel) -> dict[str, Components]:
    found = {}
    for target in find_targets(model):
        up, down = tiny.low_rank(model.get_submodule(target.name), 4).factors()
        found[target.name] = Components(up.detach(), down.detach(), torch.zeros(target.shape[1]))
    return found


def residuals(model: PreTrainedModel) -> Tensor:
    small, targets = truncated(model), find_targets(model)
    before = state(small)
    compensate_residuals(
        small, blocks_of(small), targets, {t.name: model.get_submodule(t.name) for t in targets}, [batch()]
    )
    assert state(small) == before
    return torch.cat([parameter.flatten() for parameter in small.parameters()])


WORK: dict[str, Callable[[PreTrainedModel], Any]] = {
    "covariances": lambda model: [
        s.mean for s in collect(model, find_targets(model), [batch()], Needs.COVARIANCE).values()
    ],
    "curvature": lambda model: [s.mean for s in collect_curvature(model, find_targets(model), [batch()]).values()],
    "effects": lambda model: list(component_effects(model, components(model), [batch()]).layers.values()),
    "shortfall": lambda model: shortfall(model, DenseOutputs(lent(1)), [batch()]),
    "reference": lambda model: DenseOutputs(model)(batch()).logits,
    "activations": lambda model: list(sample_activations(model, find_targets(model), [batch()]).inputs.values()),
    "residuals": residuals,
    "figures": lambda model: torch.tensor(
        evaluate(model, [batch()], task="text-classification", baseline=lent(1)).fidelity.kl  # type: ignore[union-attr]
    ),
    "operations": lambda model: torch.tensor(cost.macs(model, batch().inputs)),
    "latency": lambda model: torch.tensor(cost.latency({"a": model}, batch().inputs, repeats=1)["a"].repeats),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_whatever_its_mode_a_model_is_run_without_noise_and_comes_back_as_it_was(
    work: Callable[[PreTrainedModel], Any],
) -> None:
    quiet, training = tiny.build(CLASSIFIER), lent()
    before = state(training)
    torch.testing.assert_close(work(training), work(quiet), rtol=0, atol=0)
    assert state(training) == before


def test_a_wrapper_in_training_mode_does_not_reach_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Tensor) -> Any:
            return self.model(**inputs)

    wrapper = Wrapper(tiny.build(CLASSIFIER))
    before = state(wrapper)
    evaluate(tiny.build(CLASSIFIER, 1), [batch()], task="text-classification", baseline=wrapper)
    assert state(wrapper) == before


def test_a_bound_gives_the_same_bytes_each_time(
    checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    found = []
    for number in range(2):
        entries: dict[str, Any] = {"calibration": str(text_file), "samples": 16, "holdout": 16, "refine": 0}
        (result,) = compress(
            CompressConfig(str(checkpoint(CLASSIFIER)), str(tmp_path / f"{number}"), max_kl=0.05, **entries)
        )
        assert result.directory is not None
        found.append((result.directory / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "choices", [{"max_kl": 0.05, "refine": 0}, {"keep": 0.8}, {"keep": 0.9, "method": "qk-joint"}], ids=str
)
def test_python_is_given_models_that_do_not_train_and_keeps_its_own(
    checkpoint: Callable[[str], Path], text_file: Path, choices: dict[str, Any]
) -> None:
    model = lent()
    before, drawn = state(model), (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())  # type: ignore[index]
    tokenizer = Preprocessor.from_checkpoint(checkpoint(CLASSIFIER), "text").processor
    texts = text_file.read_text().splitlines()
    small = vitshrink.compress(model, texts, processor=tokenizer, samples=16, holdout=16, **choices).model
    assert not [name for name, module in small.named_modules() if module.training]
    assert state(model) == before
    assert random.getstate() == drawn[0]
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert np.random.get_state()[1].tolist() == drawn[2]  # type: ignore[index]


@pytest.mark.parametrize("settings", [{}, {"blockwise": 1, "reversible": True}, {"train": "factors"}], ids=str)
def test_recovery_learns_from_a_quiet_teacher_and_gives_everything_back(
    checkpoint: Callable[[str], Path], text_file: Path, settings: dict[str, Any]
) -> None:
    samples = open_samples(text_file, "text")
    preprocessor = Preprocessor.from_checkpoint(checkpoint(CLASSIFIER), "text")
    config = FinetuneConfig(epochs=1, batch_size=8, learning_rate=2e-3, **settings)
    trained = []
    for teacher in (tiny.build(CLASSIFIER), lent()):
        own = Accelerator(cpu=True, gradient_accumulation_steps=3)
        kept = [dict(each._shared_state) for each in (AcceleratorState, GradientState, PartialState)]
        model = truncated(tiny.build(CLASSIFIER))
        model.classifier.requires_grad_(False)
        before = state(model), state(teacher)
        drawn = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
        recover(model, teacher, Material(samples), preprocessor, config, Job(Silent()))
        assert (state(model), state(teacher)) == before
        assert random.getstate() == drawn[0]
        assert torch.equal(torch.get_rng_state(), drawn[1])
        assert np.random.get_state()[1].tolist() == drawn[2]  # type: ignore[index]
        assert [each._shared_state for each in (AcceleratorState, GradientState, PartialState)] == kept
        assert own.gradient_accumulation_steps == 3
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        trained.append(model.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_random_numbers_follow_from_names_alone() -> None:
    """On any machine and with any Python, whose ``hash`` takes -1 for -2."""
    images = TrainingBatch({"pixel_values": tiny.inputs("ViTModel")["pixel_values"]}, None, torch.arange(3))
    views = [Augmentation(0).apply(images, view).inputs["pixel_values"] for view in (-1, -2, -1)]
    assert not torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    assert torch.randint(1000, (3,), generator=generator_of(1, "a", -1)).tolist() == [513, 338, 69]
