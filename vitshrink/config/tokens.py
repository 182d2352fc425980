"""Fewer tokens and landmarks, with which a model runs whatever its weights are."""

from dataclasses import dataclass
from typing import Literal

from vitshrink.config.fields import TOKENS, Options, entries_of, flag_of, option
from vitshrink.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TokenOptions(Options):
    """What a model looks at: fewer tokens where there is no detail, attention maps of low rank, another resolution."""

    tokens: Literal["all", "mixed", "merge"] = option(
        "all",
        "Tokens that the model reads (ViT and DeiT). all: every patch; mixed: large patches where an image has no "
        "detail; merge: similar patches are merged, block by block.",
        panel=TOKENS,
    )
    token_budget: int | None = option(None, "Number of patches per image, with --tokens mixed.", panel=TOKENS, low=1)
    token_levels: int = option(
        2, "Number of patch sizes. Each size is twice as wide as the one before.", panel=TOKENS, low=1
    )
    token_scorer: str = option(
        "blur",
        "Score that decides which patches are split: blur or features.",
        panel=TOKENS,
        suggested=("blur", "features"),
    )
    token_operations: float | None = option(
        None,
        "Fraction of the operations to keep, with --tokens merge.",
        panel=TOKENS,
        above=0,
        below=1,
        wanted="give the fraction of the dense model's operations, above 0 and below 1.",
    )
    resolution: int | None = option(
        None,
        "Image size in pixels, if not the model's own. Position embeddings are interpolated.",
        panel=TOKENS,
        low=1,
        in_memory=False,
    )
    landmarks: int | None = option(
        None, "Number of landmarks for low-rank attention maps (ViT and DeiT).", panel=TOKENS, low=1
    )
    landmark_form: str = option(
        "pooled",
        "How landmarks approximate an attention map: pooled or nystrom.",
        panel=TOKENS,
        suggested=("pooled", "nystrom"),
    )

    @property
    def approximations(self) -> list[str]:
        """The flags of those that are given."""
        given = {
            "--tokens mixed": self.token_budget,
            "--tokens merge": self.token_operations,
            "--landmarks": self.landmarks,
        }
        return [flag for flag, number in given.items() if number is not None]

    def check(self) -> None:
        mixed, merged = self.tokens == "mixed", self.tokens == "merge"
        if mixed is not (self.token_budget is not None):
            raise UsageError("--tokens mixed and --token-budget (patches per image) need each other.")
        timed = merged and getattr(self, "target_latency", None) is not None
        if merged is not (self.token_operations is not None or timed):
            raise UsageError("--tokens merge and --token-operations (a fraction such as 0.67) need each other.")
        if (mixed or merged) and self.landmarks is not None:
            raise UsageError(
                f"--landmarks needs a grid of patches, and --tokens {self.tokens} has no grid: choose one."
            )
        defaults = {entry.name: entry.default for entry in entries_of(TokenOptions)}
        for name, needed, there in (
            ("token_levels", "--tokens mixed", mixed),
            ("token_scorer", "--tokens mixed", mixed),
            ("landmark_form", "--landmarks", self.landmarks is not None),
        ):
            if not there and getattr(self, name) != defaults[name]:
                value = getattr(self, name)
                raise UsageError(f"{flag_of(name)} {value} has no effect without {needed}: pass both.")
