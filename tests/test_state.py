"""What a job keeps on disk: exact, and small beside the model."""

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from vitshrink.config.options import CompressConfig
from vitshrink.jobs.compress import compress
from vitshrink.methods import Factorization, get_method
from vitshrink.runtime.entries import packed, read_metadata, read_tensors, same_bits, unpacked, write_tensors
from vitshrink.runtime.state import Progress, state_directory
from vitshrink.statistics.stats import LinearStats, gram_of

CPU = torch.device("cpu")


def statistics(seed: int = 0) -> LinearStats:
    """Of a layer (12, 12), with gradients."""
    torch.manual_seed(seed)
    found, gradients = LinearStats.from_inputs(torch.randn(40, 12)), torch.randn(40, 12).double()
    return LinearStats(
        found.tokens, found.mean, found.gram, gradient_gram=gram_of(gradients) / 40, gradient_power=float(12)
    )


def test_what_is_read_has_the_bits_of_what_was_written(tmp_path: Path) -> None:
    whole = torch.randn(6, 6, dtype=torch.float64)
    tensors = {
        "symmetric": whole + whole.T,
        "one bit from it": (whole + whole.T).index_put((torch.tensor(0), torch.tensor(1)), whole[0, 0]),
        "not symmetric": whole,
        "transposed": whole.T,
        "a row of it": whole[2],
        "zeros": torch.zeros(2, 2),
        "zeros of both signs": torch.tensor([[0.0, -0.0], [0.0, 0.0]]),
        "a number": torch.tensor(3),
        "half": whole.to(torch.bfloat16),
        "nothing": torch.zeros(0, 0),
    }
    tensors |= {f"{name} again": tensor.clone() for name, tensor in tensors.items()}
    write_tensors(tmp_path / "file", tensors, {"done": "7"})
    found = read_tensors(tmp_path / "file", CPU)
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    assert all(found[name].shape == tensor.shape and found[name].is_contiguous() for name, tensor in tensors.items())
    assert read_metadata(tmp_path / "file") == {"done": "7"}


def test_symmetric_matrices_take_half_and_equal_ones_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gram = gram_of(torch.randn(300, 200)).double()
    write_tensors(tmp_path / "file", {"query": gram, "key": gram.clone(), "value": gram}, {})
    assert (tmp_path / "file").stat().st_size < 0.51 * gram.nbytes


@pytest.mark.parametrize("name", ["whitened", "curvature"])
def test_factors_follow_again_from_statistics_that_were_read(name: str, tmp_path: Path) -> None:
    weight, stats = torch.randn(12, 12).double(), statistics()
    write_tensors(tmp_path / "file", packed({"layer": stats}), {})
    again = unpacked(LinearStats, read_tensors(tmp_path / "file", CPU))["layer"]
    factorize = get_method(name).factorize
    one, other = (factorize(weight, each, centered=True) for each in (stats, again))
    for field in fields(Factorization):
        first, second = getattr(one, field.name), getattr(other, field.name)
        assert (first is None and second is None) or same_bits(first, second)


def test_sums_make_room_for_the_statistics_that_are_made_of_them(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "state", every=0)
    sums: dict[str, Tensor] = {str(n): torch.ones(4) for n in range(30)}
    progress.keep_sums("dense", 2, lambda: sums)
    ((done, found),) = progress.sums("dense").items()
    assert done == 2
    assert found.keys() == sums.keys()
    progress.finish_sums("dense")
    assert progress.sums("dense"), "until there is something to keep in their place"
    progress.keep("dense-statistics", {"layer": statistics()})
    assert progress.sums("dense") == {}
    assert progress.entries("dense-statistics", LinearStats).keys() == {"layer"}
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"job.json", "dense-statistics.safetensors"}


def test_a_step_is_not_forgotten_before_the_one_that_overtakes_it_is_saved(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "state", every=0)
    progress.keep("first", {"layer": statistics(1)})
    progress.every = 3600
    progress.keep("second", {"layer": statistics(2)})
    progress.forget("first")
    after_a_kill = Progress(tmp_path / "state", every=0)
    assert after_a_kill.entries("first", LinearStats)
    progress.every = 0
    progress.keep("third", {"layer": statistics(3)})
    assert not after_a_kill.entries("first", LinearStats)
    assert after_a_kill.entries("second", LinearStats)


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """Bytes of all that lies in the state of the job that writes ``out``, when it was most."""
    most = 0
    replace = os.replace

    def weighing(*paths: Any) -> None:
        nonlocal most
        files = state_directory(tmp_path / "out").rglob("*")
        most = max(most, sum(path.stat().st_size for path in files if path.is_file()))
        replace(*paths)

    monkeypatch.setattr(os, "replace", weighing)
    monkeypatch.setattr("vitshrink.report.figures.available", lambda: False)
    return lambda: most


def test_the_state_of_a_job_stays_below_twice_the_model(
    weighed: Callable[[], int], flat_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitshrink.statistics.halves.BLOCK", 16)  # to the width as 128 is to 512
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
    model = tiny.write("ViTForImageClassification", tmp_path / "model", **shape)
    job = {"model": str(model), "output": str(tmp_path / "out"), "calibration": str(flat_images), "keep": [0.6]}
    compress(CompressConfig.from_mapping(job | {"samples": 16, "batch_size": 4, "refine": 2, "save_every": 0}))
    assert 0 < weighed() <= 2 * (model / "model.safetensors").stat().st_size
