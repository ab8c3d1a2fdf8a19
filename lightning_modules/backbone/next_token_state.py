"""Next-token decoding on its way: half-decoded images, candidates for their next token, the order of positions."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import DecodingState
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.sampling import Noise, Sampling
from lightning_modules.backbone.transformer import KVCache


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

    Of 2B rows the first B are conditional, the others unconditional.
    """

    noise: Noise  # candidates [B, K, T]
    features: DecoderFeatures  # of the tokens before `position`, with room for all T
    fixed: Tensor  # tokens that stay as they are, bool [B, T]; decided ones are among them
    order: Tensor  # positions to decide, ascending, [B, steps], on the CPU; see `decision_order`
    sampling: Sampling
    codes: Tensor  # embeddings of all codes, [V, dim]
    cache: KVCache  # of 2B rows
    hidden: Tensor  # hidden states that predict the next token, [2B, F]
    logits: Tensor  # of the next token, [2B, V]

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

    def select(self, rows: Tensor) -> "NextTokenState":
        both = torch.cat([rows, rows + len(self.tokens)])
        return replace(
            super().select(rows),
            fixed=self.fixed[rows],
            order=self.order[rows.cpu()],
            cache=self.cache.select(both),
            hidden=self.hidden[both],
            logits=self.logits[both],
        )
