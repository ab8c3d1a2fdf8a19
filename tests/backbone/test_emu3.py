"""Emu3 against transformers' own on random weights: grouped heads, forced ends of rows, codes among the words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.emu3 import Emu3
from lightning_modules.backbone.loading import export, fingerprint, pretrained
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.sample import Sample
from tests.helpers.asked import asked
from tests.helpers.emu3 import CODES, GRID, NEGATIVE, SPECIAL, load_emu3, save_emu3, tiny_tokenizer
from tests.helpers.models import FEATURES

PROMPTS = ["a dog", "two red cats on a mat", "a dog", ""]
FIRST, ROW_END, T = len(SPECIAL), SPECIAL.index("<|extra_200|>"), GRID**2
GUIDED = Sampling(temperature=0.9, guidance=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emu3")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return save_emu3(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "features"])
def emu3(request: pytest.FixtureRequest, folder: Path, theirs: Any) -> Emu3:
    """Ours with the same weights, with hidden states as features or without any."""
    return load_emu3(folder, folder, feature_layers=[1, 2] if request.param else [])


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, CODES, (len(PROMPTS), T), generator=torch.Generator().manual_seed(5))


def opened(emu3: Emu3, prompt: str) -> list[int]:
    """Ids of a prompt as transformers' processor has them, up to the first code."""
    text = f"{SPECIAL[0]}{prompt}{SPECIAL[1]}{GRID}*{GRID}{SPECIAL[2]}"
    return emu3.text_tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


def their_logits(theirs: Any, ids: list[int], tokens: Tensor) -> Tensor:
    """Logits of all codes, [T, V], at each token of an image [T] whose rows have ends, from one pass over all."""
    rows = torch.cat([tokens.view(GRID, GRID) + FIRST, torch.full((GRID, 1), ROW_END)], 1)
    with torch.no_grad():
        logits = theirs(torch.cat([torch.tensor(ids), rows.flatten()])[None]).logits[0, len(ids) - 1 : -1]
    return logits.view(GRID, GRID + 1, -1)[:, :-1, FIRST : FIRST + CODES].flatten(0, 1)


def test_logits_given_all_tokens_before(emu3: Emu3, theirs: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        found = [emu3.token_logits(PROMPTS, tokens, kind) for kind in (True, False)]
    for row, prompt in enumerate(PROMPTS):
        for each, read in zip(found, (prompt, NEGATIVE), strict=True):
            expected = their_logits(theirs, opened(emu3, read), tokens[row])
            torch.testing.assert_close(each[row], expected, atol=1e-4, rtol=0)
    assert found[0].std(-1).min() > 0.5


def test_greedy_images_are_those_of_transformers(emu3: Emu3, theirs: Any) -> None:
    """By its own loop, with guidance by the negative prompt and what may follow each token."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        place = len(ids) - ids.tolist().index(SPECIAL.index("<|image token|>"))
        return [ROW_END] if place % (GRID + 1) == 0 else list(range(FIRST, FIRST + CODES))

    images = []
    for prompt in PROMPTS:
        ids = torch.tensor([opened(emu3, prompt)])
        made = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            guidance_scale=3.0,
            negative_prompt_ids=torch.tensor([opened(emu3, NEGATIVE)]),
            prefix_allowed_tokens_fn=allowed,
            max_new_tokens=GRID * (GRID + 1),
            do_sample=False,
        )
        images.append(made[0, ids.shape[1] :].view(GRID, GRID + 1)[:, :-1].flatten() - FIRST)
    decoded = Sample(Sampling(temperature=1e-4, guidance=2.0)).decode(emu3, {}, asked(PROMPTS))
    assert torch.equal(decoded.tokens, torch.stack(images))
    assert len(decoded.tokens.unique()) > 6


@pytest.mark.parametrize("sampling", [GUIDED, Sampling(), Sampling(0.8, 12, 0.9, guidance=1.0)])
def test_what_is_recorded_is_the_policys_log_probability(emu3: Emu3, sampling: Sampling) -> None:
    """That comes from full passes, so caches hold what these read, ends of rows as well."""
    decoded = Sample(sampling).decode(emu3, {}, asked(PROMPTS))
    found = emu3.policy_log_probs(PROMPTS, decoded.tokens, sampling)
    torch.testing.assert_close(found, decoded.log_probs, atol=1e-4, rtol=0)
    assert len(decoded.tokens.unique()) > 8


def test_a_batch_of_unequal_prompts_is_made_of_single_images(emu3: Emu3) -> None:
    together = Sample(GUIDED).decode(emu3, {}, asked(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        alone = Sample(GUIDED).decode(emu3, {}, asked([prompt], [row]))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[row], atol=1e-4, rtol=0)


def test_kept_tokens_are_read_with_the_ends_of_their_rows(emu3: Emu3, tokens: Tensor) -> None:
    """Rows stand at different places: whole rows are kept, single tokens, all but the last one, and none."""
    fixed = torch.zeros(4, T, dtype=torch.bool)
    fixed[0, :GRID], fixed[1, 1:-1:2], fixed[2, :-1] = True, True, True
    decoded = Sample(GUIDED).decode(emu3, {}, asked(PROMPTS, None, tokens, fixed))
    assert torch.equal(decoded.tokens[fixed], tokens[fixed])
    found = emu3.policy_log_probs(PROMPTS, decoded.tokens, GUIDED)
    for row in range(4):
        drawn = found[row, ~fixed[row]]
        torch.testing.assert_close(decoded.log_probs[row, : len(drawn)], drawn, atol=1e-4, rtol=0)


def test_paths_of_an_image_are_made_of_single_ones(emu3: Emu3) -> None:
    paths = Paths(emu3, asked(PROMPTS[:2]), GUIDED, n=2)
    while not paths.is_done:
        paths.commit(paths.propose())
    for row, seed in enumerate(asked(PROMPTS[:2]).repeat(2).seeds):
        alone = Sample(GUIDED).decode(emu3, {}, Request([{"prompt": PROMPTS[row // 2]}], [seed]))
        assert torch.equal(alone.tokens[0], paths.finish().tokens[row])


def test_features_recorded_while_decoding_are_those_of_full_passes(folder: Path, theirs: Any, tokens: Tensor) -> None:
    emu3, fixed = load_emu3(folder, folder, feature_layers=[1, 2]), torch.zeros(4, T, dtype=torch.bool)
    fixed[1, 1 : GRID + 2], fixed[2, : GRID + 1] = True, True
    decoded = Sample(GUIDED).decode(emu3, {}, asked(PROMPTS, None, tokens, fixed))
    found = emu3.features(PROMPTS, decoded.tokens)
    assert decoded.features is not None and found.hidden.shape == (4, T, 2 * 48)
    for name in FEATURES:
        torch.testing.assert_close(getattr(decoded.features, name), getattr(found, name), atol=1e-3, rtol=1e-3)
    assert [int(row.any(-1).sum()) for row in found.prompt] == [len(prompt) for prompt in PROMPTS]


def test_pixels_and_codes_are_those_of_transformers(emu3: Emu3, theirs: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        expected = theirs.model.vqmodel.decode(tokens.view(-1, GRID, GRID))
        pixels = emu3.image_tokenizer.decode(tokens)
        torch.testing.assert_close(pixels, ((expected + 1) / 2).clamp(0, 1))
        found = theirs.model.vqmodel.encode(2 * pixels - 1, [pixels.shape[2:]] * 4).image_tokens
    assert pixels.shape == (4, 3, 2 * GRID, 2 * GRID) and pixels.std() > 0.05
    assert torch.equal(emu3.image_tokenizer.encode(pixels), torch.stack(found).flatten(1))


def test_an_export_loads_again(folder: Path, theirs: Any, tmp_path: Path) -> None:
    golden, again = load_emu3(tmp_path, folder), load_emu3(tmp_path)
    export(golden, tmp_path / "exported", {"module": "emu3"}, torch.float32)
    pretrained(again.image_tokenizer, str(folder))
    assert fingerprint(pretrained(again, str(tmp_path / "exported"))) == fingerprint(golden)


@pytest.mark.parametrize("surplus", [False, True])
def test_missing_and_surplus_tensors_are_named(folder: Path, theirs: Any, tmp_path: Path, surplus: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    if surplus:
        tensors["text_model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    else:
        del tensors["text_model.model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    name = r"0\.self_attn\.q_proj\.bias' unknown" if surplus else r"1\.self_attn\.k_proj\.weight', which Emu3 needs"
    with pytest.raises(ValueError, match=rf"tensor 'text_model\.model\.layers\.{name}"):
        pretrained(load_emu3(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("num_key_value_heads", 3, r"num_key_value_heads 3, but decoder\.module\.transformer\.kv_heads is 2"),
        ("rms_norm_eps", 1e-3, r"rms_norm_eps 0\.001, but decoder\.module\.transformer\.norm_eps is 1e-05"),
        ("rope_theta", 1e4, r"rope_theta 10000\.0, but decoder\.module\.rotary_base is 1000000\.0"),
    ],
)
def test_a_config_of_other_sizes_is_refused(
    folder: Path, theirs: Any, tmp_path: Path, name: str, value: float, sentence: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    emu3 = load_emu3(tmp_path)
    emu3.check_stored(config)
    (config["text_config"]["rope_parameters"] if name == "rope_theta" else config["text_config"])[name] = value
    with pytest.raises(ValueError, match=sentence):
        emu3.check_stored(config)


def test_prompts_and_text_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    emu3 = load_emu3(tmp_path)
    with pytest.raises(ValueError, match=r"'aaa.* has 31 tokens, more than the 30 of decoder\.module\.text_tokenizer"):
        emu3.check_prompts(["a" * 31])
    (tmp_path / "other").mkdir()
    other = tiny_tokenizer(tmp_path / "other", SPECIAL[:1])
    with pytest.raises(ValueError, match=r"has no token '<\|image start\|>'"):
        Emu3(emu3.image_tokenizer, other, 300, emu3.transformer.config)
    (tmp_path / "few").mkdir()
    few = tiny_tokenizer(tmp_path / "few", codes=CODES - 1)
    with pytest.raises(ValueError, match=rf"has no token '<\|visual token 0000{CODES - 1}\|>'"):
        Emu3(emu3.image_tokenizer, few, 300, emu3.transformer.config)
    with pytest.raises(ValueError, match=r"text_tokenizer has \d+ ids, but decoder\.module\.text_vocabulary is 100"):
        Emu3(emu3.image_tokenizer, emu3.text_tokenizer, 100, emu3.transformer.config)
    with pytest.raises(ValueError, match=r"heads=6 is not a multiple of kv_heads=4"):
        type(emu3.transformer.config)(48, 2, 6, kv_heads=4)
