"""Peers of Janus and LlamaGen on the same weights: transformers' own Janus, and a LlamaGen without care for speed."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_modules.backbone.janus import Janus
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.llamagen import LlamaGen
from lightning_modules.backbone.sampling import Sampling, draw, guide, uniform_noise
from lightning_modules.backbone.vq16 import VQ16, VQ16Config
from tests.helpers.asked import asked
from tests.helpers.janus import GENERATION, JANUS_CONFIG, make_janus
from tests.helpers.llamagen import llama_config

DIM, DEPTH, HEADS, HIDDEN, CODES = 512, 4, 8, 1408, 16384
PROMPT = " ".join(map(str, range(1, 16)))  # of 15 tokens


def janus_config(text: int = 102400, codes: int = CODES, grid: int = 24) -> dict[str, Any]:
    """A Janus of real vocabularies, narrow and shallow; of the parts that the sampler does not run there is little."""
    config = copy.deepcopy(JANUS_CONFIG)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True  # it predicts no words
    config["text_config"] |= {
        "vocab_size": text,
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": DIM // HEADS,
        "max_position_embeddings": 2048,
    }
    side = 2 * grid  # pixels
    config["vision_config"] |= {"image_size": side, "patch_size": 2, "num_image_tokens": grid**2, "projection_dim": DIM}
    sizes = {"num_embeddings": codes, "projection_dim": DIM, "image_token_embed_dim": DIM, "num_patches": grid}
    config["vq_config"] |= sizes
    return config


def janus_pair(**options: Any) -> tuple[Janus, Any]:
    """Ours and transformers', with the same random weights, far from uniform."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    torch.manual_seed(0)
    config = janus_config()
    theirs: Any = JanusForConditionalGeneration(JanusConfig(**config)).eval()
    for weight in theirs.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.05)
    settings = theirs.generation_config
    settings.bos_token_id = config["text_config"]["bos_token_id"]
    settings.pad_token_id = config["text_config"]["pad_token_id"]
    settings.guidance_scale, settings.generation_kwargs = 5.0, {"boi_token_id": GENERATION["boi_token_id"]}
    ours = make_janus(config, **options)
    stored, layout = theirs.state_dict(), Janus.layouts[0]
    with torch.no_grad():
        for key, weight in ours.named_parameters():
            if not key.startswith("image_tokenizer."):
                weight.copy_(torch.cat([stored[name] for name in layout.stored_as(key)]))
    return ours, theirs


def decode(decoder: Any, prompts: Sequence[str], sampling: Sampling, steps: int | None = None) -> Tensor:
    """Sample images, or their first tokens: [B, T]."""
    state = decoder.begin(asked(prompts), sampling)
    only = torch.zeros(len(prompts), dtype=torch.int64)
    while not state.is_done and state.step != steps:
        decoder.commit(state, decoder.propose(state, 1), only)
    return state.tokens


def theirs_decode(theirs: Any, ids: Tensor, images: int, steps: int, sample: bool = True) -> Tensor:
    """The first tokens of images of one prompt by transformers, whose caches have room for whole images."""
    vision, settings = theirs.model.vision_model.config, theirs.generation_config
    settings.max_length, whole = ids.shape[1] + vision.num_image_tokens, vision.num_image_tokens
    vision.num_image_tokens = steps
    options = {
        "generation_mode": "image",
        "do_sample": sample,
        "num_return_sequences": images,
        "top_k": 0,
    }  # 50 if unset
    try:
        return theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    finally:
        vision.num_image_tokens = whole


class RandomFeatures:
    """Stands for T5: every prompt has the same 20 random features."""

    bytes, width, max_tokens = 0, 2048, 120

    def features(self, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
        row = torch.randn(20, self.width, generator=torch.Generator().manual_seed(1)).to(device)
        return [row for _ in prompts]


def random_llamagen() -> LlamaGen:
    """LlamaGen for 256 pixels, narrow and shallow, with random weights far from uniform; its VQ decoder is not run."""
    torch.manual_seed(0)
    text: Any = RandomFeatures()
    tokenizer = VQ16(VQ16Config(256, CODES, base_channels=32, num_res_blocks=1, latent_channels=32))
    decoder = LlamaGen(tokenizer, text, llama_config(DIM, DEPTH, HEADS, HIDDEN))
    for name, weight in decoder.named_parameters():
        if weight.ndim == 2 and not name.startswith("image_tokenizer."):
            nn.init.normal_(weight, std=0.05)
    return decoder.eval()


def with_plain_linear(decoder: LlamaGen) -> LlamaGen:
    """A copy whose linear layers are PyTorch's."""
    decoder = copy.deepcopy(decoder)
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear
    return decoder


@torch.no_grad()
def straightforward_llamagen(decoder: LlamaGen, prompt: str, sampling: Sampling, steps: int) -> Tensor:
    """The first tokens of an image, [1, steps], the way of the published script.

    Text has all its positions, keys and values are as long as they can get, every step builds its mask anew and attends
    by plain matrix products, and the head is applied to both rows.
    """
    text, size = decoder.text_tokenizer.max_tokens, decoder.transformer.config
    prefix = decoder.prefix([prompt] * 2, [True, False]).padded(text)
    total, table = text + decoder.num_tokens, decoder.code_table()
    rotary = decoder.rotary(torch.arange(-text, decoder.num_tokens))
    keys, values = torch.zeros(2, size.depth, 2, size.heads, total, size.head_dim)
    noise, tokens = uniform_noise([0], 1, decoder.num_tokens), torch.zeros(1, steps, dtype=torch.int64)
    x, places = prefix.embeddings, torch.arange(text)
    for step in range(steps):
        everywhere = torch.arange(total)
        real = (everywhere >= prefix.padding[:, None])[:, None]
        allowed = (everywhere <= places[:, None]) & real | (everywhere == places[:, None])

        def attending(
            layer: int, q: Tensor, k: Tensor, v: Tensor, at: Tensor = places, mask: Tensor = allowed[:, None]
        ) -> Tensor:
            q, keys[layer][:, :, at], values[layer][:, :, at] = rotary[at](q), rotary[at](k), v
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, keys[layer], values[layer], attn_mask=mask)

        hidden = decoder.transformer.run(x, attending)[-1]
        logits = guide(*decoder.head(decoder.norm(hidden[:, -1])).float().chunk(2), sampling.guidance)
        tokens[:, step] = draw(logits, sampling, noise[:, 1:, step], distinct=False)[0][:, 0]
        x, places = table[tokens[:, step]].repeat(2, 1)[:, None], torch.tensor([text + step])
    return tokens
