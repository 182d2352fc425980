"""Mixed-resolution tokens: an image in few patches, small where it has detail and large where it has none."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitshrink.errors import CheckpointError
from vitshrink.models.structures.joined import Joined, join
from vitshrink.models.structures.registry import read_entry, structure

SCORERS = ("blur", "features")
"""What makes a patch worth splitting: the pixels, or the embedding, that the larger patch does not show."""


class MixedEmbeddings(Joined):
    """Embeddings of the leaves of a quadtree over the image (mixed-resolution tokenization, arXiv 2304.00287).

    The larger patches are embedded by the checkpoint's own projection after the image has been averaged to their
    resolution, and stand at the mean of the positions that they cover. Every image of a batch gets the same number of
    tokens: each split of a patch into four adds three, so that the number of splits is given and only their places are
    chosen. A patch is worth splitting as much as any of those inside it; the best of all sizes are then a tree.
    """

    spec: "MixedTokens"
    cls_token: Tensor
    position_embeddings: Tensor
    patch_embeddings: Any
    image_size: Any
    dropout: nn.Module

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        if bool_masked_pos is not None:
            raise ValueError(
                "an attention mask cannot be used with mixed tokens, because every image has other tokens."
            )
        if pixel_values.shape[-2:] != tuple(self.image_size) and not interpolate_pos_encoding:
            raise ValueError(
                f"the image is {tuple(pixel_values.shape[-2:])}, but the model takes {tuple(self.image_size)}: "
                "pass interpolate_pos_encoding=True."
            )
        patches, chosen = self._tree(pixel_values)
        tokens = _gather(torch.cat([each.flatten(1, 2) for each in reversed(patches)], 1), chosen)
        projection = self.patch_embeddings.projection
        special, positions = self._positions((patches[0].shape[1], patches[0].shape[2]))
        tokens = F.linear(tokens, projection.weight.flatten(1), projection.bias) + positions[chosen]
        names = ("cls_token", "distillation_token") if hasattr(self, "distillation_token") else ("cls_token",)
        own: list[Tensor] = [self.get_parameter(name) for name in names]
        first = (torch.cat(own, 1) + special).expand(tokens.shape[0], -1, -1)
        out: Tensor = self.dropout(torch.cat([first, tokens], 1))
        return out

    def leaves(self, pixel_values: Tensor) -> Tensor:
        """Which patches of images (batch, channels, H, W) are read, as ``choose_leaves`` numbers them."""
        return self._tree(pixel_values)[1]

    def _tree(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor]:
        """The patches of every size, from small to large, and the indices of those that are read."""
        height, width = self._kernel()
        grid = (pixel_values.shape[-2] // height, pixel_values.shape[-1] // width)
        self.spec.check(grid)
        levels = [pixel_values[..., : grid[0] * height, : grid[1] * width]]  # no whole patch is left of the rest
        for _ in range(self.spec.levels - 1):
            levels.append(F.avg_pool2d(levels[-1], 2))
        patches = [_patches(level, height, width) for level in levels]
        if self.spec.scorer == "blur":
            scores = [_detail(fine, coarse, (height, width)) for fine, coarse in pairwise(levels)]
        else:
            projection = self.patch_embeddings.projection
            embedded = [F.linear(each, projection.weight.flatten(1), projection.bias) for each in patches]
            scores = [_difference(fine, coarse) for fine, coarse in pairwise(embedded)]
        return patches, choose_leaves(scores, self.spec.splits(grid))

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Position embeddings of the special tokens, (special, width), and of all patches from large to small."""
        special = 2 if hasattr(self, "distillation_token") else 1
        native = [size // kernel for size, kernel in zip(self.image_size, self._kernel(), strict=True)]
        plane = self.position_embeddings[special:].view(*native, -1).permute(2, 0, 1)[None]
        if tuple(native) != grid:  # as transformers does
            plane = F.interpolate(plane, size=grid, mode="bicubic", align_corners=False)
        planes = [plane]
        for _ in range(self.spec.levels - 1):
            planes.append(F.avg_pool2d(planes[-1], 2))
        return self.position_embeddings[:special], torch.cat([p[0].flatten(1).T for p in reversed(planes)])

    def _kernel(self) -> tuple[int, int]:
        height, width = self.patch_embeddings.projection.kernel_size
        return height, width


def choose_leaves(scores: list[Tensor], splits: int) -> Tensor:
    """The leaves of the quadtree with the ``splits`` best splits: indices (batch, tokens), from large to small patches.

    ``scores`` (batch, rows, columns), from small to large: what each patch that can be split gains by it.
    """
    monotone = [scores[0]]
    for own in scores[1:]:  # no patch is worth less than what is in it: then the best are a tree
        monotone.append(torch.maximum(own, F.max_pool2d(monotone[-1][:, None], 2)[:, 0]))
    sizes = [score.shape[1:] for score in reversed(monotone)]
    flat = torch.cat([score.flatten(1) for score in reversed(monotone)], 1)
    best = flat.argsort(stable=True, dim=1, descending=True)[:, :splits]  # stable: of equals the larger patch
    split = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True)
    leaves, there = [], torch.ones_like(monotone[-1], dtype=torch.bool)
    start = 0
    for rows, columns in sizes:
        own = split[:, start : start + rows * columns].view(-1, rows, columns)
        leaves.append((there & ~own).flatten(1))
        there = own.repeat_interleave(2, 1).repeat_interleave(2, 2)
        start += rows * columns
    mask = torch.cat([*leaves, there.flatten(1)], 1)
    tokens = sizes[0][0] * sizes[0][1] + 3 * splits
    return mask.to(torch.uint8).argsort(stable=True, dim=1, descending=True)[:, :tokens]


def _patches(image: Tensor, height: int, width: int) -> Tensor:
    """(batch, channels, H, W) to (batch, rows, columns, channels · height · width), as the projection reads them."""
    batch, channels, rows, columns = image.shape[0], image.shape[1], image.shape[2] // height, image.shape[3] // width
    split = image.reshape(batch, channels, rows, height, columns, width)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3)


def _detail(fine: Tensor, coarse: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Mean square of what the image loses by averaging, in every patch of the coarser one: (batch, rows, columns)."""
    blurred = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    lost = (fine - blurred).square().mean(1, keepdim=True)
    return F.avg_pool2d(lost, (2 * kernel[0], 2 * kernel[1]))[:, 0]


def _difference(fine: Tensor, coarse: Tensor) -> Tensor:
    """Mean square distance of the embeddings of four patches from that of the one that covers them."""
    spread = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return F.avg_pool2d((fine - spread).square().mean(-1)[:, None], 2)[:, 0]


def _gather(values: Tensor, indices: Tensor) -> Tensor:
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))


@structure("mixed-tokens")
@dataclass(frozen=True)
class MixedTokens:
    """How many patches an image gets, the special tokens not counted.

    Attributes:
        budget: patches an image at most; three by three, so that one or two may be left over.
        levels: sizes of patches, each twice as wide as the one before.
        scorer: what decides on a split, see ``SCORERS``.
    """

    budget: int
    levels: int = 2
    scorer: str = "blur"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> Self:
        return cls(**read_entry(entry, ("budget", "levels"), choices={"scorer": SCORERS}))

    def coarse(self, grid: tuple[int, int]) -> int:
        """Patches of the largest size in a grid (rows, columns) of the smallest."""
        return grid[0] * grid[1] // (1 << 2 * (self.levels - 1))

    def splits(self, grid: tuple[int, int]) -> int:
        """How many patches are split into four."""
        return (self.budget - self.coarse(grid)) // 3

    def tokens(self, grid: tuple[int, int]) -> int:
        """Patches that an image really gets."""
        return self.coarse(grid) + 3 * self.splits(grid)

    def check(self, grid: tuple[int, int]) -> None:
        """Raises ValueError where the grid has no such quadtree."""
        step = 2 ** (self.levels - 1)
        if self.levels < 2 or any(size % step for size in grid):
            raise ValueError(
                f"{self.levels} patch sizes need a grid that {step} divides, not {grid[0]} × {grid[1]}: choose "
                "another number of levels (2 or more), or another resolution."
            )
        if not self.coarse(grid) <= self.budget <= grid[0] * grid[1]:
            raise ValueError(
                f"a budget of {self.budget} patches is not possible: a grid of {grid[0]} × {grid[1]} with "
                f"{self.levels} patch sizes allows {self.coarse(grid)} to {grid[0] * grid[1]}."
            )

    def fits(self, module: nn.Module) -> bool:
        projection = getattr(getattr(module, "patch_embeddings", None), "projection", None)
        positions = getattr(module, "position_embeddings", None)
        return isinstance(projection, nn.Conv2d) and isinstance(positions, nn.Parameter) and positions.dim() == 3

    def build(self, module: nn.Module) -> nn.Module:
        projection = module.patch_embeddings.projection  # type: ignore[union-attr]
        size: Any = module.image_size
        assert isinstance(projection, nn.Conv2d)
        try:
            self.check((size[0] // projection.kernel_size[0], size[1] // projection.kernel_size[1]))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        join(module, MixedEmbeddings)
        module.spec = self  # type: ignore[assignment]
        positions = module.position_embeddings
        assert isinstance(positions, nn.Parameter)
        # without the leading dimension of the dense model's: the shape that says that this is another model
        module.position_embeddings = nn.Parameter(torch.empty_like(positions[0]))
        return module
