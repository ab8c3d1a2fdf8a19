"""Sequential Monte Carlo: unpromising paths are dropped on the way, promising ones are continued twice."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.sampling import invert
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, StridedStrategy, require_positive


@dataclass(frozen=True)
class Particles(StridedStrategy):
    """n paths an image; every `stride` steps they are redrawn by how much each has gained in value.

    This is twisted sequential Monte Carlo (arXiv 2404.17546, section 3) with the verifier as the twist function: with
    `value_weight` 1, a perfect value and many paths it samples images from the decoder's distribution of those that
    fulfil the prompt. The path of the highest final value is the image; with a stride of the whole image this is
    best-of-n. The stats have the effective sample size before a redraw, on average.

    Attributes:
        stride: steps between redraws; 8 steps of a next-token decoder are a row of an 8x8 grid.
        value_weight: paths are redrawn in proportion to (value / value at the last redraw) ** value_weight.
    """

    n: int
    stride: int = 8
    verifier: str = "parm"
    value_weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive("decoding with particles", n=self.n, stride=self.stride)

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling, n=self.n, judges=judges, verifier=self.verifier)
        first = paths.number[:: self.n]
        last = torch.zeros(len(first), self.n, device=first.device)
        sizes: list[Tensor] = []
        while not paths.is_done:
            proposal, noise = paths.propose(), paths.state.choice_noise[:: self.n]
            if is_due := paths.is_due(self.stride):
                values = paths.value(proposal).view_as(last)
            else:
                paths.skip(proposal)
            paths.commit(proposal)
            if is_due and not paths.is_done:
                gained = (values - last).masked_fill(paths.state.is_complete.view_as(last), 0.0)
                sizes.append(effective_sample_size(self.value_weight * gained))
                kept = redraw(self.value_weight * gained, noise)
                paths.record_paths(values, one_hot(kept, self.n).sum(1), drawn=True)
                paths.reassign((first[:, None] + kept).flatten())
                last = values.gather(1, kept)
        # Of equally good ones one is drawn as in a redraw, or many perfect paths would not sample the posterior.
        gained = (self.value_weight * (values - last)).masked_fill(values < values.amax(1, keepdim=True), -torch.inf)
        winner = invert(gained.softmax(1), noise[:, None]).squeeze(1)
        paths.record_paths(values, one_hot(winner, self.n))
        stats = {"effective_sample_size": torch.stack(sizes).mean(0)} if sizes else {}
        return replace(paths.finish(first + winner), stats=stats)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum of weights)^2 / sum of squared weights, from 1 to n, of weights [B, n] given as logarithms, [B]."""
    return 1 / log_weights.softmax(1).square().sum(1)


def redraw(log_weights: Tensor, noise: Tensor) -> Tensor:
    """Systematic resampling: indices [B, n], in order, each drawn about n times its weight, given as logarithm [B, n].

    One uniform number an image, `noise` [B], places n evenly spaced points along the cumulative weights.
    """
    n = log_weights.shape[1]
    return invert(log_weights.softmax(1), (torch.arange(n, device=noise.device) + noise[:, None]) / n)
