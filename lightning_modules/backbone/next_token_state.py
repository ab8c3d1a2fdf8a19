"""Next-token decoding on its way: half-decoded images, candidates for their next token, the order of positions."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import DecodingState
from lightning_modules.backbone.kv_cache import KVCache
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.sampling import Noise, Sampling


def decision_order(fixed: Tensor) -> Tensor:
    """Positions to decide, ascending, [B, steps], given the tokens that stay, bool [B, T].

    A row decides its open tokens, and at the end its last token even if that is fixed: then all others have been read.
    A row with fewer open tokens than others decides its last token again and again.
    """
    length = fixed.shape[1]
    due = torch.where(fixed, length, torch.arange(length))
    due[:, -1] = length - 1
    steps = int((due < length).sum(1).max())
    return due.sort(1).values[:, :steps].clamp(max=length - 1)


@dataclass
class NextTokenState(DecodingState):
    """Each step decides one token of each image, not necessarily at the same position; see `DecodingState`.

    An image has a conditional row and, with guidance or features, an unconditional one: of R rows the first B are
    conditional, the others unconditional.
    """

    noise: Noise  # candidates [B, K, T]
    fixed: Tensor  # tokens that stay as they are, bool [B, T]; decided ones are among them
    order: Tensor  # positions to decide, ascending, [B, steps], on the CPU; see `decision_order`
    sampling: Sampling
    table: Tensor  # what tokens are embedded from, [V, ...]
    rotary: Rotary | None  # of the places of an image
    cache: KVCache  # of R rows
    hidden: Tensor  # hidden states that predict the next token, [R, F]; F is 0 without feature layers
    logits: Tensor  # of the next token: of each row, [R, V], or without feature layers guided already, [B, V]

    @property
    def steps(self) -> int:
        return self.order.shape[1]

    @property
    def position(self) -> Tensor:
        return self.order[:, self.step]

    @property
    def decided(self) -> Tensor:
        return self.position

    @property
    def is_complete(self) -> Tensor:
        return self.fixed.all(1)

    @property
    def branches(self) -> int:
        """Rows of each image, 1 or 2."""
        return len(self.hidden) // len(self.tokens)

    def rotary_at(self, places: Tensor) -> Rotary | None:
        """Rotary embeddings of all rows at places [B, S] of their images, on the CPU."""
        if self.rotary is None:
            return None
        if (places == places[:1]).all():
            return self.rotary[places[0].to(self.tokens.device)]
        return self.rotary[places[:, None].repeat(self.branches, 1, 1).to(self.tokens.device)]

    def select(self, rows: Tensor) -> "NextTokenState":
        def branch_rows(count: int) -> Tensor:
            return torch.cat([rows + start for start in range(0, count, len(self.tokens))])

        every = branch_rows(len(self.hidden))
        return replace(
            super().select(rows),
            fixed=self.fixed[rows],
            order=self.order[rows.cpu()],
            cache=self.cache.select(every),
            hidden=self.hidden[every],
            logits=self.logits[branch_rows(len(self.logits))],
        )
