"""Show-o's decoder against tensors made by the original classes; nothing depends on the sizes of that model."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_modules.backbone.loading import fingerprint, pretrained
from lightning_modules.backbone.mask_sampling import MaskSampling, masked_after
from lightning_modules.backbone.mask_state import Vocabulary
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.showo import ShowO
from lightning_modules.dpo import dpo
from tests.helpers.asked import asked
from tests.helpers.models import SHOWO, SHOWO_CONFIG, make_showo
from tests.helpers.overrides import ROOT

RUNS = json.loads((SHOWO / "sample_runs.json").read_text())
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))


@pytest.fixture(scope="module")
def decoder() -> ShowO:
    return pretrained(make_showo(), str(SHOWO))


@pytest.fixture(scope="module")
def words(decoder: ShowO) -> Vocabulary:
    special = SHOWO_CONFIG["special_ids"]
    words = decoder.vocabulary
    assert (words.total, words.mask) == (SHOWO_CONFIG["showo"]["vocab_size"], SHOWO_CONFIG["showo"]["mask_token_id"])
    assert words.first_code == SHOWO_CONFIG["image_token_offset"]
    assert [words.soi, words.eoi, words.t2i] == [special[f"<|{name}|>"] for name in ("soi", "eoi", "t2i")]
    return words


def split(ids: Tensor, words: Vocabulary) -> tuple[list[list[int]], Tensor, Tensor]:
    """Whole sequences -> prompt blocks without padding, codes, and which of these are masked."""
    blocks = [[i for i in row if i != words.text] for row in ids[:, : words.max_text + 1].tolist()]
    image = ids[:, words.max_text + 2 : -1]
    unknown = image == words.mask
    return blocks, (image - words.first_code).masked_fill(unknown, 0), unknown


def test_prompts(words: Vocabulary) -> None:
    for case in json.loads((SHOWO / "prompts.json").read_text())["cases"]:
        text = case["text_ids"]
        cut = len(text) + (text[:1] != [words.end_of_text]) >= words.max_text
        with pytest.warns(UserWarning, match="lose their end") if cut else nullcontext():
            block = words.block(text)
        padding = [words.text] * (words.max_text + 1 - len(block))
        assert padding + block == case["prefix_ids"]


def test_a_padded_batch(decoder: MaskTokenDecoder, words: Vocabulary) -> None:
    golden = load_file(SHOWO / "forward.safetensors")
    blocks, tokens, unknown = split(golden["input_ids"], words)
    decoder = copy.deepcopy(decoder)
    decoder.feature_layers = (1,)
    with torch.no_grad():
        prefix, prompt_hidden = decoder.prompt_pass(blocks)
        grid_hidden = decoder.grid_pass(tokens, unknown, [prefix])
        layers = [torch.cat(pair, 1) for pair in zip(prompt_hidden, grid_hidden, strict=True)]
        final = decoder.norm(layers[-1])
        logits = decoder.head(final)
        codes = decoder.code_logits(tokens, unknown, [prefix])
    longest = final.shape[1]
    real = torch.nn.functional.pad(prefix.real, (0, unknown.shape[1] + 2), value=True)
    expected = golden["hidden_states"][:, :, -longest:]
    for got, wanted in zip([*layers[: len(expected) - 2], final], expected[1:], strict=True):
        torch.testing.assert_close(got[real], wanted[real], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[real], golden["logits"][:, -longest:][real], atol=2e-5, rtol=0)
    wanted = golden["logits"][:, words.max_text + 2 : -1, words.first_code : words.mask]
    torch.testing.assert_close(codes, wanted, atol=2e-5, rtol=0)


@dataclass(frozen=True)
class Recorded:
    """The noise of the original's generator."""

    exponential: Tensor
    uniform: Tensor

    def codes(self, step: int, positions: Tensor, probs: Tensor, k: int) -> Tensor:
        assert k == 1
        return (probs / self.exponential[step].flatten(0, 1)[positions]).argmax(-1)[:, None]

    def confidence(self, step: int, k: int) -> Tensor:
        return self.uniform[step][:, None]

    def to(self, device: torch.device) -> "Recorded":
        return Recorded(self.exponential.to(device), self.uniform.to(device))


@pytest.mark.filterwarnings("ignore:prompts of more than")
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("run", [run["run"] for run in RUNS])
def test_a_whole_run_of_the_sampler(decoder: MaskTokenDecoder, words: Vocabulary, run: int, device: str) -> None:
    prefix = f"run{run}."
    decoder = copy.deepcopy(decoder).to(device)
    stored = load_file(SHOWO / "sample.safetensors", device)
    golden = SimpleNamespace(**{k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    settings = RUNS[run]
    sampling = MaskSampling(settings["timesteps"], settings["guidance_scale"], settings["temperature0"])
    noise = Recorded(golden.multinomial_exp_noise, golden.gumbel_u)
    _, tokens, unknown = split(golden.input_ids, words)
    state = decoder.begin(
        asked([" ".join(map(str, ids)) for ids in settings["text_ids"]], None, tokens, ~unknown), sampling
    ).with_noise(noise)
    step = 0
    while not state.is_done:
        _, tokens, unknown = split(golden.step_input_ids[step], words)
        assert torch.equal(state.unknown, unknown)
        assert torch.equal(state.tokens.masked_fill(unknown, 0), tokens)
        with torch.no_grad():
            everywhere = torch.arange(tokens.numel(), device=device)
            logits = decoder.guided_logits(decoder.forward_pass(state)[1], sampling.guidance, everywhere)
            logits = logits.view_as(golden.logits_slice[step])
        torch.testing.assert_close(logits, golden.logits_slice[step], atol=1e-4, rtol=0)
        assert sampling.temperature_at(step) == pytest.approx(float(golden.temperature[step]), rel=1e-12, abs=1e-15)
        count = masked_after(step, sampling.steps, state.unknown)
        assert torch.equal(count, golden.mask_len[step].long().view(-1))
        proposal = decoder.propose(state, 1)
        assert torch.equal(proposal.tokens[:, 0], golden.sampled_ids[step])
        assert torch.equal(proposal.masked[:, 0], golden.masking[step].bool())
        drawn = golden.selected_probs[step]
        torch.testing.assert_close(proposal.probs[:, 0][unknown], drawn[unknown], atol=2e-5, rtol=0)
        decoder.commit(state, proposal, torch.zeros(len(tokens), dtype=torch.int64, device=device))
        step += 1
    assert step == len(golden.step_input_ids)
    assert torch.equal(state.tokens, golden.final_ids)


def test_preference_losses_and_their_gradients(decoder: MaskTokenDecoder, words: Vocabulary) -> None:
    golden = load_file(SHOWO / "dpo.safetensors")
    ids = torch.cat([golden["chosen_input_ids"], golden["rejected_input_ids"]])
    masked = torch.cat([golden["chosen_mask"], golden["rejected_mask"]]).bool()
    tokens = torch.cat([golden["chosen_tokens"], golden["rejected_tokens"]])
    blocks, _, unknown = split(ids, words)
    assert torch.equal(unknown, masked)
    policy, reference = copy.deepcopy(decoder), copy.deepcopy(decoder)
    own = reference.state_dict()
    for key, value in own.items():
        parts = value.chunk(len(ShowO.stored_as(key)))
        for part, name in zip(parts, ShowO.stored_as(key), strict=True):
            part.copy_(golden.get(f"ref.{name}", part))
    reference.load_state_dict(own)

    def log_probs(model: MaskTokenDecoder) -> Tensor:
        return model.token_log_probs(model.prompt_pass(blocks)[0], tokens, masked, as_trained=True)

    each = log_probs(policy)
    chosen, rejected = each.sum(1).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = log_probs(reference).sum(1).chunk(2)
    torch.testing.assert_close(each.sum(1), golden["policy_logps"], atol=2e-4, rtol=0)
    torch.testing.assert_close(torch.cat([ref_chosen, ref_rejected]), golden["reference_logps"], atol=2e-4, rtol=0)
    losses = dpo(chosen, rejected, ref_chosen, ref_rejected, float(golden["beta"]))
    torch.testing.assert_close(losses, golden["dpo_loss_per_pair"], atol=1e-5, rtol=0)
    counted = golden["counted_positions"]
    torch.testing.assert_close(masked.sum(1) + 2, counted)
    sft = -chosen.sum() / counted[:3].sum()
    assert sft.item() == pytest.approx(float(golden["sft_loss"]), abs=1e-5)
    assert (-each.sum() / counted.sum()).item() == pytest.approx(float(golden["loss_t2i_all"]), abs=1e-5)
    loss = losses.mean() + 0.5 * sft
    assert loss.item() == pytest.approx(float(golden["total_loss_dpo1_sft05"]), abs=1e-5)
    loss.backward()
    for key, weight in policy.named_parameters():
        assert weight.grad is not None
        parts = weight.grad.chunk(len(ShowO.stored_as(key)))
        for part, name in zip(parts, ShowO.stored_as(key), strict=True):
            if f"grad.{name}" in golden:
                torch.testing.assert_close(part, golden[f"grad.{name}"], atol=1e-5, rtol=1e-3)
    norm = torch.nn.utils.get_total_norm([w.grad for w in policy.parameters() if w.grad is not None])
    assert norm.item() == pytest.approx(float(golden["total_grad_norm"]), rel=1e-4)


def test_log_probs_among_codes_are_those_that_are_sampled_from(decoder: MaskTokenDecoder) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, decoder.vocabulary.codes, (2, decoder.num_tokens))
    masked = torch.rand(2, decoder.num_tokens) < 0.5
    prefix = decoder.encode_prompts(["1 2", ""])
    got = decoder.token_log_probs(prefix, tokens, masked)
    logits = decoder.code_logits(tokens, masked, [prefix])
    expected = torch.distributions.Categorical(logits=logits).log_prob(tokens)
    torch.testing.assert_close(got, expected * masked)


def test_an_image_does_not_depend_on_its_batch(decoder: MaskTokenDecoder) -> None:
    texts = ["1 2 3", "4", "5 6 7 8 9", ""]
    sampling = MaskSampling(steps=5)

    def decode(rows: list[int], k: int) -> Tensor:
        state = decoder.begin(asked([texts[i] for i in rows], rows), sampling, k)
        while not state.is_done:
            decoder.commit(state, decoder.propose(state, k), torch.zeros(len(rows), dtype=torch.int64))
        assert not state.unknown.any()
        return state.tokens

    together = decode([0, 1, 2, 3], 1)
    assert torch.equal(together, torch.cat([decode([i], 1) for i in range(4)]))
    assert torch.equal(together, decode([0, 1, 2, 3], 3))  # more candidates leave the first as it is
    assert len(together.unique()) > 3


def test_candidates_of_one_pass_are_those_of_separate_states(decoder: MaskTokenDecoder) -> None:
    sampling = MaskSampling(steps=5)
    state = decoder.begin(asked(["1 2 3", "4"], [7, 8]), sampling, 4)
    decoder.commit(state, decoder.propose(state, 4), torch.tensor([3, 1]))
    together = decoder.propose(state, 4)
    twice = state.select(torch.tensor([0, 0, 1, 1]))
    apart = decoder.propose(twice, 4)
    assert torch.equal(together.tokens.repeat_interleave(2, 0), apart.tokens)
    assert torch.equal(together.masked.repeat_interleave(2, 0), apart.masked)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_compiled_passes_give_the_same_images(
    decoder: MaskTokenDecoder, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # the same graph, which must be one and whole, without a compiler
        whole = torch.compile(MaskTokenDecoder.grid_pass, fullgraph=True, backend="aot_eager")
        monkeypatch.setattr(MaskTokenDecoder, "compiled_pass", whole)
    model, sampling = copy.deepcopy(decoder).to(device), MaskSampling(steps=5)

    def decode(texts: list[str]) -> Tensor:
        state = model.begin(asked(texts), sampling)
        while not state.is_done:
            model.commit(state, model.propose(state, 1), torch.zeros(len(texts), dtype=torch.int64, device=device))
        return state.tokens

    for texts in (["1 2 3"], ["4 5", "6", ""], ["7 8 9 10", "11 12 13 14"]):
        model.compiled = False
        plain = decode(texts)
        model.compiled = True
        assert torch.equal(decode(texts), plain)


def test_kept_tokens_stay(decoder: MaskTokenDecoder) -> None:
    torch.manual_seed(0)
    sampling = MaskSampling(steps=6)
    tokens = torch.randint(0, decoder.vocabulary.codes, (2, decoder.num_tokens))
    keep = torch.rand(2, decoder.num_tokens) < 0.6
    state = decoder.begin(asked(["1 2 3", "4"], [1, 2], tokens, keep), sampling)
    while not state.is_done:
        decoder.commit(state, decoder.propose(state, 1), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(state.tokens[keep], tokens[keep])
    assert not torch.equal(state.tokens, tokens)


def test_more_candidates_than_codes(decoder: MaskTokenDecoder) -> None:
    k, sampling = decoder.vocabulary.codes + 3, MaskSampling(steps=2, guidance=0)
    state = decoder.begin(asked(["1 2", "3"], [1, 2]), sampling, k)
    proposal = decoder.propose(state, k)
    assert proposal.tokens.shape == proposal.masked.shape == (2, k, decoder.num_tokens)
    assert (proposal.tokens < decoder.vocabulary.codes).all()


def test_long_prompts_lose_their_end_with_one_warning(decoder: MaskTokenDecoder) -> None:
    text = " ".join(["7"] * decoder.vocabulary.max_text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for prompts in ([text, text], [text + " 8"]):
            prefix = decoder.encode_prompts(prompts)
            assert prefix.keys[0].shape[2] == decoder.vocabulary.max_text + 1
    assert [str(warning.message)[:20] for warning in caught] == ["prompts of more than"]


def test_checkpointing_changes_memory_and_not_gradients(decoder: MaskTokenDecoder) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, decoder.vocabulary.codes, (2, decoder.num_tokens))
    masked = torch.rand(2, decoder.num_tokens) < 0.5
    kept, gradients = [], []
    for checkpointing in (False, True):
        model = make_showo(checkpointing=checkpointing)
        model.load_state_dict(decoder.state_dict())
        sizes: dict[int, int] = {}

        def keep(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = -model.token_log_probs(model.encode_prompts(["1 2 3", "4"]), tokens, masked).sum()
        loss.backward()
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in weights))
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "sampling.steps must be at least 1, not 0"),
        ({"guidance": -1.0}, "sampling.guidance must be at least 0, not -1.0"),
        ({"temperature": -0.5}, "sampling.temperature must be at least 0, not -0.5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MaskSampling(**settings)


def test_shards_and_pickles_load_as_one_file_does(decoder: ShowO, tmp_path: Path) -> None:
    tensors = load_file(SHOWO / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-{i}-of-2.safetensors": names[i::2] for i in range(2)}
    (tmp_path / "shards").mkdir()
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / "shards" / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "pickle").mkdir()
    torch.save(tensors, tmp_path / "pickle" / "pytorch_model.bin")
    for folder in ("shards", "pickle"):
        assert fingerprint(pretrained(make_showo(), str(tmp_path / folder))) == fingerprint(decoder)


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    class Trojan:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("executed",)

    torch.save({"showo.lm_head.bias": Trojan()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors and is not loaded"):
        pretrained(make_showo(), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.pop("showo.model.layers.0.self_attn.k_proj.bias"),
            "no tensor 'showo.model.layers.0.self_attn.k_p",
        ),
        (lambda t: t.update({"showo.mm_projector.0.bias": torch.zeros(3)}), "'showo.mm_projector.0.bias' unknown to"),
        (lambda t: t.update({"showo.lm_head.bias": torch.zeros(3)}), r"'showo.lm_head.bias' has shape \[3\] instead"),
    ],
    ids=["missing", "surplus", "misshapen"],
)
def test_other_tensors_are_named_as_they_are_stored(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    tensors = load_file(SHOWO / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=sentence):
        pretrained(make_showo(), str(tmp_path))


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("num_vq_tokens", "says num_vq_tokens 1024, but .* the 512-pixel one 1024"),
        ("codebook_size", "says codebook_size 1024, but .* which is showlab/magvitv2"),
        ("llm_vocab_size", "says llm_vocab_size 1024, but .* which is microsoft/phi-1_5"),
    ],
)
def test_weights_for_other_images_are_refused(tmp_path: Path, key: str, sentence: str) -> None:
    shutil.copy(SHOWO / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SHOWO_CONFIG["showo"] | {key: 1024}))
    with pytest.raises(ValueError, match=sentence):
        pretrained(make_showo(), str(tmp_path))


def test_the_published_model_has_its_sizes() -> None:
    """437 tensors and 1,448,176,770 parameters; queries, keys and values are one tensor here and three there."""
    tokenizer: Any = torch.nn.Module()
    tokenizer.codebook_size, tokenizer.num_tokens = 8192, 256
    text: Any = SimpleNamespace(size=50295, end_of_text=50256)
    config = OmegaConf.load(ROOT / "conf" / "decoder" / "showo.yaml").decoder.module
    with torch.device("meta"):
        transformer = instantiate(config.transformer)
        published = ShowO(tokenizer, text, config.max_text, transformer, config.rotary_dims)
    assert sum(weight.numel() for weight in published.parameters()) == 1_448_176_770
    names = [name for key in published.state_dict() for name in ShowO.stored_as(key)]
    assert len(names) == len(set(names)) == 437
    assert (published.vocabulary.total, published.vocabulary.mask) == (58498, 58497)
    assert published.rotary_dims == 32
