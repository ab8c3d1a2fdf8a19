"""The paper's PARM against the control flow of the original, with a judge that follows a script."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.showo import ShowO
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.sample import Sample
from lightning_modules.rewards.verifier import StepJudge
from tests.helpers.asked import asked
from tests.helpers.models import SHOWO, make_showo

TRACE = json.loads((SHOWO / "parm_trace.json").read_text())
SAMPLING = MaskSampling(TRACE["timesteps"])
N, IMAGES = TRACE["search_num"], TRACE["eval_num"]
SEEDS = [5, 6][:IMAGES]
ROWS: list[Mapping[str, Any]] = [{"prompt": "1 2 3"}] * IMAGES
PLAN = [path for image in TRACE["plan"] for path in image]


@pytest.fixture(scope="module")
def previewing() -> ShowO:
    """A random Show-o whose pixels are its tokens, so that the judge can tell images apart."""
    decoder = make_showo()
    decoder.image_tokenizer.decode = lambda tokens: tokens.float()[:, None, None]  # type: ignore[method-assign]
    return decoder


class Script(StepJudge):
    """Knows every path's preview after every step, and says of each what the script says."""

    def cache_key(self):
        return type(self).__name__

    def __init__(self, decoder: ShowO, plan: Sequence[Mapping[str, Any]], reset_temperature: bool) -> None:
        self.plan = plan
        self.where: dict[tuple[int, ...], tuple[int, int]] = {}
        self.asked: list[tuple[int, int]] = []
        self.finals: list[int] = []
        for path, seed in enumerate(Request(ROWS, SEEDS).repeat(N).seeds):
            state = decoder.begin(asked(["1 2 3"], [seed]), SAMPLING)
            if not reset_temperature:
                state.temperature *= path % N == 0
            for step in range(SAMPLING.steps):
                decoder.commit(state, decoder.propose(state, 1), torch.tensor([0]))
                self.where[tuple(state.tokens[0].tolist())] = (path, step)

    def _find(self, pixels: Tensor) -> list[tuple[int, int]]:
        return [self.where[tuple(image.flatten().long().tolist())] for image in pixels]

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = self._find(pixels)
        self.asked += found
        clear = torch.tensor([float(step >= self.plan[path]["clear_at"]) for path, step in found])
        return clear, torch.tensor([1 - self.plan[path]["no_prob"] for path, _ in found])

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        found = self._find(pixels)
        assert all(step == SAMPLING.steps - 1 for _, step in found)
        self.finals += [path for path, _ in found]
        return torch.tensor([self.plan[path]["yes"] for path, _ in found])


def winners(script: Script, tokens: Tensor) -> list[int]:
    found = [script.where[tuple(image.tolist())] for image in tokens]
    assert all(step == SAMPLING.steps - 1 for _, step in found)
    return [path - i * N for i, (path, _) in enumerate(found)]


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("reset_temperature", [False, True])
def test_the_trace_of_the_original(previewing: ShowO, prune: bool, reset_temperature: bool) -> None:
    script = Script(previewing, PLAN, reset_temperature)
    strategy = Potential(SAMPLING, N, "judge", prune, reset_temperature)
    decoded = strategy.decode(previewing, {"judge": script}, Request(ROWS, SEEDS))
    calls = TRACE["parm"]["judge_calls"]
    assert sorted(script.asked) == sorted((call[1], call[2]) for call in calls if call[0] == "parm")
    assert script.finals == [int(name[1][:5]) for name in calls if name[0] == "orm"]
    assert winners(script, decoded.tokens) == TRACE["parm"]["winner_per_eval"]
    every_step = 2 * N * IMAGES * SAMPLING.steps
    if prune:
        ends = [min(path["clear_at"] + 1, SAMPLING.steps) if path["no_prob"] > 0.5 else SAMPLING.steps for path in PLAN]
        resumed = [SAMPLING.steps - ends[i * N + w] for i, w in enumerate(TRACE["parm"]["winner_per_eval"])]
        assert decoded.cost.decoder_passes == 2 * (sum(ends) + sum(resumed)) < every_step
        print(f"pruning saves {1 - decoded.cost.decoder_passes / every_step:.0%} of the decoder's steps")
    else:
        assert decoded.cost.decoder_passes == every_step


def test_pruning_never_changes_the_winner_among_survivors(previewing: ShowO) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        u = torch.rand(N * IMAGES, 3, generator=generator).tolist()
        plan = [{"clear_at": int(8 * a), "no_prob": b, "yes": c} for a, b, c in u]
        script = Script(previewing, plan, True)
        strategies = [Potential(SAMPLING, N, "judge", prune) for prune in (False, True)]
        complete, pruned = (
            each.decode(previewing, {"judge": script}, Request(ROWS, SEEDS)).tokens for each in strategies
        )
        assert torch.equal(complete, pruned)


@pytest.mark.parametrize("no_prob", [0.2, 0.8])
def test_a_single_path_is_finished_whatever_is_said_of_it(previewing: ShowO, no_prob: float) -> None:
    script = Script(previewing, [{"clear_at": 1, "no_prob": no_prob, "yes": 0.0}] * N * IMAGES, True)
    decoded = Potential(SAMPLING, 1, "judge").decode(previewing, {"judge": script}, Request(ROWS, SEEDS))
    assert torch.equal(decoded.tokens, Sample(SAMPLING).decode(previewing, {}, Request(ROWS, SEEDS)).tokens)


def test_assessments_can_be_some_steps_apart(previewing: ShowO) -> None:
    plan = [{"clear_at": 0, "no_prob": 0.2, "yes": 0.5}] * N * IMAGES
    script = Script(previewing, plan, True)
    strategy = Potential(SAMPLING, N, "judge", stride=3)
    strategy.decode(previewing, {"judge": script}, Request(ROWS, SEEDS))
    assert sorted(script.asked) == [(path, 2) for path in range(N * IMAGES)]
    late = Script(previewing, [each | {"clear_at": SAMPLING.steps - 1} for each in plan], True)
    strategy.decode(previewing, {"judge": late}, Request(ROWS, SEEDS))
    last = SAMPLING.steps - 1
    assert sorted({step for _, step in late.asked}) == sorted({*range(2, SAMPLING.steps, 3), last})


def test_outcome_reward_alone(previewing: ShowO) -> None:
    script = Script(previewing, PLAN, True)
    decoded = BestOfN(Sample(SAMPLING), N, "judge").decode(previewing, {"judge": script}, Request(ROWS, SEEDS))
    assert script.finals == list(range(N * IMAGES)) and not script.asked
    assert winners(script, decoded.tokens) == TRACE["orm"]["winner_per_eval"]


def test_judges_and_decoders_that_do_not_fit_are_refused(previewing: ShowO, decoder: CompactDecoder) -> None:
    strategy = Potential(SAMPLING, N, "judge")
    with pytest.raises(ValueError, match="judge 'judge' cannot judge unfinished images; there are: none"):
        strategy.decode(previewing, {}, Request(ROWS, SEEDS))
    with pytest.raises(ValueError, match="n of at least 1, not 0"):
        Potential(SAMPLING, 0, "judge")
    with pytest.raises(ValueError, match="stride of at least 1, not 0"):
        Potential(SAMPLING, 2, "judge", stride=0)
