"""Beam search over a verifier's values: the best prefixes of an image continue, whichever prefix they extend."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, VerifierStrategy, require_positive


@dataclass(frozen=True)
class Beam(VerifierStrategy):
    """At every step each of n prefixes has k candidates; of all n * k the n of the highest score continue.

    This is beam search against a process reward model (arXiv 2408.03314, section 5.2), without lookahead. The k
    candidates of a prefix share its one decoder pass; of equal ones one counts. The prefix of the highest final score
    is the image. With n = 1 this is verified decoding.

    Attributes:
        n, k: prefixes of each image, and candidates of each prefix.
        prior_weight: score = log V + prior_weight log p, p being the sampling distribution's of the whole prefix.
    """

    n: int
    k: int
    verifier: str = "parm"
    prior_weight: float = 0.0

    def __post_init__(self) -> None:
        require_positive("beam search", n=self.n, k=self.k)

    def check_decoder(self, decoder: Decoder) -> None:
        super().check_decoder(decoder)
        decoder.check_candidates(self.k, self.sampling)

    @property
    def images_at_once(self) -> int:
        return self.n * self.k

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling, self.k, self.n, judges, self.verifier)
        first = paths.number[:: self.n]  # of each image's prefixes
        log_probs = torch.zeros(len(paths), 1, device=first.device)
        alive = (paths.number % self.n == 0)[:, None] | (not paths.state.starts_alike)  # of equal ones the first
        asked = torch.zeros_like(first[0])
        parents: list[Tensor] = []
        while not paths.is_done:
            proposal = paths.propose(self.k)
            values = paths.value(proposal)
            asked += self.k * alive.sum()
            log_probs = log_probs + proposal.log_probs
            score = (values + self.prior_weight * log_probs).masked_fill(proposal.repeats | ~alive, -torch.inf)
            best, index = score.view(len(first), -1).topk(self.n, dim=1)  # of n * k candidates
            alive = best.view(-1, 1) > -torch.inf
            kept = torch.zeros(len(first), self.n * self.k, dtype=torch.int64, device=first.device)
            kept = kept.scatter(1, index, alive.view_as(index).long()).view_as(score)
            parent, choice = (first[:, None] + index // self.k).flatten(), (index % self.k).flatten()
            log_probs = log_probs[parent, choice, None]
            paths.reassign(parent)
            paths.commit(proposal.select(parent), choice)
            paths.record(proposal.tokens, values, kept)
            parents.append(parent)
        paths.count(int(asked))
        prefix = first  # of each image; in the end its trace has the choices among this prefix's candidates alone
        for step in reversed(range(len(parents))):
            prefix = parents[step][prefix]
            paths.trace[step] = paths.trace[step].select(prefix)
        return paths.finish(first)
