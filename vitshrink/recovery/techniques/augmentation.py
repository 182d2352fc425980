"""Other views of the same samples: what the two models answer to is drawn anew, though the samples are few."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from vitshrink.config.options import FinetuneConfig
from vitshrink.data import Preprocessor
from vitshrink.models.tasks import task_of
from vitshrink.recovery.training_set import TrainingBatch
from vitshrink.runtime.seeds import generator_of

MIXING = 0.5
"""Part of the images that are blended with another one."""
TOKENS_AUGMENTED = 0.05
"""Part of the tokens of a text that augmentation hides."""
TOKENS_HIDDEN = 0.15
"""Part of the tokens that a masked language model has to guess."""


@dataclass(frozen=True)
class Augmentation:
    """Draws views by seed, epoch and sample, whatever the batch: the same with any number of processes."""

    seed: int
    scale: float = 0.5
    """Least area of a crop, as a fraction of the image."""
    mixing: float = 0.0
    """Part of the images that are blended with another one of the batch."""
    tokens: float = 0.0
    """Part of the real tokens of a text that are replaced by the mask token."""
    guessing: bool = False
    """Whether hiding tokens is the model's task, and no augmentation that one may leave out."""
    mask_token: int | None = None
    special_tokens: Sequence[int] = ()

    def apply(self, batch: TrainingBatch, view: int) -> TrainingBatch:
        generators = [generator_of(self.seed, view, int(index)) for index in batch.indices]
        if "pixel_values" in batch.inputs:
            pixels = self._crop(batch.inputs["pixel_values"], generators)
            return replace(batch, inputs={**batch.inputs, "pixel_values": self._mix(pixels, generators)})
        return self._hide(batch, generators, self.tokens)

    def hide_only(self, batch: TrainingBatch, view: int) -> TrainingBatch:
        """The batch as it is, but for the tokens that a masked language model has to guess."""
        if not self.guessing:
            return batch
        return self._hide(batch, [generator_of(self.seed, view, int(index)) for index in batch.indices], self.tokens)

    def _crop(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A part of each image at the image's size, half of them mirrored."""
        draws = torch.stack([torch.rand(5, generator=generator) for generator in generators]).to(pixels.device)
        area = self.scale + (1 - self.scale) * draws[:, 0]
        aspect = torch.exp((draws[:, 1] - 0.5) * 2 * 0.28)  # 3:4 to 4:3
        height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
        matrix = torch.zeros(len(pixels), 2, 3, device=pixels.device)
        matrix[:, 0, 0] = width * torch.where(draws[:, 2] < 0.5, -1.0, 1.0)
        matrix[:, 0, 2] = (2 * draws[:, 3] - 1) * (1 - width)
        matrix[:, 1, 1] = height
        matrix[:, 1, 2] = (2 * draws[:, 4] - 1) * (1 - height)
        grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False).to(pixels.dtype)
        return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _mix(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        if self.mixing == 0:
            return pixels
        draws = torch.stack([torch.rand(2, generator=generator) for generator in generators]).to(pixels.device)
        share = torch.where(draws[:, 0] < self.mixing, draws[:, 1], torch.ones_like(draws[:, 1]))
        return torch.lerp(pixels.roll(1, 0), pixels, share[:, None, None, None].to(pixels.dtype))

    def _hide(self, batch: TrainingBatch, generators: Sequence[torch.Generator], part: float) -> TrainingBatch:
        tokens = batch.inputs["input_ids"]
        if part == 0 or self.mask_token is None:
            return batch
        drawn = torch.stack([torch.rand(tokens.shape[1:], generator=g) for g in generators]).to(tokens.device)
        special = torch.isin(tokens, torch.tensor(list(self.special_tokens), device=tokens.device))
        real = ~special if batch.mask is None else batch.mask & ~special
        drawn = drawn.masked_fill(~real, 2)
        hidden = (drawn < part) | (drawn == drawn.amin(-1, keepdim=True)) & real  # one at least, where there is one
        inputs = {**batch.inputs, "input_ids": tokens.masked_fill(hidden, self.mask_token)}
        return replace(batch, inputs=inputs, selected=hidden)


def augmentation_of(
    config: FinetuneConfig, preprocessor: Preprocessor, model: PreTrainedModel, seed: int
) -> Augmentation:
    """The augmentation that suits the samples and the task of ``model``."""
    if preprocessor.kind == "image":
        usual = MIXING if config.objective == "distill" and config.views is None else 0.0
        return Augmentation(seed, mixing=usual if config.mixing is None else config.mixing)
    guessing = task_of(model) == "masked-lm"
    tokenizer = preprocessor.processor
    return Augmentation(
        seed,
        tokens=TOKENS_HIDDEN if guessing else TOKENS_AUGMENTED,
        mask_token=tokenizer.mask_token_id,
        special_tokens=tuple(tokenizer.all_special_ids),
        guessing=guessing,
    )
