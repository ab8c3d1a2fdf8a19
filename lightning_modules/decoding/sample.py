"""Plain sampling: one candidate a step, taken as it comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_modules.backbone.next_token import Evidence, NextTokenDecoder
from lightning_modules.backbone.sampling import Sampling, uniform_noise
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy


@dataclass(frozen=True)
class Sample(Strategy):
    """Plain sampling with temperature, top-k, top-p and guidance."""

    sampling: Sampling

    def decode(
        self,
        decoder: NextTokenDecoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
    ) -> Decoded:
        noise = uniform_noise(seeds, 1, decoder.num_tokens)
        state = decoder.begin([row["prompt"] for row in prompts], noise, self.sampling)
        steps: list[Evidence] = []
        while not state.done:
            proposal = decoder.propose(state, 1)
            steps.append(proposal.evidence)
            decoder.commit(state, proposal.tokens[:, 0])
        return Decoded(state.tokens, Evidence.concatenate(steps), state.cost, torch.zeros(len(prompts)))
