"""Show-o (arXiv 2408.12528) as a mask-token decoder: its sizes, and the names of its tensors."""

from collections.abc import Mapping
from typing import Any

from lightning_modules.backbone.loading import Layout
from lightning_modules.backbone.mask_token import MaskTokenDecoder

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


class ShowO(MaskTokenDecoder):
    """A mask-token decoder of Phi's make, whose weights have Show-o's names; see `MaskNetwork`.

    Its Transformer is parallel, with norms on queries and keys, and the tanh form of GELU.
    """

    @staticmethod
    def stored_as(key: str) -> list[str]:
        """Show-o's tensors that, joined along their first dimension, are our tensor `key`."""
        key, kind = key.rsplit(".", 1)
        layer = ""
        if key.startswith("transformer.blocks."):
            _, _, index, key = key.split(".", 3)
            layer = f"model.layers.{index}."
        return [f"showo.{layer}{original}.{kind}" for original in _STEMS[key]]

    layouts = (Layout(stored_as),)

    def check_stored(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if Show-o's own config says that weights are for other tokenizers."""
        own = {
            "num_vq_tokens": (self.num_tokens, "the 256-pixel model has 256 tokens an image, the 512-pixel one 1024"),
            "codebook_size": (self.vocabulary.codes, "that of its image tokenizer, which is showlab/magvitv2"),
            "llm_vocab_size": (self.vocabulary.text, "the ids of its text tokenizer, which is microsoft/phi-1_5"),
        }
        for key, (value, meaning) in own.items():
            if config.get(key, value) != value:
                raise ValueError(
                    f"Show-o's config.json says {key} {config[key]}, but the decoder is built for {value} ({meaning})"
                )
