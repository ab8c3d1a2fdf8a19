"""Llamas of transformers: the names of their tensors, and the sizes that their configs say."""

from collections.abc import Mapping
from typing import Any

from lightning_modules.backbone.loading import Layout
from lightning_modules.backbone.transformer import TransformerConfig

_BLOCK = {  # ours -> Llama's, which are joined
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.proj": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.0": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.2": ["mlp.down_proj"],
}


def llama_layout(names: Mapping[str, str], unused: str) -> Layout:
    """The layout of a decoder whose parts are stored under other names, ours -> theirs; for `unused` see `Layout`.

    Of `transformer.blocks` the name is that of all layers; inside them tensors have Llama's names.
    """

    def stored_as(key: str) -> list[str]:
        key, kind = key.rsplit(".", 1)
        if not key.startswith("transformer.blocks."):
            return [f"{names[key]}.{kind}"]
        _, _, layer, part = key.split(".", 3)
        return [f"{names['transformer.blocks']}.{layer}.{name}.{kind}" for name in _BLOCK[part]]

    return Layout(stored_as, unused)


def refuse_other_sizes(
    stored: Any, transformer: TransformerConfig, rotary_base: float, vocabulary: int, model: str, advice: str
) -> None:
    """Raise ValueError if the config of a published Llama, a `LlamaConfig` or the like, is of other sizes.

    The sentence names the model and ends in some advice.
    """
    own = {
        "hidden_size": ("transformer.dim", transformer.dim),
        "num_hidden_layers": ("transformer.depth", transformer.depth),
        "num_attention_heads": ("transformer.heads", transformer.heads),
        "num_key_value_heads": ("transformer.kv_heads", transformer.kv_heads or transformer.heads),
        "intermediate_size": ("transformer.dim times mlp_ratio", round(transformer.dim * transformer.mlp_ratio)),
        "rms_norm_eps": ("transformer.norm_eps", transformer.norm_eps),
        "rope_theta": ("rotary_base", rotary_base),
        "vocab_size": ("text_vocabulary", vocabulary),
    }
    found = stored.to_dict() | dict(stored.rope_parameters or {})
    for name, (key, value) in own.items():
        if found[name] != value:
            raise ValueError(
                f"{model}'s config.json says {name} {found[name]}, but decoder.module.{key} is {value}: {advice}"
            )
