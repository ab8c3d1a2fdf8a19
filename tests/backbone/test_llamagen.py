"""LlamaGen against tensors that the original classes made; nothing depends on the sizes of that model."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.backbone.decoder import Proposal, Request
from lightning_modules.backbone.llamagen import LlamaGen
from lightning_modules.backbone.loading import export, own_state, pretrained
from lightning_modules.backbone.next_token_state import NextTokenState
from lightning_modules.backbone.sampling import Noise, Sampling, guide, sampling_log_probs
from lightning_modules.backbone.t5 import T5Text
from lightning_modules.backbone.tiny_t5 import save_tiny_t5
from lightning_modules.backbone.vq16 import VQ16, VQ16Config
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.sample import Sample
from tests.helpers.llamagen import (
    LLAMAGEN,
    LLAMAGEN_CONFIG,
    WEIGHTS,
    StoredText,
    golden_llamagen,
    llama_config,
    make_llamagen,
)

GOLDEN = load_file(LLAMAGEN / "data.safetensors")
META = json.loads((LLAMAGEN / "meta.json").read_text())
SCALE = {"guidance": META["cfg_scale"] - 1}  # of the original's scale 1 is none
if META["cfg_interval"] >= 0:  # the token after that many and one is the last that is guided
    SCALE["guided_tokens"] = META["cfg_interval"] + 2
GUIDED = Sampling(**SCALE)
PROMPTS = [str(row) for row in range(len(GOLDEN["cond_mask"]))]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
SEEDS = [5, 6, 7]


@pytest.fixture(scope="module")
def decoder() -> LlamaGen:
    return golden_llamagen()


def close(found: Tensor, name: str, atol: float) -> None:
    torch.testing.assert_close(found, GOLDEN[name], atol=atol, rtol=0)


def test_captions_stand_on_the_left_of_the_image(decoder: LlamaGen) -> None:
    both = PROMPTS * 2
    prefix = decoder.prefix(both, [True] * len(PROMPTS) + [False] * len(PROMPTS))
    assert prefix.padding.tolist()[: len(PROMPTS)] == (GOLDEN["cond_mask"] == 0).sum(1).tolist()
    assert torch.equal(prefix.padding.chunk(2)[0], prefix.padding.chunk(2)[1])
    bare = GOLDEN["uncond_features"] * GOLDEN["cond_mask"][..., None]
    expected = decoder.caption(torch.cat([GOLDEN["cond_left_padded"], bare]))
    torch.testing.assert_close(prefix.embeddings, expected[:, -prefix.embeddings.shape[1] :])
    assert prefix.words[len(PROMPTS) :] == [range(0)] * len(PROMPTS)


def test_rotary_table(decoder: LlamaGen) -> None:
    rotary = decoder.rotary(torch.arange(-decoder.text_tokenizer.max_tokens, decoder.num_tokens))
    assert rotary.interleaved
    close(torch.stack([rotary.cos, rotary.sin], -1), "rope_table", 1e-6)


@torch.no_grad()
def test_teacher_forcing(decoder: LlamaGen) -> None:
    tokens = GOLDEN["tf_tokens"]
    conditional, unconditional = (decoder.token_logits(PROMPTS, tokens, kind) for kind in (True, False))
    close(conditional, "tf_cond_logits", 5e-5)
    close(unconditional, "tf_uncond_logits", 5e-5)
    close(guide(conditional, unconditional, GUIDED.guidance), "tf_guided_logits", 2e-4)
    scale = GUIDED.guidance_at(torch.arange(tokens.shape[1]))
    close(guide(conditional, unconditional, scale), "tf_guided_interval_logits", 2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tf", "greedy", "sample_race", "sample_cdf"])
def test_log_probabilities(decoder: LlamaGen, name: str) -> None:
    tokens = GOLDEN[f"{name}_tokens"]
    bare = decoder.token_logits(PROMPTS, tokens, conditional=False).log_softmax(-1)
    sampling = Sampling(temperature=META["logp_guided_temperature"], **SCALE)
    for kind, found in {
        "cond": decoder.token_log_probs(PROMPTS, tokens),
        "uncond": bare.gather(-1, tokens[..., None]).squeeze(-1),
        "guided": decoder.policy_log_probs(PROMPTS, tokens, sampling),
    }.items():
        close(found, f"{name}_logp_{kind}", 1e-4)
        close(found.sum(1), f"{name}_logp_{kind}_sum", 5e-4)
    close(decoder.log_probs(PROMPTS, tokens, SEEDS), f"{name}_logp_cond_sum", 5e-4)


def replay(
    decoder: LlamaGen, sampling: Sampling, choose: Callable[[int, Tensor], Tensor]
) -> tuple[NextTokenState, Tensor, Tensor]:
    """Decode, with a function of step and probabilities [B, V] that says which tokens [B] are drawn.

    Returns the state at the end, and logits and probabilities of all steps, [B, T, V].
    """
    state, steps = decoder.begin(Request(ROWS, SEEDS), sampling), []
    while not state.is_done:
        log_p = sampling_log_probs(state.logits, sampling)
        steps.append((state.logits, log_p.exp()))
        tokens = choose(state.step, log_p.exp())[:, None]
        proposal = Proposal(tokens[..., None], log_p.gather(1, tokens), None)
        decoder.commit(state, proposal, torch.zeros(len(PROMPTS), dtype=torch.int64))
    logits, probs = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
    return state, logits, probs


@torch.no_grad()
def test_greedy_decoding(decoder: LlamaGen) -> None:
    state, logits, _ = replay(decoder, GUIDED, lambda step, probs: probs.argmax(-1))
    assert torch.equal(state.tokens, GOLDEN["greedy_tokens"])
    close(logits, "greedy_guided_logits", 2e-4)
    state, _, _ = replay(decoder, Sampling(), lambda step, probs: probs.argmax(-1))
    assert torch.equal(state.tokens, GOLDEN["greedy_noguidance_tokens"])
    assert state.cost.decoder_passes == state.tokens.numel()  # there is no unconditional row


@torch.no_grad()
@pytest.mark.parametrize("name", ["sample_race", "sample_alt"])
def test_sampling(decoder: LlamaGen, name: str) -> None:
    """torch.multinomial's draw is the largest of probabilities divided by exponential noise."""
    settings, noise = META[name], GOLDEN[f"{name}_exp_noise"]
    filters = {key: settings[key] for key in ("temperature", "top_k", "top_p")}
    sampling = Sampling(**SCALE, **filters)
    state, _, probs = replay(decoder, sampling, lambda step, probs: (probs / noise[:, step]).argmax(-1))
    assert torch.equal(state.tokens, GOLDEN[f"{name}_tokens"])
    close(probs, f"{name}_probs", 5e-5)
    recorded = decoder.policy_log_probs(PROMPTS, state.tokens, sampling)
    torch.testing.assert_close(state.log_probs, recorded, atol=1e-4, rtol=0)


@torch.no_grad()
def test_inverse_cdf_sampling(decoder: LlamaGen) -> None:
    uniforms = GOLDEN["sample_cdf_uniforms"]
    state = decoder.begin(Request(ROWS, SEEDS), GUIDED).with_noise(Noise(uniforms[:, None], uniforms))
    while not state.is_done:
        decoder.commit(state, decoder.propose(state, 1), torch.zeros(len(PROMPTS), dtype=torch.int64))
    assert torch.equal(state.tokens, GOLDEN["sample_cdf_tokens"])
    close(state.log_probs, "sample_cdf_logp_guided", 1e-4)


@pytest.mark.parametrize("layers", [[], [1]])
def test_batches_and_paths_are_made_of_single_images(layers: list[int]) -> None:
    decoder, sampling = golden_llamagen(feature_layers=layers), Sampling(0.9, 20, 0.95, 2.0)
    request = Request(ROWS, SEEDS)
    decoded = Sample(sampling).decode(decoder, {}, request)
    recorded = decoder.policy_log_probs(PROMPTS, decoded.tokens, sampling)
    torch.testing.assert_close(decoded.log_probs, recorded, atol=1e-4, rtol=0)
    paths = Paths(decoder, request, sampling, n=2)
    while not paths.is_done:
        paths.commit(paths.propose())
    for row, seed in enumerate(request.repeat(2).seeds):
        alone = Sample(sampling).decode(decoder, {}, Request([ROWS[row // 2]], [seed])).tokens[0]
        assert torch.equal(paths.finish().tokens[row], alone)
        if row % 2 == 0:
            assert torch.equal(decoded.tokens[row // 2], alone)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[], [1]])
@pytest.mark.parametrize("fixed", [False, True])
def test_guidance_of_the_first_tokens_alone(layers: list[int], fixed: bool) -> None:
    decoder, sampling = golden_llamagen(feature_layers=layers), Sampling(guidance=2.0, guided_tokens=9)
    tokens = GOLDEN["tf_tokens"]
    kept = (torch.arange(decoder.num_tokens) % 3 == 0).expand_as(tokens) & torch.tensor(fixed)
    decoded = Sample(sampling).decode(decoder, {}, Request(ROWS, SEEDS, tokens, kept))
    conditional = decoder.token_logits(PROMPTS, decoded.tokens)
    guided = guide(conditional, decoder.token_logits(PROMPTS, decoded.tokens, False), 2.0)
    log_p = torch.cat([guided[:, :9], conditional[:, 9:]], 1).log_softmax(-1)
    expected = log_p.gather(-1, decoded.tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(decoder.policy_log_probs(PROMPTS, decoded.tokens, sampling), expected)
    order = kept.int().argsort(dim=1, stable=True)[:, : int((~kept).sum(1).max())]  # open tokens, as they were decided
    found = decoded.log_probs[:, : order.shape[1]]  # the last step may read a fixed token
    torch.testing.assert_close(found, expected.gather(1, order), atol=1e-4, rtol=0)


@torch.no_grad()
def test_guidance_of_the_first_tokens_alone_in_bfloat16() -> None:
    decoder, sampling = golden_llamagen().bfloat16(), Sampling(guidance=2.0, guided_tokens=9)
    decoded = Sample(sampling).decode(decoder, {}, Request(ROWS, SEEDS))
    assert decoder.policy_log_probs(PROMPTS, decoded.tokens, sampling).isfinite().all()


def test_features_of_words_leave_out_the_closing_token() -> None:
    decoder = golden_llamagen(feature_layers=[1])
    words = decoder.features(PROMPTS, GOLDEN["tf_tokens"]).prompt
    assert words.shape[1] == decoder.max_words
    counts = GOLDEN["cond_mask"].sum(1) - 1
    assert words.any(-1).sum(1).tolist() == counts.tolist()
    assert words[0, 0].any() and not words[:, int(counts.max()) :].any()


@pytest.fixture(scope="module")
def blank() -> Callable[[], LlamaGen]:
    """A LlamaGen without its weights; its image tokenizer is made once."""
    image_tokenizer = make_llamagen().image_tokenizer
    return lambda: make_llamagen(image_tokenizer=image_tokenizer)


def table(positions: int) -> Tensor:
    return torch.zeros(positions, LLAMAGEN_CONFIG["gpt"]["dim"] // LLAMAGEN_CONFIG["gpt"]["n_head"] // 2, 2)


@pytest.mark.parametrize("inside", ["model", "module", "state_dict"])
def test_published_files(decoder: LlamaGen, blank: Callable[[], LlamaGen], tmp_path: Path, inside: str) -> None:
    positions = decoder.text_tokenizer.max_tokens + decoder.num_tokens
    torch.save({inside: load_file(WEIGHTS) | {"freqs_cis": table(positions)}}, tmp_path / "gpt.pt")
    loaded = pretrained(blank(), str(tmp_path / "gpt.pt"))
    expected = decoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(loaded.unconditional, GOLDEN["uncond_features"])


def test_a_training_checkpoint_is_refused_with_what_to_do(blank: Callable[[], LlamaGen], tmp_path: Path) -> None:
    checkpoint = {"model": load_file(WEIGHTS), "optimizer": {}, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    torch.save(checkpoint, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match=r"holds more than tensors .* save its tensors alone with `torch.save`"):
        pretrained(blank(), str(tmp_path / "gpt.pt"))
    del checkpoint["args"]
    torch.save(checkpoint, tmp_path / "plain.pt")
    pretrained(blank(), str(tmp_path / "plain.pt"))


def test_weights_for_images_of_another_size_are_refused(blank: Callable[[], LlamaGen], tmp_path: Path) -> None:
    decoder = blank()
    tokens = 4 * decoder.num_tokens
    larger = table(decoder.text_tokenizer.max_tokens + tokens)
    torch.save({"model": load_file(WEIGHTS) | {"freqs_cis": larger}}, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match=rf"for images of {tokens} tokens, but .* have {decoder.num_tokens} tokens"):
        pretrained(decoder, str(tmp_path / "gpt.pt"))
    torch.save({"model": load_file(WEIGHTS)}, tmp_path / "t2i_XL_stage2_512.pt")
    with pytest.raises(ValueError, match=r"t2i_XL_stage2_512\.pt is for images of 512 pixels, but"):
        pretrained(decoder, str(tmp_path / "t2i_XL_stage2_512.pt"))


def test_an_export_has_the_decoders_own_weights(blank: Callable[[], LlamaGen], tmp_path: Path) -> None:
    stored = StoredText()
    text = T5Text(save_tiny_t5(str(tmp_path / "t5"), stored.width), stored.width, stored.max_tokens)
    decoder = golden_llamagen(text=text, image_tokenizer=blank().image_tokenizer)
    export(decoder, tmp_path / "exported", {}, torch.float32)
    assert load_file(tmp_path / "exported" / "model.safetensors").keys() == own_state(decoder).keys()
    assert not any("encoder" in key or "shared" in key for key in decoder.state_dict() if "image_tokenizer" not in key)
    loaded, expected = pretrained(blank(), str(tmp_path / "exported")).state_dict(), decoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("cls_embedding.uncond_embedding"),
            "has no tensor 'cls_embedding.uncond_embedding'",
        ),
        (lambda weights: weights.update(surplus=torch.zeros(2)), "has a tensor 'surplus' unknown to LlamaGen"),
        (
            lambda weights: weights.update({"output.weight": torch.zeros(2, 2)}),
            "made for another model: 'output.weight'",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    blank: Callable[[], LlamaGen], tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    weights = load_file(WEIGHTS)
    change(weights)
    torch.save(weights, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match=message):
        pretrained(blank(), str(tmp_path / "gpt.pt"))


def test_the_published_model_has_its_size() -> None:
    text = StoredText()
    text.width, text.max_tokens = 2048, 120
    with torch.device("meta"):
        tokenizer = VQ16(VQ16Config(image_size=256, round_pixels=True))
        decoder = LlamaGen(tokenizer, text, llama_config(1280, 36, 20, 3584))  # type: ignore[arg-type]
    own = [weight for name, weight in decoder.named_parameters() if not name.startswith("image_tokenizer")]
    assert sum(weight.numel() for weight in own) == 777_678_080
    assert decoder.unconditional.shape == (120, 2048) and decoder.num_tokens == 256
