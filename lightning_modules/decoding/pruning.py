"""Best-of-n that stops paths which cannot win: the paper's potential assessment, by a verifier in token space."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy


@dataclass(frozen=True)
class Pruning(Strategy):
    """n paths an image; every `stride` steps those stop whose value falls behind the best path's of their image.

    A path that stops leaves the batch, so its compute goes to others. With `share` 0 none stops: best-of-n.

    Attributes:
        sampling: how paths are decoded.
        n: paths.
        share: a path stops when its value (a probability) is below this share of the best one's.
        stride: steps between looks; a step of a next-token decoder decides one token.
        verifier: its name.
    """

    sampling: Any
    n: int
    share: float
    stride: int = 8
    verifier: str = "parm"

    def __post_init__(self) -> None:
        for name in ("n", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"pruning needs {name} of at least 1, not {getattr(self, name)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"pruning needs a share from 0 to 1, not {self.share}")

    @property
    def judge_names(self) -> list[str]:
        return [self.verifier]

    @property
    def images_at_once(self) -> int:
        return self.n

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling, 1, self.n, judges, self.verifier)
        batch = len(request.rows)
        number = torch.arange(len(paths), device=paths.image.device)  # of each path that is left, of batch * n
        while not paths.is_done:
            proposal = paths.propose()
            values = paths.value(proposal)[:, 0]
            paths.commit(proposal)
            if paths.state.step % self.stride == 0 and not paths.is_done:
                best = values.new_full((batch,), -torch.inf).scatter_reduce(0, paths.image, values, "amax")
                left = (values.exp() >= self.share * best[paths.image].exp()).nonzero().squeeze(1)
                self._record(paths, number, values, left)
                paths.select(left)
                number = number[left]
        order = values.argsort(descending=True, stable=True)
        first = (paths.image[order] == torch.arange(batch, device=order.device)[:, None]).int().argmax(1)
        self._record(paths, number, values, order[first])
        return paths.finish(order[first])

    def _record(self, paths: Paths, number: Tensor, values: Tensor, left: Tensor) -> None:
        """Record which of the paths are left; those that stopped before have no value."""
        paths.count(len(values))
        shape = len(paths.rows), self.n
        tokens = paths.state.tokens.new_zeros(shape[0] * self.n, paths.state.tokens.shape[1])
        tokens[number] = paths.state.tokens
        scores = values.new_full((len(tokens),), torch.nan)
        scores[number] = values
        kept = torch.zeros_like(tokens[:, 0])
        kept[number[left]] = 1
        decided = None
        if not paths.is_done and (before := paths.state.decided) is not None:
            decided = torch.zeros(shape[0], dtype=torch.int64)
            decided[paths.image.cpu()] = before
        paths.record(tokens.unflatten(0, shape), decided, scores.view(shape), kept.view(shape))
