"""The flow decoder: passes over patches, training, what verifiers read."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Cost, Request
from lightning_modules.backbone.denoising_sampling import FlowSampling
from lightning_modules.backbone.flow import FlowDecoder
from lightning_modules.backbone.image_tokenizer import PixelPatches
from lightning_modules.backbone.loading import export, pretrained
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.verifier import Likelihood
from tests.helpers.models import make_decoder, make_flow, make_parm

PROMPTS = ["a photo of a red star", "a photo of two blue hearts", "a photo of a green ring"]
REQUEST = Request([{"prompt": prompt} for prompt in PROMPTS], [1, 2, 3])
SDE = FlowSampling(4, guidance=1.0, solver="sde", eta=0.5, shift=3.0)


@pytest.fixture(scope="module")
def flow() -> FlowDecoder:
    return make_flow()


def bare(depth: int = 2) -> FlowDecoder:
    """One without features, as it is before training."""
    made = make_flow(depth)
    return FlowDecoder(PixelPatches(4, 16), made.text_tokenizer.vocabulary, 12, made.transformer.config, 1)


def test_an_image_depends_on_its_prompt_and_seed_alone(flow: FlowDecoder) -> None:
    together = Sample(SDE).decode(flow, {}, REQUEST)
    assert together.tokens.shape == (3, 16, 48) and together.cost.decoder_passes == 3 * 4 * 2
    assert together.cost.tokens == 3 * 4 * 2 * 16
    for i in range(3):
        alone = Sample(SDE).decode(flow, {}, REQUEST.select(torch.tensor([i])))
        assert torch.allclose(alone.tokens, together.tokens[i : i + 1], atol=1e-4)
    other = Sample(SDE).decode(flow, {}, Request(REQUEST.rows[:1], [9])).tokens
    assert (other - together.tokens[:1]).abs().max() > 0.05


def test_passes_are_made_with_the_prompt_and_without_if_anything_needs_both() -> None:
    decoder = bare()
    for guidance, branches in ((0.0, 1), (1.0, 2)):
        made = Sample(FlowSampling(3, guidance=guidance)).decode(decoder, {}, REQUEST)
        assert made.cost.decoder_passes == 3 * 3 * branches and made.features is None
    with pytest.raises(ValueError, match="verification needs features"):
        decoder.check_readable()


def test_guidance_leads_away_from_the_image_without_a_prompt(flow: FlowDecoder) -> None:
    latents = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    levels, condition = flow.levels(SDE), flow.encode(PROMPTS, SDE)

    def clean(scale: float) -> Tensor:
        sampling = FlowSampling(4, guidance=scale, shift=3.0)
        return flow.predict(latents, levels, 1, condition, sampling, Cost()).clean

    with torch.no_grad():
        time = torch.full((3,), levels.times[1])
        unconditional = flow.denoise(latents, time, flow.encode([""] * 3, SDE).prefixes[:1])[0]
        assert torch.allclose(clean(2.0), clean(0.0) + 2 * (clean(0.0) - unconditional), atol=1e-4)
        assert (clean(0.0) - unconditional).abs().max() > 0.01
        found = flow.predict(latents, levels, 1, condition, SDE, Cost())
        again = levels.alphas[1] * found.clean + levels.sigmas[1] * found.noise
        assert torch.allclose(again, latents, atol=1e-5)


def test_it_learns_to_draw_what_prompts_say() -> None:
    decoder = bare(depth=1).train()
    names, colors = ["red star", "blue ring"], torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])
    images = colors.repeat_interleave(16, 1)[:, None].expand(-1, 16, -1)  # of one colour each
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(120):
        loss = decoder.nll(names * 8, images.repeat(8, 1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 10 * losses[-1]
    decoder.eval()
    right, wrong = (decoder.log_probs(names, order, [1, 2]) for order in (images, images.flip(0)))
    assert right.shape == (2,) and (right > wrong + 10).all()
    made = Sample(FlowSampling(6, solver="sde", eta=0.5)).decode(
        decoder, {}, Request([{"prompt": n} for n in names], [1, 2])
    )
    assert (made.tokens - images).abs().mean() < 0.15


def test_policy_log_probs_are_differentiable_and_those_of_decoding(flow: FlowDecoder) -> None:
    made = Sample(SDE).decode(flow, {}, REQUEST)
    found = flow.policy_log_probs(PROMPTS, made.tokens, SDE, made.trajectory)
    assert made.log_probs is not None and torch.allclose(made.log_probs, found, rtol=1e-4, atol=0.02)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert flow.patch_proj.weight.grad is not None and flow.patch_proj.weight.grad.abs().sum() > 0
    flow.zero_grad()


def test_verifiers_read_the_pass_of_each_candidate(flow: FlowDecoder) -> None:
    parm = make_parm(flow)
    state = flow.begin(REQUEST, SDE, 3)
    proposal = flow.propose(state, 3)
    features = proposal.features
    assert features is not None and features.candidates == 3 and features.hidden.shape == (3, 3 * 16, 64)
    memory = parm.begin(state.prompt, flow.num_tokens)
    values = parm.score(memory, features)
    assert values.shape == (3, 3) and values.std(1).min() > 0
    each = parm.values(proposal.unfold().features, [16]).view(3, 3)  # type: ignore[arg-type]
    assert torch.allclose(values, each, atol=1e-5)
    choice = torch.tensor([2, 0, 1])
    flow.commit(state, proposal, choice)
    assert state.features is not None and torch.equal(
        state.features.entropy, torch.full((3, 16), state.levels.times[1])
    )
    assert torch.allclose(parm.values(state.features, [16])[:, 0], values[torch.arange(3), choice], atol=1e-5)


def test_verified_denoising_by_parm_takes_k_passes_a_step(flow: FlowDecoder) -> None:
    judges = {"parm": make_parm(flow), "likelihood": Likelihood()}
    made = Verified(SDE, k=3).decode(flow, judges, REQUEST)
    assert made.cost.decoder_passes == 3 * 2 * (1 + 3 * 3) and made.cost.verifier_calls == 3 * 3 * 4
    assert made.features is not None and len(made.trace) == 4
    chosen = made.judged_by(judges["parm"], flow, REQUEST.rows)
    assert torch.allclose(chosen, made.trace[-1].scores[:, 0], atol=1e-4)  # type: ignore[union-attr]


def test_verifiers_learn_from_images_with_noise(flow: FlowDecoder) -> None:
    tokens = torch.rand(3, 16, 48)
    batch = {"prompt": [prompt for prompt in PROMPTS for _ in range(2)], "tokens": tokens}
    torch.manual_seed(0)
    drawn = flow.training_features(batch)
    assert drawn.hidden.shape == (6, 16, 64) and drawn.prompt.shape[0] == 6
    assert torch.equal(drawn.entropy[::2], drawn.entropy[1::2]) and len(drawn.entropy[:, 0].unique()) == 3
    for fraction, time in ((0.5, 5 / 6), (1.0, 0.05)):
        assert torch.allclose(flow.training_features(batch, fraction=fraction).entropy, torch.tensor(time))
    assert (
        flow.training_features(batch, last_step=1.0).entropy == flow.features(batch["prompt"], tokens).entropy
    ).all()
    same = flow.features(PROMPTS, tokens, torch.full((3,), 1e-4))
    assert torch.allclose(same.embeddings, flow.features(PROMPTS, tokens, torch.full((3,), 1e-4)).embeddings, atol=1e-2)


def test_it_begins_with_the_weights_of_a_next_token_decoder(tmp_path: Path) -> None:
    start = make_decoder(depth=2)
    export(start, tmp_path / "start", {"module": {}}, torch.float32)
    begun = pretrained(make_flow(), start=str(tmp_path / "start"))
    assert torch.equal(begun.transformer.blocks[1].mlp[0].weight, start.transformer.blocks[1].mlp[0].weight)  # type: ignore[index,union-attr]
    assert torch.equal(begun.prompt_encoder.words.weight, start.prompt_encoder.words.weight)
    with pytest.raises(ValueError, match=r"decoder\.start='.*' has no tensor 'transformer\.blocks\.2"):
        pretrained(make_flow(depth=3), start=str(tmp_path / "start"))


def test_its_key_tells_apart_what_decides_images(flow: FlowDecoder) -> None:
    other = make_flow()
    assert other.cache_key() == flow.cache_key()
    torch.nn.init.zeros_(other.head.weight)
    assert other.cache_key() != flow.cache_key()
