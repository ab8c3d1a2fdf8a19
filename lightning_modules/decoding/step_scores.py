"""The paper's PRM (arXiv 2501.13926): the judge's favourite of every step goes on, and nothing else is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, finished, previewing, step_judge_named
from lightning_modules.decoding.trace import Choice


@dataclass(frozen=True)
class StepScores(Strategy):
    """At every step the judge sees the previews of k candidates; the one with the most potential goes on.

    The candidates of a step come from one forward pass. Nothing is asked about clarity or about the finished image, so
    that early steps are decided by blurs and late ones among images that hardly differ; compare `Potential`.

    Attributes:
        sampling: how candidates are drawn.
        k: candidates a step.
        judge: name of a `StepJudge`.
    """

    sampling: MaskSampling
    k: int
    judge: str

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"step scores need k of at least 1, not {self.k}")

    @property
    def judge_names(self) -> list[str]:
        return [self.judge]

    @property
    def images_at_once(self) -> int:
        return self.k

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
        judge = step_judge_named(judges, self.judge)
        decoder = previewing(decoder, "step scores")
        texts = [row["prompt"] for row in prompts]
        noise = decoder.noise(seeds, self.k, self.sampling)
        state = decoder.begin(texts, noise, self.sampling, tokens, keep)
        repeated = [text for text in texts for _ in range(self.k)]
        trace: list[Choice] = []
        while not state.done:
            proposal = decoder.propose(state, self.k)
            pixels = decoder.image_tokenizer.decode(proposal.tokens.flatten(0, 1))
            _, potential = judge.clear_and_potential(repeated, pixels)
            state.cost.verifier_calls += len(repeated)
            potential = potential.view(-1, self.k).to(state.tokens.device)
            choice = potential.argmax(1)
            trace.append(Choice(self.judge, proposal.tokens, None, potential, one_hot(choice, self.k)))
            decoder.commit(state, proposal, choice)
        return finished(state, torch.zeros(len(prompts)), trace)
