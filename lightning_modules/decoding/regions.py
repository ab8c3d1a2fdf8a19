"""Regions for reflection: the tokens of a finished image that are not satisfactory."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.image_tokenizer import patch_side, upsample_patches
from lightning_modules.backbone.sampling import uniform_noise
from lightning_modules.decoding.strategy import Decoded, Judges, Part
from lightning_modules.rewards.verifier import Ability


class TokenScorer(Part):
    """Scores the tokens of finished images; what is low is not satisfactory."""

    @property
    def judge_names(self) -> Sequence[str]:
        return ()

    @abstractmethod
    def __call__(self, decoder: Decoder, judges: Judges, request: Request, image: Decoded) -> Tensor:
        """Scores [B, T]; the values asked of judges are added to the image's cost."""


@dataclass(frozen=True)
class Region(Part):
    """Ω: the tokens whose score lies below τ, of those that may change.

    Attributes:
        threshold, quantile: τ itself, or as a quantile of the scores of the image itself.
        patches: scores are averaged over M x M patches first.
        rewind: everything from the first such token on: later tokens were drawn given that one.
    """

    scorer: TokenScorer
    threshold: float | None = None
    quantile: float | None = None
    patches: int | None = None
    rewind: bool = False

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.quantile is None):
            raise ValueError("a region needs either a threshold or a quantile")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ValueError(f"a region's quantile must lie between 0 and 1, not {self.quantile}")
        if self.patches is not None and self.patches < 1:
            raise ValueError(f"a region needs patches of at least 1, not {self.patches}")

    @property
    def parts(self) -> Mapping[str, Part]:
        return {"scorer": self.scorer}

    @property
    def judge_names(self) -> Sequence[str]:
        return self.scorer.judge_names

    def check_decoder(self, decoder: Decoder) -> None:
        super().check_decoder(decoder)
        if self.patches is not None and (grid := decoder.image_tokenizer.grid) % self.patches:
            raise ValueError(f"patches={self.patches} does not divide the {grid}x{grid} tokens of an image")

    def __call__(self, decoder: Decoder, judges: Judges, request: Request, image: Decoded) -> Tensor:
        """Ω of each image, bool [B, T]."""
        scores = self.scorer(decoder, judges, request, image).float()
        grid = decoder.image_tokenizer.grid
        if self.patches is not None:
            pooled = F.avg_pool2d(scores.view(-1, 1, grid, grid), patch_side(grid, self.patches))
            scores = upsample_patches(pooled.squeeze(1), grid)
        limit: Any = self.threshold if self.quantile is None else scores.quantile(self.quantile, dim=1, keepdim=True)
        region_mask = scores < limit
        region_mask = region_mask.cumsum(1) > 0 if self.rewind else region_mask
        return region_mask if request.fixed_mask is None else region_mask & ~request.fixed_mask


@dataclass(frozen=True)
class PatchCLIPScore(TokenScorer):
    """The method's own: S_ij, the CLIPScore of the prompt and patch ij of M x M (M = `patches`)."""

    patches: int
    judge: str = "clip"
    ability = Ability.PATCHES

    @property
    def judge_names(self) -> list[str]:
        return [self.judge]

    def __call__(self, decoder: Decoder, judges: Judges, request: Request, image: Decoded) -> Tensor:
        pixels = decoder.pixels(image.tokens, image.cost)
        scores = judges[self.judge].patches(request.prompts, pixels, self.patches)
        image.cost.verifier_calls += scores.numel()
        return upsample_patches(scores, decoder.image_tokenizer.grid)


@dataclass(frozen=True)
class ValueGain(TokenScorer):
    """The gain in the verifier's value (a probability) that tokens brought: where it falls, hope was lost.

    Of next-token decoders each token, as it came; of mask-token decoders each of M x M `patches`, compared with the
    same grid in which that patch is not decided yet, which takes a pass a patch.
    """

    verifier: str = "parm"
    patches: int = 4
    ability = Ability.PREFIXES

    @property
    def judge_names(self) -> list[str]:
        return [self.verifier]

    @torch.no_grad()
    def __call__(self, decoder: Decoder, judges: Judges, request: Request, image: Decoded) -> Tensor:
        judge, features = judges[self.verifier], image.features
        judge.check_decoder(decoder)
        if features is None:
            raise ValueError("a gain in value needs the decoder's features, and these images have none")
        return decoder.value_gains(request.prompts, image.tokens, features, judge.values, self.patches, image.cost)


@dataclass(frozen=True)
class TokenConfidence(TokenScorer):
    """The decoder's own log-probability of each token; see `Decoder.confidence`."""

    def __call__(self, decoder: Decoder, judges: Judges, request: Request, image: Decoded) -> Tensor:
        return decoder.confidence(request.prompts, image.tokens, image.features, image.cost)


@dataclass(frozen=True)
class RandomScores(TokenScorer):
    """Uniform noise, as a control: with a quantile, a random Ω of that size; with `threshold: 1`, everything."""

    def __call__(self, decoder: Decoder, judges: Judges, request: Request, image: Decoded) -> Tensor:
        return uniform_noise(request.seeds, 0, decoder.num_tokens)[:, 0].to(image.tokens.device)
