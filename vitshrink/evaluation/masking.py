"""Which tokens a masked language model has to guess: the same ones for every model and every batch size."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitshrink.errors import UsageError
from vitshrink.runtime.seeds import generator_of


class MaskingTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that masking needs."""

    @property
    def mask_token_id(self) -> int | None: ...

    @property
    def all_special_ids(self) -> list[int]: ...


@dataclass(frozen=True)
class Masking:
    """Hides a fraction of the ordinary tokens behind the mask token.

    Every hidden token becomes the mask token: the 80/10/10 mixture of pre-training would make part of the guesses
    trivial. The choice depends on the seed, the sample's key and its length alone.
    """

    mask_token: int
    special_tokens: frozenset[int]
    fraction: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"cannot mask a fraction of {self.fraction}: it must lie in (0, 1].")

    @classmethod
    def from_tokenizer(cls, tokenizer: MaskingTokenizer, seed: int = 0) -> "Masking":
        """Raises UsageError when the tokenizer has no mask token."""
        if tokenizer.mask_token_id is None:
            raise UsageError(
                "cannot measure masked-token accuracy: this checkpoint's tokenizer has no mask token. "
                "Use the tokenizer files that the model was trained with."
            )
        return cls(tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids), seed=seed)

    def positions(self, tokens: Tensor, mask: Tensor | None, keys: list[str]) -> Tensor:
        """Positions to hide in tokens (batch, length), mask (batch, length) True = real; bool (batch, length).

        A sample with an ordinary token has at least one of them hidden.
        """
        ordinary = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool().clone()
        for token in self.special_tokens:
            ordinary &= tokens != token
        hidden = torch.zeros_like(ordinary)
        for row, key in enumerate(keys):
            candidates = ordinary[row].nonzero().squeeze(1)
            if not len(candidates):
                continue
            count = max(1, round(self.fraction * len(candidates)))
            order = torch.randperm(len(candidates), generator=generator_of(self.seed, key))
            hidden[row, candidates[order[:count].to(candidates.device)]] = True
        return hidden
