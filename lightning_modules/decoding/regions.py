"""Where reflection looks: which tokens of a finished image are not satisfactory."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.evidence import STATISTICS
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.sampling import uniform_noise
from lightning_modules.decoding.strategy import Decoded, Judges, check_readable, next_token, verifier_named
from lightning_modules.identity import Keyed, fields_key
from lightning_modules.rewards.clip_score import CLIPScore
from lightning_modules.rewards.verifier import Verifier


class Look(Keyed):
    """Scores the tokens of finished images; what is low is not satisfactory."""

    def cache_key(self) -> Any:
        """Its class and all its fields."""
        return fields_key(self)

    @property
    @abstractmethod
    def judge_names(self) -> Sequence[str]:
        """Names of the judges that it asks."""

    @abstractmethod
    def __call__(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        image: Decoded,
    ) -> Tensor:
        """Scores [B, T]; the values asked of judges are added to the image's cost."""


@dataclass(frozen=True)
class Region(Keyed):
    """Ω: the tokens whose score lies below τ.

    Attributes:
        look: scores tokens.
        threshold: τ itself.
        quantile: or τ as a quantile of the scores of the image itself.
        patches: scores are averaged over M x M patches first.
        rewind: everything from the first such token on: what comes later was drawn in its light.
    """

    look: Look
    threshold: float | None = None
    quantile: float | None = None
    patches: int | None = None
    rewind: bool = False

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.quantile is None):
            raise ValueError("a region needs either a threshold or a quantile")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ValueError(f"a region's quantile must lie between 0 and 1, not {self.quantile}")

    def cache_key(self) -> Any:
        """All its fields."""
        return fields_key(self)

    @property
    def judge_names(self) -> Sequence[str]:
        """Names of the judges that decide what is decoded again."""
        return self.look.judge_names

    def __call__(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        image: Decoded,
    ) -> Tensor:
        """Ω of each image, bool [B, T]."""
        scores = self.look(decoder, judges, prompts, seeds, image).float()
        grid = decoder.image_tokenizer.grid
        if self.patches is not None:
            pooled = F.avg_pool2d(scores.view(-1, 1, grid, grid), _side(grid, self.patches))
            scores = spread(pooled.squeeze(1), grid)
        limit: float | Tensor
        if self.quantile is None:
            assert self.threshold is not None
            limit = self.threshold
        else:
            limit = scores.quantile(self.quantile, dim=1, keepdim=True)
        omega = scores < limit
        return omega.cumsum(1) > 0 if self.rewind else omega


@dataclass(frozen=True)
class CLIPPatches(Look):
    """The method's own: S_ij, the CLIPScore of the prompt and patch ij of M x M.

    Attributes:
        patches: M.
        judge: name of a `CLIPScore`.
    """

    patches: int
    judge: str = "clip"

    @property
    def judge_names(self) -> list[str]:
        return [self.judge]

    def __call__(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        image: Decoded,
    ) -> Tensor:
        judge = judges.get(self.judge)
        if not isinstance(judge, CLIPScore):
            known = ", ".join(name for name, value in judges.items() if isinstance(value, CLIPScore))
            raise ValueError(f"judge {self.judge!r} does not score patches; there are: {known or 'none'}")
        pixels = decoder.image_tokenizer.decode(image.tokens)
        scores = judge.patches([row["prompt"] for row in prompts], pixels, self.patches)
        image.cost.verifier_calls += scores.numel()
        return spread(scores, decoder.image_tokenizer.grid)


@dataclass(frozen=True)
class Gain(Look):
    """What tokens added to the verifier's value (a probability): where it falls, hope was lost.

    Of next-token decoders each token, as it came; of mask-token decoders each of M x M patches, compared with the same
    grid in which that patch is not decided yet, which takes a pass a patch.

    Attributes:
        verifier: its name.
        patches: M.
    """

    verifier: str = "parm"
    patches: int = 4

    @property
    def judge_names(self) -> list[str]:
        return [self.verifier]

    @torch.no_grad()
    def __call__(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        image: Decoded,
    ) -> Tensor:
        judge = verifier_named(judges, self.verifier)
        check_readable(decoder)
        assert image.evidence is not None
        if isinstance(decoder, MaskTokenDecoder):
            undecided = torch.cat(
                [self._without_a_patch(decoder, judge, prompts, image, i) for i in range(self.patches**2)], 1
            )
            values = judge.values(image.evidence, [decoder.num_tokens]).exp()
            image.cost.verifier_calls += undecided.numel() + len(prompts)
            return spread((values - undecided).unflatten(1, (self.patches, self.patches)), decoder.image_tokenizer.grid)
        decoder = next_token(decoder, "a value after every token")
        values = judge.values(image.evidence, range(1, decoder.num_tokens + 1)).exp()
        image.cost.verifier_calls += values.numel()
        return values.diff(dim=1, prepend=values[:, :1])

    def _without_a_patch(
        self,
        decoder: MaskTokenDecoder,
        judge: Verifier[Any],
        prompts: Sequence[Mapping[str, Any]],
        image: Decoded,
        patch: int,
    ) -> Tensor:
        """Values [B, 1] of the images were one of their patches not decided yet."""
        assert image.evidence is not None
        here = torch.arange(self.patches**2, device=image.tokens.device) == patch
        here = spread(here.view(1, self.patches, -1), decoder.image_tokenizer.grid).expand_as(image.tokens)
        decided = torch.stack([getattr(image.evidence, name) for name in STATISTICS])
        evidence = decoder.evidence([row["prompt"] for row in prompts], image.tokens, here, here, decided)
        image.cost.count_pass(2 * len(prompts), decoder.num_tokens)
        return judge.values(evidence, [decoder.num_tokens]).exp()


@dataclass(frozen=True)
class Confidence(Look):
    """The decoder's own log-probability of each token: given those before it, or, by mask-token decoders, given those
    three quarters of the image that do not share its place in squares of 2 x 2."""

    @property
    def judge_names(self) -> list[str]:
        return []

    def __call__(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        image: Decoded,
    ) -> Tensor:
        if not isinstance(decoder, MaskTokenDecoder):
            assert image.evidence is not None
            return image.evidence.log_probs
        prefix, index = decoder.encode([row["prompt"] for row in prompts]), torch.arange(decoder.image_tokenizer.grid)
        place = (2 * (index[:, None] % 2) + index % 2).flatten().to(image.tokens.device)
        image.cost.count_pass(4 * len(prompts), decoder.num_tokens)
        masks = [(place == i).expand_as(image.tokens) for i in range(4)]
        with torch.no_grad():
            return torch.stack([decoder.log_probs(prefix, image.tokens, masked) for masked in masks]).sum(0)


@dataclass(frozen=True)
class Chance(Look):
    """Uniform noise, as a control: with a quantile, a random Ω of that size; with `threshold: 1`, everything."""

    @property
    def judge_names(self) -> list[str]:
        return []

    def __call__(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        image: Decoded,
    ) -> Tensor:
        return uniform_noise(seeds, 0, decoder.num_tokens)[:, 0].to(image.tokens.device)


def spread(scores: Tensor, grid: int) -> Tensor:
    """Scores of M x M patches [B, M, M] -> of the tokens in them, [B, T]."""
    side = _side(grid, scores.shape[1])
    return scores.repeat_interleave(side, 1).repeat_interleave(side, 2).flatten(1)


def _side(grid: int, patches: int) -> int:
    """Tokens along each side of a patch."""
    if grid % patches:
        raise ValueError(f"{grid}x{grid} tokens cannot be cut into {patches}x{patches} patches")
    return grid // patches
