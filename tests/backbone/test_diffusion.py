"""Pipelines of diffusers as decoders, on a tiny random Stable Diffusion 3."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from lightning_modules.backbone.diffusion import DiffusionDecoder, DiffusionSampling
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.sample import Sample
from lightning_modules.rewards.verifier import Reward

ROWS = [{"prompt": f"a photo of a {name}"} for name in ("dog", "red cup", "star")]
WITHOUT = ["text_encoder_3", "tokenizer_3"]


def tiny_sd3(folder: Path) -> str:
    """Write a random pipeline of a few thousand weights; it reads letters."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        block_out_channels=(8, 8), latent_channels=4, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.0, scaling_factor=0.5,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), vae, CLIPTextModelWithProjection(text), tokenizer,
        CLIPTextModelWithProjection(text), tokenizer, None, None,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def decoder(checkpoint: str) -> DiffusionDecoder:
    return DiffusionDecoder(checkpoint, "float32", WITHOUT)


def test_an_image_depends_on_its_prompt_and_seed_alone(decoder: DiffusionDecoder) -> None:
    strategy = Sample(DiffusionSampling(steps=3, guidance=5.0, size=32))
    together = strategy.decode(decoder, {}, ROWS, [1, 2, 3])
    assert together.tokens.shape == (3, 3, 32, 32) and together.tokens.dtype == torch.uint8
    assert together.cost.decoder_passes == 3 * 3 * 2 and together.evidence is None
    alone = strategy.decode(decoder, {}, ROWS[1:2], [2])
    assert (together.tokens[1].int() - alone.tokens[0].int()).abs().max() <= 1
    other = strategy.decode(decoder, {}, ROWS[1:2], [3])
    assert (other.tokens[0].int() - alone.tokens[0].int()).abs().max() > 20
    plain = Sample(DiffusionSampling(steps=3, guidance=1.0, size=32)).decode(decoder, {}, ROWS, [1, 2, 3])
    assert plain.cost.decoder_passes == 3 * 3


class Brightness(Reward):
    def cache_key(self) -> str:
        return type(self).__name__

    def __call__(self, prompts: object, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((1, 2, 3))


def test_best_of_n_keeps_the_image_that_a_reward_likes_best(decoder: DiffusionDecoder) -> None:
    sample = Sample(DiffusionSampling(steps=2, guidance=1.0, size=32))
    best = BestOfN(sample, n=3, judge="brightness").decode(decoder, {"brightness": Brightness()}, ROWS[:2], [5, 6])
    for row, seed, chosen in zip(ROWS, (5, 6), best.tokens, strict=False):
        candidates = sample.decode(decoder, {}, [row] * 3, [seed, image_seed(seed, 1), image_seed(seed, 2)]).tokens
        brightest = candidates.float().mean((1, 2, 3)).max()
        assert chosen.float().mean() == pytest.approx(float(brightest), abs=0.01)


def test_its_weights_tell_it_apart_and_move_with_it(decoder: DiffusionDecoder, checkpoint: str) -> None:
    other = DiffusionDecoder(checkpoint, "bfloat16", WITHOUT)
    assert fingerprint(other) != fingerprint(decoder)
    assert other.to(torch.float32).pipeline.transformer.dtype == torch.float32


def test_what_a_pipeline_cannot_do_is_refused(
    decoder: DiffusionDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"k must be 1, not 2"):
        decoder.noise([0], 2, None)
    with pytest.raises(FileNotFoundError, match=r"decoder.checkpoint: .*model_index.json"):
        DiffusionDecoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"decoder.checkpoint: 'no/where' is neither a folder nor to be had"):
        DiffusionDecoder("no/where")
    with pytest.raises(ValueError, match=r"sampling.steps must be at least 1, not 0"):
        DiffusionSampling(steps=0, guidance=1.0, size=32)
