"""VQ-16 against tensors of Janus's and LlamaGen's original classes; nothing depends on the sizes of those models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.backbone.loading import pretrained
from lightning_modules.backbone.vq16 import VQ16, VQ16Config
from lightning_modules.rewards.geneval_reward import to_uint8
from tests.helpers.janus import JANUS, as_deepseek, janus_image_tokenizer
from tests.helpers.llamagen import LLAMAGEN, llamagen_image_tokenizer

GOLDEN = {"janus": JANUS, "llamagen": LLAMAGEN}


@pytest.fixture(scope="module", params=["janus", "llamagen"])
def case(request: pytest.FixtureRequest) -> tuple[VQ16, dict[str, Tensor]]:
    """A tokenizer with the original's weights, and what the original made."""
    data = load_file(GOLDEN[request.param] / "data.safetensors")
    if request.param == "llamagen":
        return llamagen_image_tokenizer(), data
    return janus_image_tokenizer(), data | {"enc_tokens": data["enc_tokens_original"]}


def test_decodes_as_the_original(case: tuple[VQ16, dict[str, Tensor]]) -> None:
    tokenizer, golden = case
    network: Any = tokenizer.network
    latents = network.quantize.get_codebook_entry(golden["greedy_tokens"])
    torch.testing.assert_close(latents, golden["greedy_latent"], atol=5e-5, rtol=0)
    torch.testing.assert_close(network.post_quant_conv(latents), golden["greedy_post_quant"], atol=5e-5, rtol=0)
    for name in ("greedy", "sample_race", "tf"):
        tokens = golden[f"{name}_tokens"]
        torch.testing.assert_close(network.decode(tokens), golden[f"{name}_pixels"], atol=5e-5, rtol=0)
        away = abs(to_uint8(tokenizer.decode(tokens)).astype(int) - golden[f"{name}_uint8"].numpy())
        assert away.max() <= 1
        assert (away > 0).mean() <= 0.002


def test_pixels_have_the_bytes_of_the_original_scripts(case: tuple[VQ16, dict[str, Tensor]]) -> None:
    tokenizer, golden = case

    class Stored(torch.nn.Module):
        """A network whose output is known to the last bit."""

        def decode(self, tokens: Tensor) -> Tensor:
            return golden["tf_pixels"]

    exact = copy.deepcopy(tokenizer)
    exact.network = Stored()
    assert (to_uint8(exact.decode(golden["tf_tokens"])) == golden["tf_uint8"].numpy()).all()


def test_encodes_as_the_original(case: tuple[VQ16, dict[str, Tensor]]) -> None:
    tokenizer, golden = case
    pixels = (golden["enc_pixels"] + 1) / 2
    torch.testing.assert_close(tokenizer.latents(pixels), golden["enc_quant_conv"], atol=5e-5, rtol=0)
    tokens = tokenizer.encode(pixels)
    assert torch.equal(tokens, golden["enc_tokens"])
    network: Any = tokenizer.network
    torch.testing.assert_close(network.decode(tokens), golden["enc_recon_pixels"], atol=5e-5, rtol=0)
    norms = tokenizer.code_vectors.square().mean(1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_codes_do_not_depend_on_mixed_precision(case: tuple[VQ16, dict[str, Tensor]]) -> None:
    tokenizer, golden = case
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode((golden["enc_pixels"] + 1) / 2), golden["enc_tokens"])


def test_whole_levels_keep_their_bytes() -> None:
    levels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert (to_uint8(levels / 255)[0, :, :, 0].flatten() == range(256)).all()


def test_the_original_layout_of_janus_has_the_same_tokenizer(tmp_path: Path) -> None:
    hf, original = janus_image_tokenizer(), janus_image_tokenizer(as_deepseek(tmp_path))
    for key, value in hf.state_dict().items():
        assert torch.equal(value, original.state_dict()[key]), key


def test_published_files_of_llamagen(tmp_path: Path) -> None:
    weights = load_file(LLAMAGEN / "weights_vq.safetensors")
    surplus = weights | {"quantize.codebook_used": torch.zeros(5)}
    torch.save({"model": surplus}, tmp_path / "vq_ds16_t2i.pt")
    expected, tokenizer = llamagen_image_tokenizer().state_dict(), llamagen_image_tokenizer()
    torch.nn.init.zeros_(tokenizer.network.get_parameter("quantize.embedding.weight"))
    pretrained(tokenizer, str(tmp_path / "vq_ds16_t2i.pt"))
    assert all(torch.equal(value, expected[key]) for key, value in tokenizer.state_dict().items())


def test_the_published_model_has_its_sizes() -> None:
    with torch.device("meta"):
        tokenizer = VQ16(VQ16Config())
    parts = [tokenizer.network.get_submodule(name) for name in ("encoder", "decoder")]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [29_298_176, 42_449_795]
    assert sum(p.numel() for p in tokenizer.parameters()) == 71_883_403
    assert (tokenizer.grid, tokenizer.num_tokens, tokenizer.codebook_size) == (24, 576, 16384)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size=100 is not a multiple of 16"):
        VQ16Config(image_size=100)
    with torch.device("meta"):
        tokenizer = VQ16(VQ16Config(image_size=256))
    for config in ({"image_size": 384}, {"params": {"image_size": 384}}):
        with pytest.raises(ValueError, match=r"says that images have 384 pixels, but tokenizer\.module\.config\.ima"):
            tokenizer.check_stored({"vision_config": config})
