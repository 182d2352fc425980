"""Matrices of packed integers, as a file would hold them: codes of any width, a scale and a zero point a group."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

SCALE = torch.float16


@dataclass(frozen=True)
class Packed:
    """A matrix (m, n): codes in [0, 2^bits), and for each group of columns a scale and the code that stands for 0."""

    bits: int
    group: int
    """Columns that share a scale; the last group of a row may be narrower."""
    codes: Tensor
    """(m, n), uint8"""
    scales: Tensor
    """(m, groups), as they are stored"""
    zeros: Tensor | None
    """(m, groups), uint8; None where it is the middle of the range everywhere and not stored."""

    def dense(self) -> Tensor:
        """The weights, (m, n), in float32."""
        zeros = torch.full((), 2 ** (self.bits - 1)) if self.zeros is None else self.spread(self.zeros)
        return (self.codes.float() - zeros) * self.spread(self.scales).float()

    def spread(self, of_groups: Tensor) -> Tensor:
        """From one value a group to one a column."""
        return of_groups.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a file holds of it."""
        found = {f"{name}.codes": pack(self.codes, self.bits), f"{name}.scales": self.scales}
        return found if self.zeros is None else found | {f"{name}.zeros": pack(self.zeros, self.bits)}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits one after the other, without gaps, in bytes."""
    flat = np.unpackbits(codes.numpy().reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def fitted(weight: Tensor, bits: int, group: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scales (float32, but of the values that a file holds) and zero points of the groups of a matrix: (m, groups).

    Asymmetric ones cover a group from its least to its largest entry; then the range is shrunk as far as that lessens
    Σ |error|^2.4 over the group, as the published code of GPTQ does on request. With 8 bits nothing is gained by that.
    """
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    low, high = padded.amin(2).clamp_max(0), padded.amax(2).clamp_min(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full(low.shape, torch.inf)
    scales, zeros = torch.zeros_like(low), torch.zeros_like(low)
    for step in range(0, 80 if bits < 8 else 1, 2):
        part = 1 - step / 100
        scale = ((high - low) * part / (2**bits - 1)).clamp_min(1e-6).to(SCALE).float()
        zero = (-low * part / scale).round().clamp(0, 2**bits - 1)
        zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
        codes = (padded / scale[..., None] + zero[..., None]).round_().clamp_(0, 2**bits - 1)
        error = ((codes - zero[..., None]) * scale[..., None] - padded).abs_().pow_(2.4).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def rounded(weight: Tensor, bits: int, group: int) -> Packed:
    """Every weight to the nearest code."""
    scales, zeros = fitted(weight.float(), bits, group)
    spread = [each.repeat_interleave(group, 1)[:, : weight.shape[1]] for each in (scales, zeros)]
    codes = (weight.float() / spread[0] + spread[1]).round().clamp(0, 2**bits - 1)
    return Packed(bits, group, codes.to(torch.uint8), scales.to(SCALE), zeros.to(torch.uint8))


@torch.no_grad()
def stored(model: PreTrainedModel, matrices: Mapping[str, Packed], folder: Path) -> tuple[PreTrainedModel, int]:
    """The model with these matrices in place of the weights of their names, all else in float16; and its file's bytes.

    Weights that share memory in the model are stored once.
    """
    built = copy.deepcopy(model).half().float()
    tensors: dict[str, Tensor] = {}
    for name, parameter in built.named_parameters():
        if name in matrices:
            parameter.copy_(matrices[name].dense().view_as(parameter))
            tensors |= matrices[name].tensors(name)
        else:
            tensors[name] = parameter.half()
    return built, written(tensors, folder)


def written(tensors: Mapping[str, Tensor], folder: Path) -> int:
    """Bytes of a safetensors file with these tensors."""
    file = folder / "model.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    return file.stat().st_size
