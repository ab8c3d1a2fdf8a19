"""The memory estimate against what passes really keep; on the meta device, so that sizes can be the real ones."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from callbacks.memory import MemoryEstimate
from lightning_modules.backbone.attention import AttentionFn, FullAttention
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.lora import LoRA
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


def showo_attention(depth: int) -> AttentionFn:
    cached = [torch.empty(BATCH, 32, PROMPT, 64)] * depth
    prefix = Prefix(Rotary.at(torch.arange(PROMPT), 32), None, cached, cached)
    return Grid(Rotary.at(torch.arange(GRID), 32), [prefix])


def janus_attention(depth: int) -> AttentionFn:
    return FullAttention(True, Rotary.at(torch.arange(GRID), 128))


SHOWO = TransformerConfig(2048, 24, 32, 4.0, parallel=True, qk_norm=True, gelu="tanh")
JANUS = TransformerConfig(2048, 24, 16, 2.75, rms_norm=True, swiglu=True, bias=False)
JANUS_7B = replace(JANUS, dim=4096, depth=30, heads=32, mlp_ratio=2.6875)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("sizes", "attention"),
    [(SHOWO, showo_attention), (JANUS, janus_attention), (JANUS_7B, janus_attention)],
    ids=["showo", "janus_1b", "janus_7b"],
)
def test_training_keeps_what_is_estimated(
    sizes: TransformerConfig, attention: Callable[[int], AttentionFn], checkpointing: bool
) -> None:
    config = replace(sizes, checkpointing=checkpointing)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.shape[-2:] != (GRID, GRID):  # attention's weights, which GPUs compute again
            kept[id(x.untyped_storage())] = x.untyped_storage().nbytes()
            storages.append(x.untyped_storage())
        return x

    storages: list[Any] = []  # alive, so that no id is given twice
    with torch.device("meta"):
        model, attending = Transformer(config), attention(config.depth)
        x = torch.empty(BATCH, GRID, config.dim, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model.last(x, attending)
    assert out.shape == x.shape
    weights = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
    measured = sum(kept.values()) - (0 if checkpointing else weights)
    estimate = config.saved_bytes(BATCH * GRID, 4, 4)
    if checkpointing:  # the one layer that is computed anew is not among what the forward pass keeps
        estimate -= replace(sizes, depth=1).saved_bytes(BATCH * GRID, 4, 4)
    assert estimate == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_and_decoding_of_next_token_decoders_take_what_is_estimated(checkpointing: bool) -> None:
    llama = make_llama(dim=128, grid=12, checkpointing=checkpointing)
    prompts, tokens, images = [" ".join(["a"] * 11)] * 8, torch.randint(0, 32, (8, 144)), range(8)
    positions, layers = llama.prefix_length + 144, 1 if checkpointing else 3
    # On CPUs, attention keeps its weights as well, and RMS norms what they normalise.
    beside = layers * 8 * positions * (4 * positions + 2 * 128) * 4

    def train() -> None:
        llama.log_probs(prompts, tokens, images).sum().backward()

    def decode() -> None:
        state = llama.begin(asked(prompts), Sampling(guidance=1.0))
        while not state.is_done:
            llama.commit(state, llama.propose(state, 1), torch.zeros(8, dtype=torch.int64))

    train()  # gradients are there
    assert llama.training_bytes(8, 4, 4) + beside == pytest.approx(peak_mebibytes(train) * 2**20, rel=0.15)
    assert llama.decoding_bytes(8, 4) == pytest.approx(peak_mebibytes(decode) * 2**20, rel=0.15)


@pytest.mark.parametrize(
    ("checkpointing", "mixed", "adapters", "depth"),
    [
        (False, True, False, 3),
        (True, True, False, 3),
        (False, False, True, 3),
        (True, False, True, 3),
        (False, True, True, 3),
        (True, True, True, 24),  # single-precision copies of a layer's adapters weigh much beside few layers
    ],
)
def test_training_in_mixed_precision_and_of_adapters_takes_what_is_estimated(
    checkpointing: bool, mixed: bool, adapters: bool, depth: int
) -> None:
    llama = make_llama(dim=128, depth=depth, grid=12, checkpointing=checkpointing)
    size = 2 if mixed else 4
    if adapters:
        LoRA().inject(llama.requires_grad_(False))
    prompts, tokens, images = [" ".join(["a"] * 11)] * 8, torch.randint(0, 32, (8, 144)), range(8)
    positions, layers = llama.prefix_length + 144, 1 if checkpointing else depth
    beside = layers * 8 * positions * (4 * positions * size + 2 * 128 * 4)  # as above; norms are in single precision

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = llama.log_probs(prompts, tokens, images).sum()
        loss.backward()

    train()  # gradients are there
    assert llama.training_bytes(8, size, 4) + beside == pytest.approx(peak_mebibytes(train) * 2**20, rel=0.15)


def estimated(decoder: TokenDecoder, **trainer: Any) -> dict[str, float]:
    """Estimate the training of a decoder on two images."""
    module: Any = nn.Module()
    module.decoder = decoder
    given = {"strategy": None, "world_size": 1, "callbacks": [], "datamodule": SimpleNamespace(batch_size=2)}
    run: Any = SimpleNamespace(**given | trainer)
    return MemoryEstimate().estimate(run, module, "fit")


def test_mixed_precision_keeps_copies_of_weights() -> None:
    plain, again = (estimated(make_llama(checkpointing=on), precision="bf16-mixed") for on in (False, True))
    llama = make_llama()
    linear = sum(layer.weight.numel() for layer in llama.modules() if isinstance(layer, nn.Linear))
    assert plain["training"] == llama.training_bytes(2, 2, 4) > linear * 2
    llama.requires_grad_(False).head.requires_grad_(True)
    frozen = estimated(llama, precision="bf16-mixed")
    assert frozen["training"] == plain["training"]  # they stand between the image and what is trained
    llama.transformer.config = replace(llama.transformer.config, checkpointing=True)
    head = sum(layer.weight.numel() for layer in llama.head if isinstance(layer, nn.Linear))
    copies = again["training"] - estimated(llama, precision="bf16-mixed")["training"]
    assert copies == 2 * (linear - head)


def test_sharded_weights_are_gathered_by_layers(compose_config: Any) -> None:
    llama = make_llama()
    strategy = instantiate(compose_config("devices=fsdp").trainer.strategy)
    found = estimated(llama, precision="bf16-mixed", strategy=strategy, world_size=4)
    layer, own = (sum(w.numel() for w in part.parameters()) for part in (llama.transformer.blocks[0], llama))
    trained = sum(w.numel() for w in llama.parameters() if w.requires_grad)
    assert found["parameters"] == own * 4 / 4 + (own - 3 * layer + 2 * layer) * 2
    assert found["gradients"] == found["stepping"] == found["optimizer"] / 2 == trained * 4 / 4
    assert found["training"] == llama.training_bytes(2, 2, 2)


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
