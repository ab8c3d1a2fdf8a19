"""Plain sampling: one candidate a step, taken as it comes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, finished


@dataclass(frozen=True)
class Sample(Strategy):
    """Plain sampling, with the settings of the decoder's kind."""

    sampling: Sampling | MaskSampling

    @property
    def judge_names(self) -> list[str]:
        return []

    @property
    def images_at_once(self) -> int:
        return 1

    def decode(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Decoded:
        noise = decoder.noise(seeds, 1, self.sampling)
        state = decoder.begin([row["prompt"] for row in prompts], noise, self.sampling, tokens, keep)
        only = torch.zeros(len(prompts), dtype=torch.int64, device=state.tokens.device)
        while not state.done:
            decoder.commit(state, decoder.propose(state, 1), only)
        return finished(state, torch.zeros(len(prompts)))
