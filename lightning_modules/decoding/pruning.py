"""Best-of-n that stops paths which cannot win: the paper's potential assessment, by a verifier in token space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.strategy import (
    Decoded,
    Judges,
    Strategy,
    begin_paths,
    candidate_seeds,
    next_token,
    verifier_named,
)


@dataclass(frozen=True)
class Pruning(Strategy):
    """n paths an image; every `stride` tokens those stop whose value falls behind the best path's of their image.

    A path that stops leaves the batch, so its compute goes to others. With `share` 0 none stops: best-of-n.

    Attributes:
        sampling: how tokens are drawn.
        n: paths.
        share: a path stops when its value (a probability) is below this share of the best one's.
        stride: tokens between looks.
        verifier: its name.
    """

    sampling: Sampling
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

    @torch.no_grad()
    def decode(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Decoded:
        verifier = verifier_named(judges, self.verifier)
        decoder = next_token(decoder, "pruning")
        noise = decoder.noise(candidate_seeds(seeds, self.n), 1, self.sampling)
        state, watch = begin_paths(decoder, verifier, prompts, noise, self.sampling, tokens, keep)
        image = torch.arange(len(prompts), device=state.tokens.device).repeat_interleave(self.n)  # of each path
        while not state.done:
            verifier.follow(watch, state.evidence, state.position)
            proposal = decoder.propose(state, 1)
            values = verifier.score(watch, proposal.evidence)[:, 0]
            only = torch.zeros_like(image)
            verifier.commit(watch, only)
            decoder.commit(state, proposal, only)
            if state.step % self.stride == 0 and not state.done:
                state.cost.verifier_calls += len(values)
                best = values.new_full((len(prompts),), -torch.inf).scatter_reduce(0, image, values, "amax")
                going = (values.exp() >= self.share * best[image].exp()).nonzero().squeeze(1)
                image, state, watch = image[going], state.select(going), watch.select(going)
        state.cost.verifier_calls += len(values)
        finished = Decoded(state.tokens, state.evidence, state.cost, torch.zeros(len(image)))
        order = values.argsort(descending=True, stable=True)
        first = (image[order] == torch.arange(len(prompts), device=image.device)[:, None]).int().argmax(1)
        return finished.select(order[first])
