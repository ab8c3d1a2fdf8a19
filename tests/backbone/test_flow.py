"""The flow decoder: passes over noisy code vectors, training, what verifiers read."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.distributions import Normal

from datamodules.geneval_prompts import prompts_from_shapes
from datamodules.shapes.detector import ShapesDetector
from lightning_modules.backbone.decoder import Cost, Request
from lightning_modules.backbone.denoising_sampling import FlowSampling
from lightning_modules.backbone.flow import SCHEDULE, FlowDecoder
from lightning_modules.backbone.loading import export, pretrained
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.verifier import Likelihood
from tests.helpers.models import make_flow, make_parm

PROMPTS = ["a photo of a red star", "a photo of two blue hearts", "a photo of a green ring"]
REQUEST = Request([{"prompt": prompt} for prompt in PROMPTS], [1, 2, 3])
SDE = FlowSampling(4, guidance=1.0, solver="sde", eta=0.5, shift=3.0)


@pytest.fixture(scope="module")
def flow() -> FlowDecoder:
    return make_flow()


def bare(depth: int = 2) -> FlowDecoder:
    """One without features, as it is before training."""
    made, sizes = make_flow(depth), TransformerConfig(dim=32, depth=depth, heads=4)
    return FlowDecoder(made.image_tokenizer, made.text_tokenizer, 14, sizes, 4)


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


def test_a_guess_is_the_mean_of_code_vectors_by_bayes_rule(flow: FlowDecoder) -> None:
    """p(code | noisy image) is the network's logits, guided, plus the log-density of the noisy vector."""
    latents = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    levels, vectors = flow.levels(SDE), flow.image_tokenizer.code_vectors
    time = levels.times[2]
    for scale, temperature in ((0.0, 1.0), (2.0, 0.7)):
        sampling = FlowSampling(4, guidance=scale, shift=3.0, temperature=temperature)
        condition = flow.encode(PROMPTS, sampling)
        with torch.no_grad():
            found = flow.predict(latents, levels, 2, condition, sampling, Cost())
            density = Normal((1 - time) * vectors, time).log_prob(latents[:, :, None]).sum(-1)
            likelihoods = flow.code_log_likelihoods(latents, torch.full((3,), time))
            assert torch.allclose(density.log_softmax(-1), likelihoods.log_softmax(-1), atol=1e-4)
            logits, bare_logits = flow.denoise(
                latents, torch.full((3,), time), likelihoods, flow.encode(PROMPTS, SDE).prefixes
            ).logits
            probs = ((logits + scale * (logits - bare_logits)) / temperature + density).softmax(-1)
        assert torch.allclose(found.clean, probs @ vectors, atol=1e-4)
        again = levels.alphas[2] * found.clean + levels.sigmas[2] * found.noise
        assert torch.allclose(again, latents, atol=1e-5)


def test_without_information_the_likelihood_is_that_of_chance_and_adds_up() -> None:
    """A network that says nothing gives every image C^-T; the estimate integrates the error over all noise."""
    decoder = bare()
    with torch.no_grad():
        for weight in (decoder.head.weight, decoder.head.bias, decoder.code_proj.weight):
            weight.zero_()
    codes = torch.randint(32, (1, 16), generator=torch.Generator().manual_seed(0))
    tokens = decoder.image_tokenizer.code_vectors[codes].expand(200, -1, -1)
    with torch.no_grad():
        found = decoder.log_probs([PROMPTS[0]] * 200, tokens, range(200))
    assert found.std() > 0 and abs(found.mean() / (-16 * math.log(32)) - 1) < 0.03


def test_it_learns_to_draw_what_prompts_say() -> None:
    decoder = bare(depth=1).train()
    names, codes = ["red star", "blue ring"], torch.tensor([[3], [7]]).expand(-1, 16)  # images of one code each
    images = decoder.image_tokenizer.code_vectors[codes]
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
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
    assert torch.equal(decoder.image_tokenizer.codes(made.tokens), codes)


def test_policy_log_probs_are_differentiable_and_those_of_decoding(flow: FlowDecoder) -> None:
    made = Sample(SDE).decode(flow, {}, REQUEST)
    found = flow.policy_log_probs(PROMPTS, made.tokens, SDE, made.trajectory)
    assert made.log_probs is not None and torch.allclose(made.log_probs, found, rtol=1e-4, atol=0.02)
    found.sum().backward()  # type: ignore[no-untyped-call]
    weight = flow.get_parameter("stem.0.weight")
    assert weight.grad is not None and weight.grad.abs().sum() > 0
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
    assert state.features is not None
    assert torch.allclose(parm.values(state.features, [16])[:, 0], values[torch.arange(3), choice], atol=1e-5)


def test_verified_denoising_by_parm_takes_k_passes_a_step(flow: FlowDecoder) -> None:
    judges = {"parm": make_parm(flow), "likelihood": Likelihood()}
    made = Verified(SDE, k=3).decode(flow, judges, REQUEST)
    assert made.cost.decoder_passes == 3 * 2 * (1 + 3 * 3) and made.cost.verifier_calls == 3 * 3 * 4
    assert made.features is not None and len(made.trace) == 4
    chosen = made.judged_by(judges["parm"], flow, REQUEST.rows)
    assert torch.allclose(chosen, made.trace[-1].scores[:, 0], atol=1e-4)  # type: ignore[union-attr]


def test_verifiers_learn_from_images_with_noise(flow: FlowDecoder) -> None:
    codes = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    tokens = flow.image_tokenizer.code_vectors[codes]
    batch = {"prompt": [prompt for prompt in PROMPTS for _ in range(2)], "tokens": tokens}
    torch.manual_seed(0)
    drawn = flow.training_features(batch)
    assert drawn.hidden.shape == (6, 16, 64) and drawn.prompt.shape[0] == 6
    assert len(drawn.entropy.sum(1).unique()) > 1
    times: list[Tensor] = []
    flow_features = flow.features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            flow, "features", lambda prompt, tokens, time: times.append(time) or flow_features(prompt, tokens, time)
        )
        flow.training_features(batch, fraction=0.5)
        flow.training_features(batch, fraction=1.0)
        flow.training_features(batch, last_step=1.0)
        flow.training_features(batch)
    last = SCHEDULE.times[-2]  # of the last pass, which finished images are judged from
    assert torch.allclose(times[0], torch.tensor(8 / 9))
    assert torch.allclose(times[1], torch.tensor(last)) and torch.allclose(times[2], torch.tensor(last))
    assert len(times[3].unique()) == 3
    finished = flow.features(PROMPTS, tokens)
    assert torch.allclose(finished.embeddings, flow.code_table()[codes], atol=1e-4)  # each code is known by then
    assert (finished.log_probs > -1e-3).all() and (finished.entropy < 1e-2).all()


def test_verifiers_learn_at_the_times_of_the_steps_that_are_set(compose_config: Callable[..., DictConfig]) -> None:
    sampling = compose_config("decoder=shapes_flow").sampling
    assert (sampling.steps, sampling.shift) == (SCHEDULE.steps, SCHEDULE.shift)


def test_it_begins_as_the_mask_token_decoder_whose_weights_it_takes(tmp_path: Path) -> None:
    like, sizes = bare(), TransformerConfig(dim=32, depth=2, heads=4)
    start = MaskTokenDecoder(like.image_tokenizer.tokenizer, like.text_tokenizer, 14, sizes, 4, visual=True).eval()
    export(start, tmp_path / "start", {"module": {}}, torch.float32)
    begun = pretrained(bare(), start=str(tmp_path / "start")).eval()
    nothing, latents = torch.ones(3, 16, dtype=torch.bool), torch.randn(3, 16, 48)
    with torch.no_grad():
        time = torch.ones(3)  # all is noise: all is masked
        made = begun.denoise(latents, time, begun.code_log_likelihoods(latents, time), [begun.encode_prompts(PROMPTS)])
        masked = start.code_logits(torch.zeros(3, 16, dtype=torch.int64), nothing, [start.encode_prompts(PROMPTS)])
    assert torch.allclose(made.logits[0], masked, atol=1e-4)
    with pytest.raises(ValueError, match=r"decoder\.start='.*' has no tensor 'transformer\.blocks\.2"):
        pretrained(make_flow(depth=3), start=str(tmp_path / "start"))


def test_its_key_tells_apart_what_decides_images(flow: FlowDecoder) -> None:
    other = make_flow()
    assert other.cache_key() == flow.cache_key()
    torch.nn.init.zeros_(other.head.weight)
    assert other.cache_key() != flow.cache_key()


def test_the_bundled_decoder_draws_objects_of_the_color_asked_for(compose_config: Callable[..., DictConfig]) -> None:
    config = compose_config("decoder=shapes_flow")
    decoder, sampling = instantiate(config.decoder).eval(), instantiate(config.sampling)
    rows = [row for row in prompts_from_shapes("validation", 12) if row["tag"] == "colors"]
    made = Sample(sampling).decode(decoder, {}, Request(rows, range(12)))
    right = GenEvalReward(ShapesDetector())(rows, decoder.image_tokenizer.decode(made.tokens))
    assert right.mean() > 0.5  # .80 of 20 images; by chance a colour is right in a tenth
