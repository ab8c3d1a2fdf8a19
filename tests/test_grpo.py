"""GRPO: its gradient against enumeration, its ratios against what was recorded, a policy that learns."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.lora import LoRA
from lightning_modules.backbone.mask_sampling import MaskSampling, masked_again_log_probs
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.published import nodes
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.backbone.text import WordTokenizer
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.decoding.sample import Sample
from lightning_modules.files import BUNDLED
from lightning_modules.grpo import GRPOModule, GRPOObjective, k3
from lightning_modules.optim import trainable
from lightning_modules.parm import PARMObjective
from lightning_modules.rewards.geneval_rules import CLAUSES
from tests.helpers.configs import composed
from tests.helpers.models import make_decoder, make_parm
from tests.helpers.toy import IMAGES, TOKENS, Identity, ToyDecoder, ToyState

WEIGHTS = {"right": 1.0}
PLAIN = GRPOObjective(baseline="others", scale="none")


class ToyPolicy(ToyDecoder):
    """The toy decoder with logits that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(self.table.clone())

    def begin(self, request: Request, sampling: Any, k: int = 1) -> ToyState:
        self.table = self.logits.detach().log_softmax(-1)
        return super().begin(request, sampling, k)

    def policy_log_probs(
        self, prompts: Sequence[str], tokens: Tensor, sampling: Any, trajectory: Any = None, steps: int | None = None
    ) -> Tensor:
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
        found = self.logits.log_softmax(-1)[torch.arange(TOKENS), before, tokens]
        return found[:, :steps]

    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.policy_log_probs(prompts, tokens, None).sum(1)


def right(images: Tensor) -> Tensor:
    """The reward: codes of an image add up to a multiple of 3."""
    return (images.sum(1) % 3 == 0).float()


def make_module(objective: GRPOObjective = PLAIN, decoder: Any = None, **settings: Any) -> GRPOModule:
    module = GRPOModule(decoder or ToyPolicy(), None, torch.optim.AdamW, 1, objective, None, **settings)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return module


def make_batch(module: GRPOModule, groups: int, size: int, first: int = 0, **shaping: Any) -> dict[str, Any]:
    """Groups of the toy policy's own images, with noise that is theirs from `first` on."""
    seeds = range(first, first + groups * size)
    decoded = Sample(module.sampling).decode(module.decoder, {}, Request([{"prompt": ""}] * len(seeds), seeds))
    assert decoded.log_probs is not None
    rewards = right(decoded.tokens).view(groups, size)
    potentials = {name: function(decoded.tokens).unflatten(0, (groups, size)) for name, function in shaping.items()}
    advantage = module.advantages({"right": rewards}, WEIGHTS, potentials).flatten(0, 1).numpy()
    images = {"prompt": [""] * len(seeds), "tokens": decoded.tokens, "recorded": decoded.log_probs.numpy()}
    images["seed"] = list(seeds)
    if (way := decoded.trajectory) is not None:
        read = {"previews": way.previews, "fixed_at": way.fixed_at, "cuts": way.cuts.numpy()}
        images |= {"trajectory": read}
    return images | {"advantage": advantage, "stats": {}}


def part(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value if name == "stats" else value[rows] for name, value in batch.items()}


def gradient(module: GRPOModule, *batches: dict[str, Any]) -> Tensor:
    """The gradient of the mean loss of some batches, all parameters in a row."""
    module.zero_grad()
    for batch in batches:
        (module.training_step(batch, 0) / len(batches)).backward()
    return torch.cat([weight.grad.flatten().clone() for weight in trainable(module) if weight.grad is not None])


def expected_reward(policy: ToyPolicy) -> Tensor:
    return (policy.policy_log_probs([], IMAGES, None).sum(1).exp() * right(IMAGES)).sum()


@pytest.mark.parametrize(("baseline", "share"), [("others", 1.0), ("mean", 3 / 4), ("none", 1.0)])
def test_the_expected_gradient_is_that_of_the_expected_reward(baseline: Any, share: float) -> None:
    """Within 4.5 standard errors; a group's mean contains the image itself, which takes its share away."""
    module = make_module(GRPOObjective(baseline=baseline, scale="none"))
    (exact,) = torch.autograd.grad(expected_reward(module.decoder), module.decoder.logits)
    chunks = [gradient(module, make_batch(module, 60, 4, first=1000 * i)) for i in range(40)]
    found, wanted = -TOKENS * torch.stack(chunks), share * exact.flatten()  # the loss is a mean over steps
    error = found.std(0) / len(chunks) ** 0.5
    assert ((found.mean(0) - wanted).abs() <= 4.5 * error + 1e-7).all()
    assert torch.cosine_similarity(found.mean(0), wanted, 0) > 0.9  # the bound is not met by noise


def so_far(images: Tensor) -> Tensor:
    """P(the image will be right | the tokens before each step), by enumeration, [B, S]; of none it is left out."""
    log_p = ToyPolicy().policy_log_probs([], IMAGES, None).sum(1).detach()
    agree = (images[:, None] == IMAGES).cumprod(2)[..., :-1]  # with each image up to each step
    mass = (agree * log_p.exp()[:, None]).sum(1)
    value = (agree * (log_p.exp() * right(IMAGES))[:, None]).sum(1) / mass
    return nn.functional.pad(value, (1, 0))


@pytest.mark.parametrize("potential", [so_far, lambda images: nn.functional.pad(images[:, :-1].float(), (1, 0))])
def test_potentials_do_not_move_the_optimum(potential: Any) -> None:
    """Neither true values nor any other function of the prefix."""
    module = make_module(PLAIN)
    (exact,) = torch.autograd.grad(expected_reward(module.decoder), module.decoder.logits)
    chunks = [gradient(module, make_batch(module, 60, 4, first=1000 * i, right=potential)) for i in range(40)]
    found = -TOKENS * torch.stack(chunks)
    error = found.std(0) / len(chunks) ** 0.5
    assert ((found.mean(0) - exact.flatten()).abs() <= 4.5 * error + 1e-7).all()
    assert torch.cosine_similarity(found.mean(0), exact.flatten(), 0) > 0.9


SAMPLINGS = [
    Sampling(temperature=0.9, guidance=0.5),
    Sampling(),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, guidance=1.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_ratios_of_the_first_minibatch_are_one(sampling: Sampling, rows: list) -> None:
    decoder = NextTokenDecoder.from_pretrained(BUNDLED / "shapes_decoder").eval()
    decoded = Sample(sampling).decode(decoder, {}, Request(rows * 2, range(2 * len(rows))))
    with torch.no_grad():
        again = decoder.policy_log_probs([row["prompt"] for row in rows * 2], decoded.tokens, sampling)
    assert decoded.log_probs is not None and decoded.log_probs.min() < -1
    torch.testing.assert_close(again, decoded.log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 16.0])
@pytest.mark.parametrize("score_remasked", [False, True])
def test_ratios_of_grids_are_one(rows: list, score_remasked: bool, temperature: float) -> None:
    decoder = MaskTokenDecoder.from_pretrained(BUNDLED / "shapes_masked").eval()
    sampling = MaskSampling(steps=8, guidance=1.5, temperature=temperature, score_remasked=score_remasked)
    decoded = Sample(sampling).decode(decoder, {}, Request(rows, range(len(rows))))
    with torch.no_grad():
        prompts = [row["prompt"] for row in rows]
        again = decoder.policy_log_probs(prompts, decoded.tokens, sampling, decoded.trajectory)
    torch.testing.assert_close(again, decoded.log_probs, atol=1e-3, rtol=0)  # sums over up to 64 tokens


def test_what_is_masked_again_counts_by_the_mass_below_the_cut() -> None:
    probs = torch.tensor([[0.4, 0.35, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64)
    log_p, cut = probs.log().requires_grad_(), probs.new_tensor([0.3, 0.9]).log()
    found = masked_again_log_probs(log_p, cut, 0.0)
    assert found.exp().tolist() == pytest.approx([0.25, 1.0], abs=1e-5)
    found[0].backward()
    assert log_p.grad is not None and log_p.grad.tolist()[0] == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)
    with torch.no_grad():
        noisy = masked_again_log_probs(log_p, cut, 16.0)
    codes = torch.distributions.Categorical(probs).sample((400_000,))
    gumbel = torch.distributions.Gumbel(0.0, 16.0).sample(codes.shape)
    below = (log_p.detach()[torch.arange(2), codes] + gumbel < cut).double().mean(0)
    torch.testing.assert_close(noisy.exp(), below, atol=4e-3, rtol=0)


def make_toy_masked() -> MaskTokenDecoder:
    """A real mask-token decoder of 81 images: 4 tokens of 3 codes, filled in 2 steps of 2."""
    decoder = MaskTokenDecoder(Identity(), WordTokenizer(["star"], 2), 4, TransformerConfig(8, 1, 2), 2)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[-1] ** -0.5)
    return decoder.eval()


def enumerated_reward(decoder: MaskTokenDecoder, noise: bool) -> Tensor:
    """The expected reward: the first step fixes the two surest of four codes or, with all noise, any two."""
    prefix, reward = [decoder.encode_prompts([""])], torch.tensor(0.0)
    pairs = torch.tensor([*combinations(range(TOKENS), 2)])
    nothing = torch.zeros(1, TOKENS, dtype=torch.int64)
    first = decoder.code_logits(nothing, torch.ones_like(nothing, dtype=torch.bool), prefix).log_softmax(-1)
    drawn = first[0, torch.arange(TOKENS), IMAGES]  # of all 81 draws of the first step
    surest = drawn.topk(2).indices.sort(1).values
    for pair in pairs:
        chance = torch.tensor(1 / len(pairs)) if noise else (surest == pair).all(1).float()
        unknown = torch.ones(len(IMAGES), TOKENS, dtype=torch.bool).index_fill(1, pair, False)
        again = decoder.code_logits(IMAGES, unknown, [prefix[0].select(torch.zeros(len(IMAGES)).long())])
        log_p = again.log_softmax(-1).gather(-1, IMAGES[..., None])[..., 0]
        kept = (IMAGES[:, None, pair] == IMAGES[:, pair]).all(2)  # [images, draws that begin so]
        begin = (kept * (drawn.sum(1).exp() * chance)).sum(1)
        reward = reward + (begin * (log_p * unknown).sum(1).exp() * right(IMAGES)).sum()
    return reward


@pytest.mark.parametrize("temperature", [0.0, 1e4])
def test_the_expected_gradient_of_grids_is_that_of_the_expected_reward(temperature: float) -> None:
    """What is masked again counts where there is no noise, and may be left out where noise alone decides it."""
    module = make_module(PLAIN, make_toy_masked())
    weights = trainable(module)
    exact = torch.autograd.grad(enumerated_reward(module.decoder, temperature > 0), weights, allow_unused=True)
    wanted = torch.cat([part.flatten() for part in exact if part is not None])
    for score_remasked in (True, False):
        module.sampling = MaskSampling(2, 0.0, temperature, score_remasked)
        found = -2 * sum(gradient(module, make_batch(module, 200, 4, first=1000 * i)) for i in range(10)) / 10
        if score_remasked or temperature:
            assert torch.cosine_similarity(found, wanted, 0) > 0.995
            assert found.norm() / wanted.norm() == pytest.approx(1, abs=0.05)
        else:
            assert torch.cosine_similarity(found, wanted, 0) < 0.99


def test_groups_without_spread_change_nothing() -> None:
    module = make_module(GRPOObjective())
    batch = make_batch(module, 4, 4)
    equal = torch.full((2, 4), 0.7)
    assert not module.advantages({"right": equal}, WEIGHTS, {}).any()
    still = batch | {"advantage": np.zeros((16, 1), np.float32)}
    assert not gradient(module, still).any()
    torch.testing.assert_close(gradient(module, batch, still), gradient(module, batch) / 2)


def test_accumulated_minibatches_are_the_whole_batch() -> None:
    module = make_module(GRPOObjective(beta=0.1))
    batch = make_batch(module, 8, 4)
    with torch.no_grad():  # so that ratios are not 1
        module.decoder.logits.add_(0.1 * torch.randn(TOKENS, 3, 3, generator=torch.Generator().manual_seed(0)))
    whole = gradient(module, batch)
    for size in (16, 4):
        parts = [part(batch, slice(start, start + size)) for start in range(0, 32, size)]
        torch.testing.assert_close(gradient(module, *parts), whole)


def test_only_the_first_steps_teach() -> None:
    """The others' part of the gradient is gone, and the mean is over fewer steps."""
    whole, first = make_module(), make_module(GRPOObjective(baseline="others", scale="none", steps=2))
    batch = make_batch(whole, 8, 4)
    found, wanted = (gradient(module, batch).view(TOKENS, 3, 3) for module in (first, whole))
    torch.testing.assert_close(found[:2] * 2 / TOKENS, wanted[:2])
    assert not found[2:].any() and wanted[2:].any()


def trained(objective: GRPOObjective, steps: int = 40) -> GRPOModule:
    module = make_module(objective)
    optimizer = torch.optim.Adam(trainable(module), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        module.training_step(make_batch(module, 16, 4, first=100 * step), step).backward()
        optimizer.step()
    return module


def test_the_policy_learns_and_a_large_beta_holds_it_at_the_reference() -> None:
    start = ToyPolicy()
    log_p = start.policy_log_probs([], IMAGES, None).sum(1).detach()
    kl, reward = {}, {}
    for beta in (0.0, 1000.0):
        policy = trained(GRPOObjective(beta=beta)).decoder
        now = policy.policy_log_probs([], IMAGES, None).sum(1).detach()
        kl[beta], reward[beta] = float((now.exp() * (now - log_p)).sum()), expected_reward(policy).item()
    assert reward[0.0] > reward[1000.0] + 0.2
    assert kl[1000.0] < 0.01 < 0.1 < kl[0.0]


def test_rejection_sampling_learns_from_what_is_right_alone() -> None:
    objective = GRPOObjective(baseline="none", scale="none", ratio="likelihood")
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    assert torch.equal(objective.advantages({"right": rewards}, WEIGHTS, {})[..., 0], rewards)
    module = make_module(objective)
    batch = make_batch(module, 4, 4)
    del batch["recorded"]  # whoever made them
    chosen = right(batch["tokens"]).bool()
    likelihood = -module.decoder.policy_log_probs([], batch["tokens"][chosen], None).sum() / (16 * TOKENS)
    (wanted,) = torch.autograd.grad(likelihood, module.decoder.logits)
    torch.testing.assert_close(gradient(module, batch), wanted.flatten())
    positive = GRPOObjective(positive_only=True).advantages({"right": rewards}, WEIGHTS, {})
    assert positive[0, :, 0].tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("experiment", ["rejection_sampling", "expert_iteration"])
def test_images_whose_likelihood_is_learnt_are_drawn_as_they_are_learnt(experiment: str) -> None:
    config: Any = OmegaConf.to_container(composed(f"experiment={experiment}").data.spec.strategy, resolve=True)
    drawn = [node for _, node in nodes(config) if node["_target_"].endswith(".Sampling")]
    assert [(node["guidance"], node["temperature"]) for node in drawn] == [(0.0, 1.0)]


def test_images_without_a_record_have_no_ratio() -> None:
    module = make_module()
    batch = make_batch(module, 1, 4)
    del batch["recorded"]
    with pytest.raises(ValueError, match=r"module\.objective\.ratio must be likelihood"):
        module.training_step(batch, 0)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [1.0, -1.0, 1.0, -1.0]),
        ({"baseline": "others", "scale": "none"}, [2 / 3, -2 / 3, 2 / 3, -2 / 3]),
        ({"scale": "none"}, [0.5, -0.5, 0.5, -0.5]),
        ({"scale": "batch"}, [1.26491, -1.26491, 1.26491, -1.26491]),  # .5 / sqrt(mean([.25, .0625]))
        ({"max_advantage": 0.4}, [0.4, -0.4, 0.4, -0.4]),
        ({"min_spread": 0.5}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_advantages_are_those_of_the_papers(settings: dict, wanted: list[float]) -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.5, 0.5, 0.5]])
    rewards[1] = torch.tensor([0.25, 0.75, 0.25, 0.75])  # variance .0625
    found = GRPOObjective(**settings).advantages({"right": rewards}, WEIGHTS, {})[0, :, 0]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_each_reward_is_normalised_by_itself() -> None:
    small, large = torch.tensor([[0.0, 0.01, 0.02]]), torch.tensor([[300.0, 100.0, 200.0]])
    objective, weights = GRPOObjective(), {"small": 2.0, "large": 1.0}
    both = objective.advantages({"small": small, "large": large}, weights, {})
    alone = [objective.advantages({name: each}, {name: 1.0}, {}) for name, each in (("small", small), ("large", large))]
    torch.testing.assert_close(both, 2 * alone[0] + alone[1])
    torch.testing.assert_close(alone[0][0, 2], alone[1][0, 0])


def test_ratios_are_clipped_on_each_side() -> None:
    objective = GRPOObjective(clip_low=0.1, clip_high=0.3)
    ratio = torch.tensor([[0.5, 1.5], [0.5, 1.5]])
    log_probs = ratio.log().requires_grad_()
    loss, log = objective.loss(log_probs, torch.zeros(2, 2), torch.tensor([[1.0], [-1.0]]), None)
    assert loss.item() == pytest.approx(-(0.5 + 1.3 - 0.9 - 1.5) / 4)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[pytest.approx(-0.125), 0.0], [0.0, pytest.approx(0.375)]]
    assert log["clipped_low"] == log["clipped_high"] == 0.25
    sequence, _ = GRPOObjective(ratio="sequence").loss(log_probs, torch.zeros(2, 2), torch.tensor([[1.0], [0.0]]), None)
    assert sequence.item() == pytest.approx(-(0.75**0.5) / 2)


def test_ratios_that_explode_stay_finite_and_teach_nothing() -> None:
    log_probs = torch.tensor([[100.0, -torch.inf]], requires_grad=True)
    loss, log = GRPOObjective().loss(log_probs, torch.zeros(1, 2), torch.tensor([[-1.0]]), None)
    loss.backward()
    assert loss.isfinite() and log_probs.grad is not None and not log_probs.grad.any()
    assert all(value.isfinite() for value in log.values())


def test_k3_estimates_the_divergence() -> None:
    p, q = (torch.tensor(each).softmax(0) for each in ([0.3, -1.0, 0.7], [0.0, 0.2, 0.4]))
    log_ratio = q.log() - p.log()
    assert (k3(log_ratio) >= 0).all()
    assert float((p * k3(log_ratio)).sum()) == pytest.approx(float((p * -log_ratio).sum()), rel=1e-5)
    assert k3(torch.tensor([-torch.inf, torch.inf])).isfinite().all()


def test_adapters_switched_off_are_the_reference(rows: list) -> None:
    sampling = Sampling(guidance=0.5)
    decoder = make_decoder()
    module = make_module(GRPOObjective(beta=0.5), decoder, lora=LoRA(rank=2))
    module.sampling = sampling
    assert module.reference is None
    prompts = [row["prompt"] for row in rows]
    tokens = torch.randint(0, 32, (len(rows), 16), generator=torch.Generator().manual_seed(0))
    plain = make_decoder().policy_log_probs(prompts, tokens, sampling)
    for name, weight in decoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    batch = {"prompt": prompts, "tokens": tokens}
    reference = module._reference_log_probs(batch)
    assert reference is not None
    torch.testing.assert_close(reference, plain, atol=1e-5, rtol=1e-5)
    assert (decoder.policy_log_probs(prompts, tokens, sampling) - plain).abs().max() > 0.01
    assert all(weight.requires_grad == (".lora_" in name) for name, weight in decoder.named_parameters())


def test_refitting_trains_parm_and_leaves_the_policy_to_the_rewards(rows: list) -> None:
    decoder = make_decoder()
    tokens = torch.randint(0, 32, (len(rows), 16), generator=torch.Generator().manual_seed(0))
    labels = {"correct": torch.ones(len(rows)), "clauses": torch.full((len(rows), len(CLAUSES)), torch.nan)}
    labels |= {"grounding": torch.zeros(len(rows), 16, decoder.max_words), "first_unverified": torch.zeros(len(rows))}
    batch = {"prompt": [row["prompt"] for row in rows], "tokens": tokens, "labels": labels, "stats": {}}
    batch["seed"] = list(range(len(rows)))
    batch["advantage"] = np.linspace(-1, 1, len(rows), dtype=np.float32)[:, None]
    found = []
    for refit in (PARMObjective(), None):
        parm, objective = make_parm(decoder), GRPOObjective(ratio="likelihood")
        module = GRPOModule(decoder, parm, torch.optim.AdamW, 1, objective, Sampling(), refit)
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        decoder.zero_grad()
        module.training_step(batch, 0).backward()
        found.append([weight.grad.clone() for weight in decoder.parameters() if weight.grad is not None])
        assert any(weight.grad is not None and weight.grad.any() for weight in parm.parameters()) == bool(refit)
        assert [*module.exported] == ["decoder", *(["parm"] if refit else [])]
        assert [group.get("lr") for group in module.trained()] == [None, *([1e-4] if refit else [])]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_reference_is_not_saved() -> None:
    decoder = make_decoder()
    module = make_module(GRPOObjective(beta=0.5), decoder)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"decoder"}
    assert list(module.exported) == ["decoder"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"baseline": "median"}, "objective.baseline must be one of mean, others, none, not 'median'"),
        ({"ratio": "image"}, "objective.ratio must be one of step, sequence, likelihood, not 'image'"),
        ({"clip_low": -0.1}, "objective.clip_low must be at least 0, not -0.1"),
        ({"clip_low": 1.0}, "objective.clip_low must be below 1, as no ratio is below 0, not 1.0"),
        ({"steps": 0}, "objective.steps must be at least 1, or null, not 0"),
        ({"max_advantage": 0.0}, "objective.max_advantage must be above 0, or null, not 0.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GRPOObjective(**settings)
