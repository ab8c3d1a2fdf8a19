"""Best-of-n that stops paths which cannot win: the paper's potential assessment, by a verifier in token space."""

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, StridedStrategy, require_positive


@dataclass(frozen=True)
class Pruning(StridedStrategy):
    """n paths an image; every `stride` steps those stop whose value falls behind the best path's of their image.

    A path that stops leaves the batch, as one without potential does in the paper (arXiv 2501.13926, section 3.3). With
    `share` 0 none stops: best-of-n.

    Attributes:
        share: a path stops when its value (a probability) is below this fraction of the best one's.
        stride: steps between assessments; a step of a next-token decoder decides one token.
    """

    n: int
    share: float
    stride: int = 8
    verifier: str = "parm"

    def __post_init__(self) -> None:
        require_positive("pruning", n=self.n, stride=self.stride)
        if not 0 <= self.share <= 1:
            raise ValueError(f"pruning needs a share from 0 to 1, not {self.share}")

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling, n=self.n, judges=judges, verifier=self.verifier)
        first = paths.number[:: self.n]
        while not paths.is_done:
            proposal = paths.propose()
            if is_due := paths.is_due(self.stride):
                # [B, n]; those that stopped before have none
                scores = paths.spread(paths.value(proposal)[:, 0], torch.nan)
            else:
                paths.skip(proposal)
            paths.commit(proposal)
            if is_due and not paths.is_done:
                chances = scores.exp().nan_to_num(-1)
                continues = chances >= self.share * chances.amax(1, keepdim=True)
                paths.record_paths(scores, continues.long())
                promising = continues.flatten()[paths.number].nonzero().squeeze(1)
                paths = paths if len(promising) == len(paths) else paths.select(promising)
        winner = scores.nan_to_num(-torch.inf).argmax(1)
        paths.record_paths(scores, one_hot(winner, self.n))
        return paths.finish(torch.searchsorted(paths.number, first + winner))
