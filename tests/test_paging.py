"""Tensors in files instead of in memory: the same numbers, the same results, and nothing left behind."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from vitshrink.config.options import CompressConfig
from vitshrink.jobs.compress import compress
from vitshrink.models.views import view_of
from vitshrink.runtime import paging, resting
from vitshrink.runtime.paging import in_file, page_weights, paged, rest
from vitshrink.statistics import recomputing


@dataclass(frozen=True, eq=False)
class Entry:
    large: Tensor
    small: Tensor
    number: float = 1.0


def entries() -> dict[str, Entry]:
    large = torch.randn(300, 200, dtype=torch.float64)
    return {
        "one": Entry(large, torch.ones(3)),
        "other": Entry(large, torch.zeros(3)),
        "turned": Entry(large.T, large[0]),
    }


def test_what_lies_in_files_has_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resting, "MANY", -(2**62))  # let go of, however little it is
    given = entries()
    found = paged(given, tmp_path)
    for _ in range(2):
        for name, entry in given.items():
            assert torch.equal(found[name].large, entry.large)
            assert torch.equal(found[name].small, entry.small)
            assert found[name].number == entry.number
            assert found[name].large.is_contiguous()
        rest()
    assert found["one"].large is found["other"].large, "what is shared lies there once"
    assert found["one"].small is given["one"].small, "small ones stay where they are"
    assert len(resting.maps) == 2
    assert list(tmp_path.iterdir()) == []
    del found
    gc.collect()
    rest()
    assert resting.maps == []


def test_without_a_directory_all_stays_in_memory(tmp_path: Path) -> None:
    given = entries()
    for directory in (None, tmp_path / "missing"):
        assert paged(given, directory)["one"].large is given["one"].large


def test_what_lies_in_files_is_not_laid_there_again(tmp_path: Path) -> None:
    tensor = torch.randn(300, 200)
    placed = in_file(tensor, tmp_path)
    assert placed is not tensor
    assert torch.equal(placed, tensor)
    assert in_file(placed, tmp_path) is placed
    assert paged({"one": Entry(placed, torch.ones(3))}, tmp_path)["one"].large is placed
    assert in_file(tensor[0], tmp_path).data_ptr() == tensor.data_ptr(), "small ones stay where they are"
    assert in_file(tensor, None) is tensor


def test_weights_in_files_are_those_of_views_too(tmp_path: Path) -> None:
    model = tiny.build("ViTModel")
    view, before = view_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    page_weights(model, tmp_path)
    for name, value in view.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.data_ptr() == model.state_dict()[name].data_ptr()


@pytest.mark.parametrize("asked", [{"keep": (0.7,), "refine": 1}, {"keep": (0.7,), "cache": "cache"}, {"bits": 4.0}])
def test_a_job_ends_in_the_same_bytes(
    asked: dict[str, Any], vit_directory: Path, flat_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little memory there is: statistics and factors in files, blocks computed again."""
    moved = list[torch.Size]()
    asked = {name: str(tmp_path / value) if name == "cache" else value for name, value in asked.items()}

    def in_file(tensor: Tensor, directory: Path, of: object = paging._in_file) -> Tensor:
        moved.append(tensor.shape)
        return of(tensor, directory)  # type: ignore[operator, no-any-return]

    written = []
    for name in ("plenty", "little"):
        if name == "little":
            monkeypatch.setattr(recomputing, "free_memory", lambda _device: 0)
            monkeypatch.setattr(recomputing, "room_for", lambda _model: 0)
            monkeypatch.setattr(paging, "LEAST", 1)
            monkeypatch.setattr(paging, "_in_file", in_file)
        config = CompressConfig(
            str(vit_directory),
            str(tmp_path / name),
            calibration=str(flat_images),
            samples=8,
            holdout=0,
            device="cpu",
            **asked,
        )
        compress(config)
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert len(moved) > 10
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "cache") == ["little", "plenty"]
