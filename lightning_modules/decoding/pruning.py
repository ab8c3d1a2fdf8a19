"""Best-of-n that stops paths which cannot win: the paper's potential assessment, by a verifier in token space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.strategy import (
    Decoded,
    Judges,
    Strategy,
    begin_paths,
    decided_before,
    finished,
    verifier_named,
)
from lightning_modules.decoding.trace import Choice


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

    sampling: Sampling | MaskSampling
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
        state, watch = begin_paths(decoder, verifier, prompts, seeds, self.n, 1, self.sampling, tokens, keep)
        path = torch.arange(len(state.tokens), device=state.tokens.device)
        image = path // self.n  # of each path
        trace: list[Choice] = []
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
                trace.append(self._looked(len(prompts), path, state, values, going))
                path, image, state, watch = path[going], image[going], state.select(going), watch.select(going)
        state.cost.verifier_calls += len(values)
        images = finished(state, torch.zeros(len(image)))
        order = values.argsort(descending=True, stable=True)
        first = (image[order] == torch.arange(len(prompts), device=image.device)[:, None]).int().argmax(1)
        winner = order[first]
        trace.append(self._looked(len(prompts), path, state, values, winner))
        return replace(images.select(winner), trace=trace)

    def _looked(
        self,
        batch: int,
        path: Tensor,
        state: Any,
        values: Tensor,
        going: Tensor,
    ) -> Choice:
        """What a look shows; paths that stopped before have no value.

        Args:
            batch: images.
            path: the number of each that is left, of batch * n.
            state, values: of these.
            going: which of them go on.
        """
        tokens = state.tokens.new_zeros(batch * self.n, state.tokens.shape[1])
        tokens[path] = state.tokens
        scores = values.new_full((batch * self.n,), torch.nan)
        scores[path] = values
        kept = torch.zeros_like(tokens[:, 0])
        kept[path[going]] = 1
        shape = batch, self.n
        decided = None
        if not state.done and (before := decided_before(state)) is not None:
            decided = torch.zeros(batch, dtype=torch.int64)
            decided[path.cpu() // self.n] = before
        return Choice(self.verifier, tokens.unflatten(0, shape), decided, scores.view(shape), kept.view(shape))
