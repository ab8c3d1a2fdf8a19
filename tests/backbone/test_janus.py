"""Janus against tensors of the original classes and against transformers; nothing depends on the sizes of a model."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_modules.backbone.decoder import Proposal
from lightning_modules.backbone.janus import Janus
from lightning_modules.backbone.janus_text import JanusTokenizer
from lightning_modules.backbone.loading import export, fingerprint, pretrained
from lightning_modules.backbone.sampling import Noise, Sampling, guide, sampling_log_probs
from lightning_modules.backbone.vq16 import VQ16, VQ16Config
from tests.helpers.asked import asked
from tests.helpers.janus import GENERATION, JANUS, JANUS_CONFIG, WEIGHTS, as_deepseek, deepseek_tensors, make_janus
from tests.helpers.overrides import ROOT

META = json.loads((JANUS / "meta.json").read_text())
PROMPTS = [" ".join(map(str, ids[1:-1])) for ids in META["prompts"]]
GUIDANCE = META["guidance_scale"] - 1
TRACES = ("greedy", "sample_race", "sample_cdf", "tf")
Choose = Callable[[int, Tensor], Tensor]  # of a step and the probabilities at it, [B, V] -> tokens, [B]


def load_janus(**options: Any) -> Janus:
    decoder = make_janus(**options)
    pretrained(decoder.image_tokenizer, WEIGHTS)
    return pretrained(decoder, WEIGHTS)


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "features"])
def decoder(request: pytest.FixtureRequest) -> Janus:
    """The golden one, with hidden states as features or without any."""
    return load_janus(feature_layers=[JANUS_CONFIG["text_config"]["num_hidden_layers"]] if request.param else [])


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(JANUS / "data.safetensors")


def temperature_of(name: str) -> float:
    return META.get(name, {}).get("temperature", 1.0)


def guided_logits(decoder: Janus, logits: Tensor) -> Tensor:
    """The logits that a state draws from: those of its rows are guided already if there are no features."""
    return guide(*logits.chunk(2), GUIDANCE) if decoder.feature_layers else logits


def replay(decoder: Janus, sampling: Sampling, choose: Choose) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Decode the golden prompts; yields the guided logits, the probabilities and what was chosen at each step."""
    state, step = decoder.begin(asked(PROMPTS), sampling), 0
    while not state.is_done:
        logits = guided_logits(decoder, state.logits)
        probs = sampling_log_probs(logits, sampling).exp()
        chosen = choose(step, probs)
        proposal = decoder.propose(state, 1)
        own = Proposal(chosen[:, None, None], probs.log().gather(1, chosen[:, None]), proposal.features)
        decoder.commit(state, own, torch.zeros(len(PROMPTS), dtype=torch.int64))
        yield logits, probs, chosen
        step += 1


def test_prompts_are_those_of_the_golden_data(decoder: Janus, golden: dict[str, Tensor]) -> None:
    kinds = [True] * 3 + [False] * 3
    prefix = decoder.prefix(PROMPTS * 2, kinds)
    both = torch.cat([golden["prompt_ids"], golden["uncond_ids"]])
    real = torch.cat([golden["prompt_mask"]] * 2).bool()
    assert torch.equal(prefix.padding, (~real).sum(1))
    assert torch.equal(prefix.embeddings[real], decoder.words(both)[real])


def test_logits_given_all_tokens_before(decoder: Janus, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        both = [decoder.token_logits(PROMPTS, golden["tf_tokens"], kind) for kind in (True, False)]
    torch.testing.assert_close(both[0], golden["tf_cond_logits"], atol=5e-5, rtol=0)
    torch.testing.assert_close(both[1], golden["tf_uncond_logits"], atol=5e-5, rtol=0)
    guided = guide(*both, GUIDANCE)
    torch.testing.assert_close(guided, golden["tf_guided_logits"], atol=2e-4, rtol=0)


def test_hidden_states_and_embeddings(golden: dict[str, Tensor]) -> None:
    decoder = load_janus(feature_layers=[JANUS_CONFIG["text_config"]["num_hidden_layers"]])
    features, codes = decoder.features(PROMPTS, golden["tf_tokens"]), torch.arange(decoder.codes.num_embeddings)
    pairs = {
        "tf_cond_hidden": decoder.norm(features.hidden),
        "tf_uncond_hidden": decoder.norm(features.unconditional_hidden),
        "code_input_embeds": decoder.embed(decoder.code_table(), codes, codes),
        "tf_logp_cond": features.log_probs,
        "tf_logp_uncond": features.unconditional_log_probs,
    }
    for name, found in pairs.items():
        torch.testing.assert_close(found, golden[name], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", TRACES)
def test_log_probabilities(decoder: Janus, golden: dict[str, Tensor], name: str) -> None:
    tokens, sampling = golden[f"{name}_tokens"], Sampling(temperature_of(name), guidance=GUIDANCE)
    with torch.no_grad():
        unconditional = decoder.token_logits(PROMPTS, tokens, False).log_softmax(-1)
        found = {
            "cond": decoder.token_log_probs(PROMPTS, tokens),
            "uncond": unconditional.gather(-1, tokens[..., None]).squeeze(-1),
            "guided": decoder.policy_log_probs(PROMPTS, tokens, sampling),
        }
        total = decoder.log_probs(PROMPTS, tokens, [0] * len(PROMPTS))
    for kind, each in found.items():
        torch.testing.assert_close(each, golden[f"{name}_logp_{kind}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(each.sum(1), golden[f"{name}_logp_{kind}_sum"], atol=5e-4, rtol=0)
    torch.testing.assert_close(total, golden[f"{name}_logp_cond_sum"], atol=5e-4, rtol=0)


def test_the_greedy_trace(decoder: Janus, golden: dict[str, Tensor]) -> None:
    steps = list(replay(decoder, Sampling(guidance=GUIDANCE), lambda step, probs: probs.argmax(-1)))
    assert torch.equal(torch.stack([chosen for *_, chosen in steps], 1), golden["greedy_tokens"])
    logits = torch.stack([logits for logits, *_ in steps], 1)
    torch.testing.assert_close(logits, golden["greedy_guided_logits"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["sample_race", "sample_alt"])
def test_traces_of_raced_noise(decoder: Janus, golden: dict[str, Tensor], name: str) -> None:
    settings, noise = META[name], golden[f"{name}_exp_noise"]
    filters = {"top_k": settings.get("top_k", 0), "top_p": settings.get("top_p", 1.0)}
    sampling = Sampling(settings["temperature"], **filters, guidance=GUIDANCE)
    steps = list(replay(decoder, sampling, lambda step, probs: (probs / noise[:, step]).argmax(-1)))
    assert torch.equal(torch.stack([chosen for *_, chosen in steps], 1), golden[f"{name}_tokens"])
    probs = torch.stack([probs for _, probs, _ in steps], 1)
    torch.testing.assert_close(probs, golden[f"{name}_probs"], atol=5e-5, rtol=0)


def test_the_trace_of_inverted_uniform_noise(decoder: Janus, golden: dict[str, Tensor]) -> None:
    """Drawn by our own loop, from the stored noise; what it records is the policy's log-probability."""
    sampling, uniforms = Sampling(temperature_of("sample_cdf"), guidance=GUIDANCE), golden["sample_cdf_uniforms"]
    state = decoder.begin(asked(PROMPTS), sampling).with_noise(Noise(uniforms[:, None], uniforms))
    while not state.is_done:
        decoder.commit(state, decoder.propose(state, 1), torch.zeros(len(PROMPTS), dtype=torch.int64))
    assert torch.equal(state.tokens, golden["sample_cdf_tokens"])
    torch.testing.assert_close(state.log_probs, golden["sample_cdf_logp_guided"], atol=1e-4, rtol=0)
    steps = replay(
        decoder, sampling, lambda step, probs: (probs.double().cumsum(-1) <= uniforms[:, step, None]).sum(-1)
    )
    assert torch.equal(torch.stack([chosen for *_, chosen in steps], 1), golden["sample_cdf_tokens"])


def test_the_policys_log_probabilities_are_the_recorded_ones(decoder: Janus) -> None:
    for sampling in (Sampling(0.8, 12, 0.9, guidance=GUIDANCE), Sampling(), Sampling(1.3, guidance=0.5)):
        state = decoder.begin(asked(PROMPTS), sampling)
        while not state.is_done:
            decoder.commit(state, decoder.propose(state, 1), torch.zeros(len(PROMPTS), dtype=torch.int64))
        found = decoder.policy_log_probs(PROMPTS, state.tokens, sampling)
        torch.testing.assert_close(found, state.log_probs, atol=1e-4, rtol=0)
        assert len(state.tokens.unique()) > 8


def test_prompts_of_one_length_have_one_unconditional_prefix(decoder: Janus) -> None:
    prompts = ["1 2", "3 4", "5", "6", "7 8", "1 2"]
    kinds = [True] * 6 + [False] * 6
    prefix, rows = decoder.distinct_prefixes(prompts * 2, kinds)
    assert len(prefix.embeddings) == 5 + 2
    assert rows.tolist() == [0, 1, 2, 3, 4, 0, 5, 5, 6, 6, 5, 5]
    together = decoder.begin(asked(prompts), Sampling(guidance=GUIDANCE))
    for row, prompt in enumerate(prompts):
        alone = decoder.begin(asked([prompt]), Sampling(guidance=GUIDANCE))
        found = guided_logits(decoder, together.logits)[row]
        torch.testing.assert_close(found, guided_logits(decoder, alone.logits)[0], atol=2e-4, rtol=0)


def test_checkpointing_changes_no_gradient(golden: dict[str, Tensor]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_janus(checkpointing=checkpointing)
        model.log_probs(PROMPTS, golden["tf_tokens"], [0] * 3).sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, plain in gradients[0].items():
        torch.testing.assert_close(plain, gradients[1][name])


def another_config() -> dict[str, Any]:
    """Of another Janus, all sizes of which differ from the golden ones; ids of special tokens as well."""
    config = copy.deepcopy(JANUS_CONFIG)
    text = config["text_config"]
    text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"] = 48, 3, 3
    text |= {"num_key_value_heads": 3, "intermediate_size": 80, "vocab_size": 120, "head_dim": 16}
    text |= {"bos_token_id": 110, "pad_token_id": 117, "rms_norm_eps": 1e-5}
    config["vision_config"] |= {"image_size": 16, "patch_size": 4, "num_image_tokens": 16, "projection_dim": 48}
    vq = {"num_embeddings": 40, "embed_dim": 6, "channel_multiplier": [1, 1, 2], "latent_channels": 64}
    config["vq_config"] |= vq | {"projection_dim": 48, "image_token_embed_dim": 48, "num_patches": 4}
    return config


@pytest.mark.parametrize(("kv_heads", "theta"), [(3, 10_000.0), (1, 500.0)])
def test_greedy_images_are_those_of_transformers(tmp_path: Path, kv_heads: int, theta: float) -> None:
    from transformers import JanusConfig, JanusForConditionalGeneration

    torch.manual_seed(3)
    config = another_config()
    config["text_config"]["num_key_value_heads"] = kv_heads
    config["text_config"]["rope_parameters"]["rope_theta"] = theta
    theirs: Any = JanusForConditionalGeneration(JanusConfig(**config)).eval()
    for weight in theirs.parameters():
        if weight.ndim == 2:
            weight.data.mul_(4)  # far from uniform
    boi, pad = GENERATION["boi_token_id"], config["text_config"]["pad_token_id"]
    theirs.save_pretrained(tmp_path)
    settings = theirs.generation_config
    settings.bos_token_id, settings.pad_token_id = config["text_config"]["bos_token_id"], pad
    settings.guidance_scale, settings.generation_kwargs = 3.5, {"boi_token_id": boi}
    ours = make_janus(config)
    pretrained(ours.image_tokenizer, str(tmp_path))
    pretrained(ours, str(tmp_path))
    prompts = ["1 2 3 4 5 6 7", "8", "9 10 11"]
    rows = ours.text_tokenizer.encode(prompts)
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    expected = theirs.generate(input_ids=ids, attention_mask=mask, generation_mode="image", do_sample=False)
    sampling = Sampling(temperature=1e-4, guidance=2.5)
    state = ours.begin(asked(prompts), sampling)
    while not state.is_done:
        ours.commit(state, ours.propose(state, 1), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(state.tokens, expected)
    assert len(expected.unique()) > 4
    pixels = theirs.decode_image_tokens(expected).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours.image_tokenizer.decode(expected), ((pixels + 1) / 2).clamp(0, 1), atol=1e-5, rtol=0)


def deepseek_config() -> dict[str, Any]:
    """The golden config as DeepSeek writes it: what is Llama's default is left out."""
    text = JANUS_CONFIG["text_config"]
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    size = JANUS_CONFIG["vision_config"]["image_size"]
    language = {name: text[name] for name in names} | {"max_position_embeddings": 16384}
    return {
        "model_type": "multi_modality",
        "language_config": {"model_type": "llama", **language},
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": size}},
    }


def test_both_layouts_are_the_same_model(tmp_path: Path) -> None:
    golden = load_janus()
    as_deepseek(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(deepseek_config()))
    original = make_janus()
    pretrained(original.image_tokenizer, str(tmp_path))
    assert fingerprint(pretrained(original, str(tmp_path))) == fingerprint(golden)
    single = tmp_path / "single"
    single.mkdir()
    torch.save(deepseek_tensors(), single / "pytorch_model.bin")
    other = make_janus()
    pretrained(other.image_tokenizer, str(single))
    assert fingerprint(pretrained(other, str(single))) == fingerprint(golden)


def test_an_export_loads_again(tmp_path: Path) -> None:
    golden, other = load_janus(), make_janus()
    export(golden, tmp_path, {"module": "janus"}, torch.float32)
    pretrained(other.image_tokenizer, WEIGHTS)
    assert fingerprint(pretrained(other, str(tmp_path))) == fingerprint(golden)


@pytest.mark.parametrize("deepseek", [False, True])
@pytest.mark.parametrize("surplus", [False, True])
def test_missing_and_surplus_tensors_are_named_as_they_are_stored(
    tmp_path: Path, deepseek: bool, surplus: bool
) -> None:
    tensors = deepseek_tensors() if deepseek else load_file(WEIGHTS)
    layers = "language_model.model.layers.0." if deepseek else "model.language_model.layers.0."
    if surplus:
        tensors[f"{layers}self_attn.q_proj.bias"] = torch.zeros(3)
    else:
        del tensors[f"{layers}mlp.up_proj.weight"]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    name = r"self_attn\.q_proj\.bias' unknown" if surplus else r"mlp\.up_proj\.weight', which Janus"
    with pytest.raises(ValueError, match=f"tensor '{layers[:8]}.*{name}"):
        pretrained(make_janus(), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("hidden_size", 4096, r"hidden_size 4096, but decoder\.module\.transformer\.dim is "),
        ("num_attention_heads", 2, r"num_attention_heads 2, but decoder\.module\.transformer\.heads is "),
        ("rms_norm_eps", 1e-3, r"rms_norm_eps 0\.001, but decoder\.module\.transformer\.norm_eps is "),
        (
            "rope_parameters",
            {"rope_theta": 5e5, "rope_type": "default"},
            r"rope_theta 500000\.0, but decoder\.mod",
        ),
        ("pad_token_id", 15, r"pad_token_id 15, but .*text_tokenizer\.checkpoint is of another Janus"),
    ],
)
def test_weights_of_another_size_are_refused(name: str, value: Any, sentence: str) -> None:
    config = copy.deepcopy(JANUS_CONFIG)
    config["text_config"][name] = value
    with pytest.raises(ValueError, match=sentence):
        make_janus().check_stored(config)


def test_what_deepseeks_config_leaves_out_is_as_in_llama() -> None:
    """Pro-7B's names its layers and its vocabulary alone."""
    with pytest.raises(ValueError, match=r"says hidden_size 4096, .* those of Pro-7B in decoder=janus_pro_7b"):
        make_janus().check_stored({"language_config": {"num_hidden_layers": 30, "vocab_size": 102400}})


def test_a_text_tokenizer_with_more_ids_than_embeddings_is_refused() -> None:
    config = copy.deepcopy(JANUS_CONFIG)
    config["text_config"]["vocab_size"] = 7
    with pytest.raises(ValueError, match=r"text_tokenizer has \d+ ids, but decoder\.module\.text_vocabulary is 7"):
        make_janus(config)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("janus_pro_1b", (1233, 210, 37.8, 4.2)), ("janus_pro_7b", (6072, 419, 83.9, 16.8))],
)
def test_the_published_models_have_their_sizes(name: str, millions: tuple[float, ...]) -> None:
    sizes = OmegaConf.load(ROOT / "conf" / "decoder" / "janus_pro_1b.yaml")
    if name != "janus_pro_1b":
        own = OmegaConf.load(ROOT / "conf" / "decoder" / f"{name}.yaml")
        sizes = OmegaConf.merge(sizes, {"decoder": own.decoder})
    config = sizes.decoder.module
    text: Any = JanusTokenizer.__new__(JanusTokenizer)
    text.size = config.text_vocabulary
    with torch.device("meta"):
        transformer = instantiate(config.transformer)
        published = Janus(VQ16(VQ16Config()), text, config.text_vocabulary, transformer, config.feature_layers)
    parts = [published.transformer, published.words, published.head, published.aligner]
    for part, expected in zip(parts, millions, strict=True):
        assert sum(weight.numel() for weight in part.parameters()) / 1e6 == pytest.approx(expected, rel=5e-3)
    llama = {"num_hidden_layers": transformer.depth, "vocab_size": config.text_vocabulary}
    if name == "janus_pro_7b":
        published.check_stored({"language_config": llama})
