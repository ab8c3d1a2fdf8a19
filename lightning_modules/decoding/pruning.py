"""Best-of-n that stops paths which cannot win: the paper's potential assessment, by a verifier in token space."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, PathStrategy, require_positive


@dataclass(frozen=True)
class Pruning(PathStrategy):
    """n paths an image; every `stride` steps those stop whose value falls behind the best path's of their image.

    A path that stops leaves the batch, as one without potential does in the paper (arXiv 2501.13926, section 3.3). With
    `share` 0 none stops: best-of-n.

    Attributes:
        share: a path stops when its value (a probability) is below this fraction of the best one's.
        stride: steps between assessments; a step of a next-token decoder decides one token.
    """

    sampling: Any
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
        batch = len(request.rows)
        while not paths.is_done:
            proposal = paths.propose()
            values = paths.value(proposal)[:, 0]
            paths.commit(proposal)
            if paths.state.step % self.stride == 0 and not paths.is_done:
                image = paths.image.to(values.device)
                best = values.new_full((batch,), -torch.inf).scatter_reduce(0, image, values, "amax")
                promising = (values.exp() >= self.share * best[image].exp()).nonzero().squeeze(1)
                self._record(paths, values, promising)
                paths.select(promising)
        order = values.argsort(descending=True, stable=True)
        first = (
            (paths.image.to(order.device)[order] == torch.arange(batch, device=order.device)[:, None]).int().argmax(1)
        )
        self._record(paths, values, order[first])
        return paths.finish(order[first])

    def _record(self, paths: Paths, values: Tensor, kept: Tensor) -> None:
        """Record which of the paths continue, `kept`; those that stopped before have no value."""
        paths.count(len(values))
        continues = torch.zeros_like(paths.number).index_fill(0, kept, 1)
        paths.record(paths.spread(paths.state.tokens), paths.spread(values, torch.nan), paths.spread(continues))
