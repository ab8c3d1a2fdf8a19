"""Verified denoising that draws candidates one by one: steps that need few leave theirs to those that need many."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder, Proposal, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, VerifierStrategy, require_positive


@dataclass(frozen=True)
class Rollover(VerifierStrategy):
    """A step takes the first candidate that is valued above the image before the step, or else its best one.

    It has k candidates, and those that steps before it have not drawn: rollover budget forcing (arXiv 2503.19385). It
    is for decoders whose candidates take a pass each. The stats have the candidates drawn in all.
    """

    n = 1
    k: int
    verifier: str = "parm"

    def __post_init__(self) -> None:
        require_positive("a budget that rolls over", k=self.k)

    def check_decoder(self, decoder: Decoder) -> None:
        super().check_decoder(decoder)
        decoder.check_candidates(self.k, self.sampling)
        if decoder.candidates_share_pass:
            raise ValueError(f"all candidates of a {type(decoder).__name__} come from one pass: there is none to save")

    @torch.no_grad()
    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        self.check_decoder(decoder)
        paths = Paths(decoder, request, self.sampling, self.k, judges=judges, verifier=self.verifier)
        before = torch.full((len(paths),), -torch.inf, device=paths.number.device)
        budget, drawn = torch.zeros_like(paths.number), torch.zeros_like(paths.number)
        while not paths.is_done:
            budget += self.k
            proposal = paths.propose()
            values, counts = paths.value(proposal)[:, 0], torch.ones_like(budget)
            if paths.state.step + 1 < paths.state.steps:  # the candidates of the last step are equal
                proposal, values, counts = self._improve(paths, proposal, values, before, budget)
            paths.commit(proposal)
            paths.record(proposal.tokens, values[:, None], torch.ones_like(counts)[:, None])
            paths.count(int(counts.sum()))
            before, budget, drawn = values, budget - counts, drawn + counts
        return replace(paths.finish(), stats={"candidates": drawn.float()})

    @staticmethod
    def _improve(
        paths: Paths, proposal: Proposal, values: Tensor, before: Tensor, budget: Tensor
    ) -> tuple[Proposal, Tensor, Tensor]:
        """Draw more candidates for paths whose value is not above `before`; return the best ones, how many were drawn.

        The proposal, of one candidate of each path, values, value before and budget are [P, ...].
        """
        counts = torch.ones_like(budget)
        while len(rows := ((values <= before) & (counts < budget)).nonzero().squeeze(1)):
            lanes = paths.select(rows)
            lanes.state = lanes.state.as_candidate(int(counts[rows[0]]))
            others = lanes.propose()
            found = lanes.value(others)[:, 0]
            counts[rows] += 1
            better = (found > values[rows]).nonzero().squeeze(1)
            proposal = proposal.put(rows[better], others.select(better))
            values = values.index_put((rows[better],), found[better])
        return proposal, values, counts
