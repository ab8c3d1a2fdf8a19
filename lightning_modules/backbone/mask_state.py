"""Mask-token decoding on its way: the ids of the table of embeddings, half-decoded grids, and proposals."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import DecodingState, Proposal, equal_to_earlier
from lightning_modules.backbone.features import STATISTICS
from lightning_modules.backbone.mask_attention import Prefix
from lightning_modules.backbone.mask_sampling import MaskSampling, SeededNoise
from lightning_modules.backbone.trajectory import Trajectory


@dataclass
class Vocabulary:
    """Ids of the one table of embeddings: text, ten special tokens, image codes, the mask."""

    text: int  # ids of the text tokenizer
    end_of_text: int  # one of them, which opens and closes a prompt
    codes: int  # size of the image codebook
    max_text: int  # a prompt's block has one place more than this; longer ones are cut

    def __post_init__(self) -> None:
        self.soi, self.eoi, self.t2i = self.text + 1, self.text + 2, self.text + 5
        self.first_code = self.text + 10
        self.mask = self.first_code + self.codes
        self.total = self.mask + 1

    def block(self, text: Sequence[int]) -> list[int]:
        """Text ids -> `t2i sot text eot`, at most max_text + 1 ids; what is too long loses its end, with a warning."""
        opened = list(text) if text and text[0] == self.end_of_text else [self.end_of_text, *text]
        if len(opened) >= self.max_text:
            warnings.warn(f"prompts of more than {self.max_text - 2} text tokens lose their end", stacklevel=2)
        return [*[self.t2i, *opened][: self.max_text], self.end_of_text]


@dataclass(frozen=True)
class MaskProposal(Proposal):
    """k candidates for the next step of a grid, whole grids of codes [B, k, n]; log_probs are of the codes they fix."""

    probs: Tensor  # of the codes that were drawn, [B, k, n], 1 for known ones
    masked: Tensor  # what is masked for the next step, bool [B, k, n]
    cut: Tensor  # least confidence of the other tokens, [B, k]
    is_last: bool  # after this step all codes are fixed, masked or not

    @property
    def repeats(self) -> Tensor:
        return equal_to_earlier(torch.cat([self.tokens, self.masked.long()], -1))


@dataclass
class MaskState(DecodingState):
    """B grids on their way; see `DecodingState`. Tokens that are `unknown` are a preview: drawn, but not fixed."""

    noise: SeededNoise
    unknown: Tensor  # bool [B, n]
    sampling: MaskSampling
    temperature: Tensor  # scales the noise on confidences, [B, 1]; 1 is the schedule as it is
    prefixes: list[Prefix]  # of the prompts and, with guidance or features, of the empty one
    grids: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # tokens and unknown after each step so far
    cuts: list[Tensor] = field(default_factory=list)  # least confidence of what each fixed, [B]

    @property
    def steps(self) -> int:
        return self.sampling.steps

    @property
    def is_complete(self) -> Tensor:
        return ~self.unknown.any(1)

    @property
    def statistics(self) -> Tensor:
        """The `STATISTICS` of each token when it was drawn, [3, B, n]; 0 before that."""
        if self.features is None:
            return torch.zeros(len(STATISTICS), *self.tokens.shape, device=self.tokens.device)
        return self.features.statistics

    @property
    def trajectory(self) -> Trajectory:
        return replace(Trajectory.of(self.grids), cuts=torch.stack(self.cuts, 1))

    def select(self, rows: Tensor) -> "MaskState":
        return replace(
            super().select(rows),
            unknown=self.unknown[rows],
            temperature=self.temperature[rows],
            prefixes=[self.prefixes[0].select(rows), *self.prefixes[1:]],
            grids=[(tokens[rows], unknown[rows]) for tokens, unknown in self.grids],
            cuts=[cut[rows] for cut in self.cuts],
        )

    def without_order_noise(self, rows: Tensor) -> "MaskState":
        return replace(self, temperature=self.temperature * ~rows[:, None])
