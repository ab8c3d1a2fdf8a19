"""Beam search over a verifier's values: the best prefixes of an image continue, whichever prefix they extend."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, PathStrategy, require_positive


@dataclass(frozen=True)
class Beam(PathStrategy):
    """At every step each of n prefixes has k candidates; of all n * k the n of the highest score continue.

    This is beam search against a process reward model (arXiv 2408.03314, section 5.2), without lookahead. All k
    candidates of a prefix share its one decoder pass; of equal ones one counts. The prefix of the highest final score
    is the image. With n = 1 this is verified decoding.

    Attributes:
        n: prefixes of each image.
        k: candidates of each prefix.
        prior_weight: score = log V + prior_weight log p, p being the sampling distribution's of the whole prefix.
    """

    sampling: Any
    n: int
    k: int
    verifier: str = "parm"
    prior_weight: float = 0.0

    def __post_init__(self) -> None:
        require_positive("beam search", n=self.n, k=self.k)

    @property
    def images_at_once(self) -> int:
        return self.n * self.k

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling, self.k, self.n, judges, self.verifier)
        first = paths.number[:: self.n]  # of each image's prefixes
        log_probs = torch.zeros(len(paths), 1, device=first.device)
        alive = (paths.number % self.n == 0)[:, None]  # at first all are the same
        parents: list[Tensor] = []
        while not paths.is_done:
            proposal = paths.propose(self.k)
            values = paths.value(proposal)
            paths.count(int(alive.sum()) * self.k)
            log_probs = log_probs + proposal.log_probs
            score = (values + self.prior_weight * log_probs).masked_fill(proposal.repeats | ~alive, -torch.inf)
            best, index = score.view(len(first), -1).topk(self.n, dim=1)  # of n * k candidates
            alive = best.view(-1, 1) > -torch.inf
            kept = torch.zeros_like(score, dtype=torch.int64).view(len(first), -1)
            kept = kept.scatter(1, index, alive.view_as(index).long()).view_as(score)
            parent, choice = (first[:, None] + index // self.k).flatten(), (index % self.k).flatten()
            log_probs = log_probs[parent, choice, None]
            paths.reassign(parent)
            paths.commit(proposal.select(parent), choice)
            paths.record(proposal.tokens, values, kept)
            parents.append(parent)
        _keep_own_choices(paths, parents, first)
        return paths.finish(first)


def _keep_own_choices(paths: Paths, parents: list[Tensor], prefix: Tensor) -> None:
    """Keep of the trace of all prefixes the choices among the candidates of those that the images began with.

    Args:
        paths: whose trace it is.
        parents: which prefix each of the B n prefixes extends, [B n], of every step.
        prefix: the prefix that each image is in the end, [B].
    """
    for step in reversed(range(len(parents))):
        prefix, choice = parents[step][prefix], paths.trace[step]
        own = {name: getattr(choice, name)[prefix] for name in ("tokens", "scores", "kept")}
        paths.trace[step] = replace(choice, **own)
