"""Scores of rollouts by several judges at once."""

import json
import math

import pytest
import torch

from datamodules.preferences import ensemble
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import Reward


class Brightness(Reward):
    """Mean of the pixels, and the number of clauses as a sign that prompts arrive with their images."""

    def cache_key(self):
        return type(self).__name__

    def __call__(self, prompts, pixels):
        return pixels.flatten(1).mean(1) + torch.tensor([float(len(row["include"])) for row in prompts])


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_judges_are_weighed_and_summed_at_any_batch_size(
    decoder: CompactDecoder, parm: PARM, rows: list[dict], batch_size: int
) -> None:
    tokens = torch.randint(0, 32, (12, decoder.num_tokens), generator=torch.Generator().manual_seed(0))
    prompts, correct = [row["prompt"] for row in rows], [float(i % 2) for i in range(12)]
    metadata = [json.dumps(row) for row in rows]
    clauses = [[1.0, i % 3 == 0, math.nan] for i in range(12)]
    rollouts = {
        "prompt": prompts,
        "metadata": metadata,
        "tokens": tokens.tolist(),
        "reward": correct,
        "clauses": clauses,
    }
    judges = {"parm": parm, "bright": Brightness()}
    weights = {"geneval": 1.0, "clauses": 0.3, "parm": 0.5, "bright": 2.0}
    scores = ensemble(decoder, judges, weights, rollouts, batch_size)
    value = parm.values(decoder.features(prompts, tokens), [decoder.num_tokens])[:, 0].exp()
    bright = Brightness()(rows, decoder.image_tokenizer.decode(tokens))
    share = torch.tensor([1.0 if i % 3 == 0 else 0.5 for i in range(12)])
    expected = torch.tensor(correct) + 0.3 * share + 0.5 * value + 2 * bright
    torch.testing.assert_close(torch.from_numpy(scores).float(), expected, atol=1e-4, rtol=1e-4)
