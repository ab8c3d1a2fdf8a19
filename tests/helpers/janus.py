"""The golden Janus, in both layouts of its weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.backbone.janus import Janus
from lightning_modules.backbone.janus_text import EncodedPrompt, JanusTokenizer
from lightning_modules.backbone.loading import pretrained
from lightning_modules.backbone.text import word_spans
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.backbone.vq16 import VQ16, VQ16Config
from tests.helpers.overrides import ROOT

JANUS = ROOT / "tests" / "golden" / "janus"
JANUS_CONFIG: dict[str, Any] = json.loads((JANUS / "config.json").read_text())
GENERATION = json.loads((JANUS / "generation_config.json").read_text())["generation_kwargs"]
BOS, PAD, BOI = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5c\u2581pad\u2581\uff5c>", "<begin_of_image>"
SPECIAL = [BOS, PAD, BOI, "<end_of_image>", "<image_placeholder>"]
WEIGHTS = str(JANUS / "weights_hf.safetensors")


def deepseek_tensors() -> dict[str, Tensor]:
    """The golden weights under DeepSeek's names, with what only these have."""
    weights, tensors, parts = load_file(WEIGHTS), {}, {}
    for name, entry in json.loads((JANUS / "key_map.json").read_text())["map"].items():
        if (row := (entry["op"] or "").removeprefix("rows ")[:1]).isdigit():  # of three, joined
            parts.setdefault(entry["original_key"], [torch.empty(0)] * 3)[int(row)] = weights[name]
        else:
            tensors[entry["original_key"]] = weights[name].view(entry["original_shape"])
    joined = {key: torch.cat(rows) for key, rows in parts.items()}
    pool = {"vision_model.vision_tower.attn_pool.latent": torch.zeros(1, 1, 4)}
    return tensors | joined | pool | {"gen_vision_model.quantize.codebook_used": torch.zeros(65)}


def as_deepseek(folder: Path) -> str:
    """Write the golden weights as DeepSeek does, in two files with an index; returns the folder."""
    tensors = deepseek_tensors()
    files = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
    for i, file in enumerate(files):
        torch.save({key: tensors[key] for key in sorted(tensors)[i::2]}, folder / file)
    names = {key: files[i % 2] for i, key in enumerate(sorted(tensors))}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    return str(folder)


def janus_image_tokenizer(checkpoint: str | None = WEIGHTS, config: dict[str, Any] = JANUS_CONFIG) -> VQ16:
    """The golden image tokenizer, or one of the sizes in another config of transformers."""
    vq = config["vq_config"]
    sizes = VQ16Config(
        image_size=config["vision_config"]["image_size"],
        codebook_size=vq["num_embeddings"],
        code_dim=vq["embed_dim"],
        base_channels=vq["base_channels"],
        channel_multiplier=vq["channel_multiplier"],
        num_res_blocks=vq["num_res_blocks"],
        latent_channels=vq["latent_channels"],
    )
    return pretrained(VQ16(sizes), checkpoint).eval().requires_grad_(False)


class Numbers:
    """Prompts of Janus that are written as their ids, without those of the beginning and of the image."""

    size, max_text = JANUS_CONFIG["text_config"]["vocab_size"], 16

    def __init__(self, special: dict[str, int]) -> None:
        self.special, self.pad = special, special["pad"]

    def parse(self, prompt: str) -> EncodedPrompt:
        spans = word_spans(prompt)
        ids = [self.special["bos"], *map(int, prompt.split()), self.special["boi"]]
        return EncodedPrompt(ids, range(1, 1 + len(spans)), spans)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.parse(prompt).ids for prompt in prompts]

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        return self.parse(prompt).spans

    def cache_key(self) -> str:
        return "numbers"

    unconditional = JanusTokenizer.unconditional


def make_janus(config: dict[str, Any] = JANUS_CONFIG, checkpointing: bool = False, **options: Any) -> Janus:
    """An untrained Janus of the sizes in a config of transformers, whose prompts are numbers."""
    text = config["text_config"]
    sizes = TransformerConfig(
        dim=text["hidden_size"],
        depth=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        mlp_ratio=text["intermediate_size"] / text["hidden_size"],
        rms_norm=True,
        swiglu=True,
        bias=False,
        norm_eps=text["rms_norm_eps"],
        checkpointing=checkpointing,
    )
    numbers: Any = Numbers(
        {"bos": text["bos_token_id"], "pad": text["pad_token_id"], "boi": GENERATION["boi_token_id"]}
    )
    tokenizer = janus_image_tokenizer(None, config)
    base = text["rope_parameters"]["rope_theta"]
    return Janus(tokenizer, numbers, text["vocab_size"], sizes, rotary_base=base, **options).eval()
