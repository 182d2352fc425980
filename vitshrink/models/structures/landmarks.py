"""Attention maps of low rank: queries meet a few landmarks, means over windows of the grid, instead of every key."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.geometry import grid_of
from vitshrink.models.structures.attention import StructuredAttention, become, layout_of, run_attention
from vitshrink.models.structures.registry import read_entry, structure

FORMS = ("pooled", "nystrom")
"""What a map becomes: softmax over the landmarks, whose values are means too, or the Nyström product of three."""

ITERATIONS = 6
"""Steps towards the pseudo-inverse of a map among landmarks: as many as the paper takes."""


class ProjectionByHead(nn.Linear):
    """``nn.Linear`` whose weight is (heads, d, n): the shape that says that this is another attention."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.flatten(0, 1), self.bias)


class LandmarkAttention(StructuredAttention):
    """Attention in linear time: maps (tokens, tokens) of a rank that the number of landmarks bounds.

    ``pooled``: softmax(Q K̃ᵀ + log w) Ṽ, with K̃ and Ṽ the means over windows of w patches, as if every key of a window
    were their mean (Linformer, arXiv 2006.04768, with this projection in the place of a learned one). The mean goes
    before the projections, which then have fewer tokens to multiply. ``nystrom``: softmax(Q K̃ᵀ) softmax(Q̃ K̃ᵀ)⁺
    softmax(Q̃ Kᵀ) V (Nyströmformer, arXiv 2102.03902). Special tokens are landmarks of their own.
    """

    spec: "Landmarks"

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = self.spec.pool(x, self._grid(x)) if self.spec.form == "pooled" else x
        query, key, value = (getattr(self, name) for name in (self.layout.query, self.layout.key, self.layout.value))
        return self.heads(query(x)), self.heads(key(read)), self.heads(value(read))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if mask is not None and not torch.compiler.is_exporting():  # where transformers gives one that hides nothing
            raise ValueError("landmarks are means over all patches of a window, so an attention mask cannot be used.")
        grid, explicit = self._grid(query), self.config._attn_implementation == "eager"
        if self.spec.form == "pooled":
            window = self.spec.window(grid)
            sizes = query.new_zeros(key.shape[2])
            sizes[self.spec.special :] = math.log(window[0] * window[1])
            output, maps = run_attention(self, query, key, value, sizes.expand(1, 1, query.shape[2], -1), **kwargs)
            return output, self.spec.spread(maps, grid) if explicit and maps is not None else None
        landmarks = self.spec.pool(query, grid), self.spec.pool(key, grid)
        left = (query @ landmarks[1].mT * self.scaling).softmax(-1)
        middle = pseudo_inverse((landmarks[0] @ landmarks[1].mT * self.scaling).softmax(-1))
        right = (landmarks[0] @ key.mT * self.scaling).softmax(-1)
        output = left @ (middle @ (right @ value))
        return output.transpose(1, 2), left @ middle @ right if explicit else None

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Of the patches among tokens (…, tokens, n): the config's, or else a square."""
        patches, config = x.shape[-2] - self.spec.special, self.config
        grid = grid_of(config)
        if grid[0] * grid[1] != patches:
            grid = (math.isqrt(patches), math.isqrt(patches))
        if grid[0] * grid[1] != patches:
            raise ValueError(f"{patches} patches are not a grid: landmarks are means over windows of a grid.")
        return grid


def pseudo_inverse(maps: Tensor) -> Tensor:
    """Of square maps (…, m, m) with rows that add up to one, by matrix products only (arXiv 2102.03902, eq. 11)."""
    found = maps.mT / (maps.abs().sum(-1).amax(-1) * maps.abs().sum(-2).amax(-1))[..., None, None]
    identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    for _ in range(ITERATIONS):
        product = maps @ found
        found = 0.25 * found @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return found


@structure("landmarks")
@dataclass(frozen=True)
class Landmarks:
    """How many landmarks an image gets, the special tokens not counted.

    Attributes:
        landmarks: windows of the grid of patches: a divisor of its rows times one of its columns.
        special: tokens before the patches.
        form: see ``FORMS``.
    """

    landmarks: int
    special: int = 1
    form: str = "pooled"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        return cls(**read_entry(entry, ("landmarks", "special"), choices={"form": FORMS}))

    def window(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a window, as square as they can be. Raises ValueError where there are no such windows."""
        rows, columns = grid
        found = [
            (a, rows * columns // self.landmarks // a)
            for a in _divisors(rows)
            if rows * columns % self.landmarks == 0
            and rows * columns // self.landmarks % a == 0
            and columns % (rows * columns // self.landmarks // a) == 0
        ]
        if not found:
            numbers = sorted({(rows // a) * (columns // b) for a in _divisors(rows) for b in _divisors(columns)})
            raise ValueError(
                f"{self.landmarks} landmarks are not possible: a grid of {rows} × {columns} patches has equal "
                f"windows for {', '.join(map(str, numbers))}."
            )
        return min(found, key=lambda window: abs(window[0] - window[1]))

    def pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(…, tokens, n) to (…, special + landmarks, n): the means of the windows, row by row."""
        high, wide = self.window(grid)
        windows = torch.unflatten(x[..., self.special :, :], -2, (grid[0] // high, high, grid[1] // wide, wide))
        return torch.cat([x[..., : self.special, :], windows.mean((-4, -2)).flatten(-3, -2)], -2)

    def spread(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """(…, tokens, special + landmarks) to (…, tokens, tokens): what each patch of a window gets of its share."""
        high, wide = self.window(grid)
        windows = torch.unflatten(maps[..., self.special :], -1, (grid[0] // high, grid[1] // wide)) / (high * wide)
        patches = windows.repeat_interleave(high, -2).repeat_interleave(wide, -1).flatten(-2)
        return torch.cat([maps[..., : self.special], patches], -1)

    def fits(self, module: nn.Module) -> bool:
        layout = layout_of(module, nn.Module)
        return layout is not None and layout.output is not None and not isinstance(module, StructuredAttention)

    def build(self, module: nn.Module) -> nn.Module:
        layout = layout_of(module, nn.Module)
        assert layout is not None
        try:
            self.window(grid_of(module.config))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        built = become(module, LandmarkAttention, self)
        query, heads = getattr(module, layout.query), module.num_attention_heads
        if type(query) is nn.Linear:  # one of low rank has another shape of its own
            assert isinstance(heads, int)
            query.__class__ = ProjectionByHead
            empty = torch.empty_like(query.weight.detach())
            query.weight = nn.Parameter(empty.view(heads, -1, query.in_features))
        return built


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
