"""Plain sampling: one candidate a step, taken as it comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.strategy import Decoded, Judges, Record, Strategy


@dataclass(frozen=True)
class Sample(Strategy):
    """Plain sampling, with the settings of the decoder's kind."""

    sampling: Sampling | MaskSampling

    def decode(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
    ) -> Decoded:
        noise = decoder.noise(seeds, 1, self.sampling)
        state = decoder.begin([row["prompt"] for row in prompts], noise, self.sampling)
        record = Record()
        only = torch.zeros(len(prompts), dtype=torch.int64, device=state.tokens.device)
        while not state.done:
            proposal = decoder.propose(state, 1)
            decoder.commit(state, proposal, only)
            record.add(state, proposal.evidence)
        return record.decoded(state, torch.zeros(len(prompts)))
