"""The golden LlamaGen, and a tiny random one with a T5."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.backbone.llamagen import LlamaGen
from lightning_modules.backbone.loading import pretrained
from lightning_modules.backbone.text import word_spans
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.backbone.vq16 import VQ16, VQ16Config
from tests.helpers.overrides import ROOT

LLAMAGEN = ROOT / "tests" / "golden" / "llamagen"
LLAMAGEN_CONFIG: dict[str, Any] = json.loads((LLAMAGEN / "config.json").read_text())
WEIGHTS = str(LLAMAGEN / "weights_gpt.safetensors")


class StoredText:
    """Stands for T5: prompts are numbers of golden captions, whose features are stored."""

    bytes = 0

    def __init__(self) -> None:
        golden = load_file(LLAMAGEN / "data.safetensors")
        rows = zip(golden["t5_features_right_padded"], golden["t5_mask_right_padded"].sum(1).tolist(), strict=True)
        self.rows = [features[:count] for features, count in rows]
        self.width, self.max_tokens = LLAMAGEN_CONFIG["gpt"]["caption_dim"], LLAMAGEN_CONFIG["gpt"]["cls_token_num"]

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[int(prompt)] for prompt in prompts]

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        return word_spans(prompt)

    def features(self, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
        return [self.rows[int(prompt)] for prompt in prompts]


def llama_config(dim: int, depth: int, heads: int, hidden: int, **more: Any) -> TransformerConfig:
    """A Transformer of LlamaGen's make."""
    make: Any = {"rms_norm": True, "swiglu": True, "bias": False, "norm_eps": 1e-5}
    return TransformerConfig(dim, depth, heads, hidden / dim, **make | more)


def make_llamagen(text: Any = None, image_tokenizer: Any = None, **options: Any) -> LlamaGen:
    """An untrained LlamaGen of the golden one's sizes."""
    gpt = LLAMAGEN_CONFIG["gpt"]
    hidden = -(-int(8 * gpt["dim"] / 3) // gpt["multiple_of"]) * gpt["multiple_of"]
    more = {name: options.pop(name) for name in ("checkpointing",) if name in options}
    sizes = llama_config(gpt["dim"], gpt["n_layer"], gpt["n_head"], hidden, norm_eps=gpt["norm_eps"], **more)
    return LlamaGen(image_tokenizer or llamagen_image_tokenizer(), text or StoredText(), sizes, **options).eval()


def golden_llamagen(**options: Any) -> LlamaGen:
    return pretrained(make_llamagen(**options), WEIGHTS)


def llamagen_image_tokenizer() -> VQ16:
    """The golden image tokenizer."""
    vq = LLAMAGEN_CONFIG["vq"]
    grid = round(LLAMAGEN_CONFIG["gpt"]["block_size"] ** 0.5)
    sizes = VQ16Config(
        image_size=grid * 2 ** (len(vq["mult"]) - 1),
        codebook_size=vq["codebook"],
        code_dim=vq["zdim"],
        base_channels=vq["ch"],
        channel_multiplier=vq["mult"],
        num_res_blocks=vq["nres"],
        latent_channels=vq["zch"],
        round_pixels=True,
    )
    return pretrained(VQ16(sizes), str(LLAMAGEN / "weights_vq.safetensors")).eval().requires_grad_(False)
