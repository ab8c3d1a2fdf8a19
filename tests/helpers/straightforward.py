"""Show-o's sampler without any care for speed.

It runs the whole padded sequence at every step with a dense mask, computes logits of the whole vocabulary at every
position, and decodes one image at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.attention import attend
from lightning_modules.backbone.mask_sampling import MaskSampling, SeededNoise, least_confident, masked_after
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.showo import ShowO
from tests.helpers.asked import asked
from tests.helpers.models import phi

SAMPLING = MaskSampling(steps=18, guidance=1.75)


PROMPTS = ["a photo of a bench", "a photo of two clocks", "a photo of a red dog and a blue cat", "a photo of a cow"]


class Words:
    """Each word is an id; ids are as many as it is told."""

    end_of_text = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[1 + sum(map(ord, word)) % (self.size - 1) for word in prompt.split()] for prompt in prompts]


def build(text: int, codes: int, dim: int = 256, depth: int = 8, heads: int = 8) -> ShowO:
    torch.manual_seed(0)
    tokenizer: Any = torch.nn.Module()
    tokenizer.codebook_size, tokenizer.num_tokens = codes, 256
    decoder = ShowO(tokenizer, Words(text), 128, phi(dim, depth, heads, 4.0), dim // heads // 2)
    for weight in decoder.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.05)  # far from uniform, so that codes are not decided by rounding
    return decoder.eval()


def ours(decoder: ShowO, prompts: Sequence[str]) -> Tensor:
    state = decoder.begin(asked(prompts), SAMPLING)
    only = torch.zeros(len(prompts), dtype=torch.int64, device=state.tokens.device)
    while not state.is_done:
        decoder.commit(state, decoder.propose(state, 1), only)
    return state.tokens


@torch.no_grad()
def straightforward(decoder: ShowO, prompt: str, seed: int) -> Tensor:
    device = decoder.embed.weight.device
    noise = SeededNoise.draw([seed], 1, SAMPLING.steps, 256).to(device)
    with device:  # all that follows is made there
        return _straightforward(decoder, prompt, noise)


def _straightforward(decoder: ShowO, prompt: str, noise: SeededNoise) -> Tensor:
    words = decoder.vocabulary
    blocks = [words.block(text) for text in decoder.text_tokenizer.encode([prompt, ""])]
    length = words.max_text + 1
    padded = torch.tensor([[words.text] * (length - len(block)) + block for block in blocks])
    total = length + 258
    real = torch.cat([padded != words.text, torch.ones(2, 258, dtype=torch.bool)], 1)
    allowed = torch.ones(total, total, dtype=torch.bool).tril()
    allowed[length:] = True
    mask = (allowed & real[:, None] | torch.eye(total, dtype=torch.bool))[:, None]
    rotary = Rotary.at(torch.arange(total), decoder.rotary_dims)
    ids = torch.full((1, 256), words.mask)
    for step in range(SAMPLING.steps):
        image = torch.cat([torch.tensor([[words.soi]]), ids, torch.tensor([[words.eoi]])], 1)
        x = decoder.embed(torch.cat([padded, image.repeat(2, 1)], 1))
        hidden = decoder.transformer.run(x, lambda _, q, k, v: attend(rotary(q), rotary(k), v, allowed=mask))[-1]
        conditional, unconditional = decoder.head(decoder.norm(hidden)).float().chunk(2)
        logits = (1 + SAMPLING.guidance) * conditional - SAMPLING.guidance * unconditional
        probs = logits[:, length + 1 : -1, words.first_code : words.mask].softmax(-1)
        unknown = ids == words.mask
        drawn = noise.codes(step, torch.arange(256), probs[0], 1).T
        chosen = probs.gather(2, drawn[..., None]).squeeze(2)
        codes = torch.where(unknown, drawn, ids - words.first_code)
        count = masked_after(step, SAMPLING.steps, unknown)
        temperature = SAMPLING.temperature_at(step)
        masked, _ = least_confident(chosen, unknown, count, temperature, noise.confidence(step, 1)[:, 0])
        ids = torch.where(masked, words.mask, codes + words.first_code)
    return codes
