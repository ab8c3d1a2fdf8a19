"""Show-o (arXiv 2408.12528) as a mask-token decoder: its sizes, and the names of its tensors."""

from collections.abc import Mapping
from typing import Any

from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.transformer import TransformerConfig

_STEMS = {  # ours -> Show-o's
    "embed": ["model.embed_tokens"],
    "norm": ["model.final_layernorm"],
    "head": ["lm_head"],
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.proj": ["self_attn.dense"],
    "attention.q_norm": ["self_attn.q_layernorm"],
    "attention.k_norm": ["self_attn.k_layernorm"],
    "mlp.0": ["mlp.fc1"],
    "mlp.2": ["mlp.fc2"],
}


def transformer_config(phi: Mapping[str, Any]) -> TransformerConfig:
    """The Transformer of a Phi configuration, with the changes that Show-o makes to it whatever it says."""
    return TransformerConfig(
        dim=phi["hidden_size"],
        depth=phi["num_hidden_layers"],
        heads=phi["num_attention_heads"],
        mlp_ratio=phi["intermediate_size"] / phi["hidden_size"],
        parallel=True,
        qk_norm=True,
        gelu="tanh",
    )


class ShowO(MaskTokenDecoder):
    """A mask-token decoder whose weights are stored under Show-o's names."""

    @staticmethod
    def stored_as(key: str) -> list[str]:
        """Show-o's tensors, joined along their first dimension, that are our tensor `key`."""
        key, kind = key.rsplit(".", 1)
        layer = ""
        if key.startswith("transformer.blocks."):
            _, _, index, key = key.split(".", 3)
            layer = f"model.layers.{index}."
        return [f"showo.{layer}{original}.{kind}" for original in _STEMS[key]]
