"""The MAGVIT-v2 tokenizer against tensors of the original classes (tests/golden/showo)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from datamodules.shapes.prompts import vocabulary
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.loading import pretrained
from lightning_modules.backbone.magvit import LookupFreeQuantizer, MagvitConfig, MagvitV2
from lightning_modules.backbone.transformer import TransformerConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "showo"
WEIGHTS = GOLDEN / "vq.safetensors"


def golden_config() -> MagvitConfig:
    vq = json.loads((GOLDEN / "config.json").read_text())["vq"]
    encoder, decoder = vq["encoder"], vq["decoder"]
    return MagvitConfig(
        image_size=encoder["resolution"],
        bits=vq["codebook_bits"],
        encoder_widths=[encoder["ch"] * factor for factor in encoder["ch_mult"]],
        encoder_blocks=encoder["num_res_blocks"],
        decoder_widths=[decoder["ch"] * factor for factor in decoder["ch_mult"]],
        decoder_blocks=decoder["num_res_blocks"],
        norm_groups=vq["group_norm_groups"],
        norm_eps=vq["group_norm_eps"],
    )


@pytest.fixture(scope="module")
def tokenizer() -> MagvitV2:
    tokenizer = MagvitV2(golden_config())
    tokenizer.load_state_dict(load_file(WEIGHTS), strict=True)
    return tokenizer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "vq_io.safetensors")
    tensors["pixels"] = (tensors["pixels"] + 1) / 2  # ours are in [0, 1]
    return tensors


def test_tensors_have_the_original_names_and_the_buffers_their_values(tokenizer: MagvitV2) -> None:
    stored, built = load_file(WEIGHTS), MagvitV2(golden_config()).state_dict()
    assert {key: value.shape for key, value in built.items()} == {key: value.shape for key, value in stored.items()}
    for key in ("quantize.embedding", "quantize.power_vals"):
        assert torch.equal(built[key], stored[key])
        assert built[key].dtype == stored[key].dtype


def test_encodes_as_the_original(tokenizer: MagvitV2, golden: dict[str, Tensor]) -> None:
    torch.testing.assert_close(tokenizer.latents(golden["pixels"]), golden["z"], atol=1e-4, rtol=0)
    tokens = tokenizer.encode(golden["pixels"])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, golden["codes"])
    assert torch.equal(tokenizer.quantize.entries(tokens.unflatten(1, (4, 4))), golden["quantized"])


def test_decodes_as_the_original(tokenizer: MagvitV2, golden: dict[str, Tensor]) -> None:
    raw = tokenizer.decoder(tokenizer.quantize.entries(golden["codes"].unflatten(1, (4, 4))))
    torch.testing.assert_close(raw, golden["reconstruction"], atol=1e-4, rtol=0)
    levels = tokenizer.decode(golden["codes"]).permute(0, 2, 3, 1) * 255
    assert levels.min() >= 0
    assert levels.max() <= 255
    away = (levels.to(torch.uint8).int() - golden["reconstruction_uint8"].int()).abs()
    at_an_integer = (levels - levels.round()).abs() <= 1e-3
    assert torch.all(away <= at_an_integer.int())


def test_grids_need_not_be_square(tokenizer: MagvitV2, golden: dict[str, Tensor]) -> None:
    raw = tokenizer.decoder(tokenizer.quantize.entries(golden["rect_codes"].unflatten(1, (4, 6))))
    torch.testing.assert_close(raw, golden["rect_reconstruction"], atol=1e-4, rtol=0)
    assert tokenizer.encode((raw + 1) / 2).shape == (1, 24)


def test_thirteen_bits_are_signs_with_the_most_significant_first(golden: dict[str, Tensor]) -> None:
    quantizer, z = LookupFreeQuantizer(13), golden["lfq13_z"]
    indices = quantizer.indices(z)
    assert torch.equal(indices, golden["lfq13_indices"][:, 0])
    assert torch.equal(quantizer.entries(indices), golden["lfq13_entries"])
    assert torch.equal(z[0, 3], torch.zeros(4, 4))
    assert torch.equal(z[0, 5].signbit(), torch.ones(4, 4, dtype=torch.bool))
    assert not (indices[0] & (1 << 9 | 1 << 7)).any()  # +0 in channel 3, -0 in channel 5
    assert ((indices[1] >> 12) == 1).all()  # 1e-30 in channel 0


def test_codes_do_not_depend_on_mixed_precision(tokenizer: MagvitV2, golden: dict[str, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        latents = tokenizer.latents(golden["pixels"])
    torch.testing.assert_close(latents, golden["z"], atol=1e-4, rtol=0)  # bfloat16 would be 0.02 away


def test_stands_in_for_another_tokenizer(tokenizer: MagvitV2, golden: dict[str, Tensor]) -> None:
    decoder = CompactDecoder(tokenizer, vocabulary(), 12, TransformerConfig(32, 1, 4), 1, [1])
    assert (decoder.num_tokens, tokenizer.grid, tokenizer.image_size, tokenizer.codebook_size) == (16, 4, 32, 32)
    assert tokenizer.code_vectors.shape == (32, 5)
    log_probs = decoder.token_log_probs(["a red circle"] * 2, tokenizer.encode(golden["pixels"]))
    assert log_probs.shape == (2, 16)


def test_the_real_size_is_that_of_the_published_weights() -> None:
    with torch.device("meta"):
        tokenizer = MagvitV2(MagvitConfig())
        state = tokenizer.state_dict()
        latents = tokenizer.encoder(torch.empty(1, 3, 256, 256))
        assert latents.shape == (1, 13, 16, 16)
        assert tokenizer.decoder(latents).shape == (1, 3, 256, 256)
    assert len(state) == 382
    millions = [
        round(sum(p.numel() for p in part.parameters()) / 1e6, 2) for part in (tokenizer.encoder, tokenizer.decoder)
    ]
    assert millions == [55.44, 39.95]
    assert (tokenizer.codebook_size, tokenizer.grid, tokenizer.num_tokens) == (8192, 16, 256)
    assert sorted(key.removesuffix(".weight") for key in state if key.endswith("nin_shortcut.weight")) == [
        "decoder.up.1.block.0.nin_shortcut",
        "decoder.up.3.block.0.nin_shortcut",
        "encoder.down.1.block.0.nin_shortcut",
        "encoder.down.3.block.0.nin_shortcut",
    ]
    assert state["quantize.embedding"].shape == (8192, 13)
    assert state["encoder.conv_out.weight"].shape == (13, 512, 3, 3)
    assert state["decoder.conv_in.weight"].shape == (512, 13, 3, 3)


def test_loads_through_the_projects_own_loader(tmp_path: Path, tokenizer: MagvitV2) -> None:
    (tmp_path / "model.safetensors").symlink_to(WEIGHTS)
    loaded = pretrained(MagvitV2(golden_config()), str(tmp_path)).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in tokenizer.state_dict().items())


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="different numbers of levels"):
        MagvitConfig(encoder_blocks=(1, 2))
    with pytest.raises(ValueError, match="image_size=100 is not a multiple of 16"):
        MagvitConfig(image_size=100)
