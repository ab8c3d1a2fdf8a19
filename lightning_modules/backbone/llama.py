"""Decoders over a Llama of transformers: its parts, the names of its tensors, and the sizes that its config says."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import Layout
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.transformer import Transformer, TransformerConfig

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


class LlamaDecoder(NextTokenDecoder):
    """Reads a prompt by its ids; a subclass adds its codes and its head.

    Args:
        image_tokenizer, transformer, feature_layers, compiled: see `NextTokenNetwork`.
        text_tokenizer: turns prompts into ids, of at most `max_text` tokens.
        text_vocabulary: rows of the embedding of ids; the tokenizer does not use all.
        rotary_base: see `Rotary.at`.
    """

    text_tokenizer: Any

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: Any,
        text_vocabulary: int,
        transformer: TransformerConfig,
        feature_layers: Sequence[int] = (),
        rotary_base: float = 10_000.0,
        compiled: bool = False,
    ) -> None:
        super().__init__(image_tokenizer, transformer, feature_layers, compiled)
        if text_tokenizer.size > text_vocabulary:
            raise ValueError(
                f"decoder.module.text_tokenizer has {text_tokenizer.size} ids, but decoder.module.text_vocabulary is "
                f"{text_vocabulary}"
            )
        self.text_tokenizer, self.rotary_base = text_tokenizer, rotary_base
        self.words = nn.Embedding(text_vocabulary, transformer.dim)
        self.transformer, self.norm = Transformer(transformer), transformer.norm()
        nn.init.normal_(self.words.weight, std=0.02)

    def cache_key(self) -> dict[str, Any]:
        return super().cache_key() | {"rotary_base": self.rotary_base}

    @property
    def max_words(self) -> int:
        return self.text_tokenizer.max_text

    def rotary(self, positions: Tensor) -> Rotary:
        return Rotary.at(positions, self.transformer.config.head_dim, self.rotary_base)

    def refuse_other_sizes(self, stored: Any, advice: str) -> None:
        """Raise ValueError if a published config, a `LlamaConfig` or the like, is of other sizes.

        The sentence names the model and ends in some advice.
        """
        sizes = self.transformer.config
        own = {
            "hidden_size": ("transformer.dim", sizes.dim),
            "num_hidden_layers": ("transformer.depth", sizes.depth),
            "num_attention_heads": ("transformer.heads", sizes.heads),
            "num_key_value_heads": ("transformer.kv_heads", sizes.kv_heads or sizes.heads),
            "intermediate_size": ("transformer.dim times mlp_ratio", round(sizes.dim * sizes.mlp_ratio)),
            "rms_norm_eps": ("transformer.norm_eps", sizes.norm_eps),
            "rope_theta": ("rotary_base", self.rotary_base),
            "vocab_size": ("text_vocabulary", self.words.num_embeddings),
        }
        found = stored.to_dict() | dict(stored.rope_parameters or {})
        for name, (key, value) in own.items():
            if found[name] != value:
                raise ValueError(
                    f"{type(self).__name__}'s config.json says {name} {found[name]}, but decoder.module.{key} is "
                    f"{value}: {advice}"
                )
