"""The memory estimate against what passes really keep; on the meta device, so that sizes can be the real ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.backbone.magvit import MagvitConfig, MagvitV2
from lightning_modules.backbone.mask_attention import Grid, Prefix
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.backbone.showo import ShowO
from lightning_modules.backbone.transformer import Transformer, TransformerConfig
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import RandomScores, Region
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from tests.helpers.asked import asked
from tests.helpers.llama import make_llama
from tests.helpers.measuring import peak_mebibytes
from tests.helpers.models import phi

BATCH, PROMPT, GRID = 4, 20, 258


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_keeps_what_is_estimated(checkpointing: bool) -> None:
    config = TransformerConfig(2048, 24, 32, 4.0, parallel=True, qk_norm=True, gelu="tanh", checkpointing=checkpointing)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[id(x.untyped_storage())] = x.untyped_storage().nbytes()
        storages.append(x.untyped_storage())
        return x

    storages: list[Any] = []  # alive, so that no id is given twice
    with torch.device("meta"):
        model = Transformer(config)
        cached = [torch.empty(BATCH, 32, PROMPT, 64)] * config.depth
        prefix = Prefix(Rotary.at(torch.arange(PROMPT), 32), None, cached, cached)
        attending = Grid(Rotary.at(torch.arange(GRID), 32), [prefix])
        x = torch.empty(BATCH, GRID, 2048, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model.last(x, attending)
    assert out.shape == x.shape
    weights = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
    measured = sum(kept.values()) - (0 if checkpointing else weights)
    estimate = config.saved_bytes(BATCH * GRID, 4)
    if checkpointing:  # the one layer that is computed anew is not among what the forward pass keeps
        estimate -= TransformerConfig(2048, 1, 32, 4.0, parallel=True).saved_bytes(BATCH * GRID, 4)
    assert estimate == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_and_decoding_of_next_token_decoders_take_what_is_estimated(checkpointing: bool) -> None:
    llama = make_llama(dim=128, grid=12, checkpointing=checkpointing)
    prompts, tokens, images = [" ".join(["a"] * 11)] * 8, torch.randint(0, 32, (8, 144)), range(8)

    def train() -> None:
        llama.log_probs(prompts, tokens, images).sum().backward()

    def decode() -> None:
        state = llama.begin(asked(prompts), Sampling(guidance=1.0))
        while not state.is_done:
            llama.commit(state, llama.propose(state, 1), torch.zeros(8, dtype=torch.int64))

    train()  # gradients are there
    assert llama.training_bytes(8, 4) == pytest.approx(peak_mebibytes(train) * 2**20, rel=0.15)
    assert llama.decoding_bytes(8, 4) == pytest.approx(peak_mebibytes(decode) * 2**20, rel=0.15)


@pytest.mark.parametrize(("width", "bits"), [(128, 8), (8, 8), (8, 12)], ids=["pixels", "layers", "logits"])
def test_decoding_takes_what_is_estimated(width: int, bits: int) -> None:
    torch.manual_seed(0)
    sizes = {"encoder_widths": (8, 8, 8), "encoder_blocks": (1, 1, 1), "decoder_widths": (width, width, width)}
    tokenizer = MagvitV2(MagvitConfig(image_size=64, bits=bits, decoder_blocks=(1, 1, 1), norm_groups=4, **sizes))
    text: Any = SimpleNamespace(size=20, end_of_text=0, encode=lambda prompts: [[1] * 9 for _ in prompts])
    decoder = ShowO(tokenizer, text, 11, phi(128, 3, 4, 4.0), rotary_dims=16).eval()
    sampling, images = MaskSampling(steps=2), 4

    def decode() -> None:
        state = decoder.begin(asked([""] * images), sampling)
        while not state.is_done:
            decoder.commit(state, decoder.propose(state, 1), torch.zeros(images, dtype=torch.int64))

    @torch.no_grad()
    def decode_images() -> None:
        tokenizer.decode(torch.zeros(images, decoder.num_tokens, dtype=torch.int64))

    measured = max(peak_mebibytes(decode), peak_mebibytes(decode_images)) * 2**20
    assert decoder.decoding_bytes(images, 4) == pytest.approx(measured, rel=0.35)


def test_candidates_within_candidates_multiply() -> None:
    sampling = MaskSampling()
    assert Sample(sampling).images_at_once == 1
    assert Potential(sampling, 20, "judge").images_at_once == 20
    paths = BestOfN(Potential(sampling, 5, "judge"), 4, "judge")
    assert paths.images_at_once == 20
    reflection = Reflection(paths, Verified(sampling, 6), Region(RandomScores(), 1.0), 3)
    assert reflection.images_at_once == 20  # one after the other
