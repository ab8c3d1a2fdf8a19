"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811) as a next-token decoder: a Llama with an image head."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.janus_text import JanusTokenizer
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.llama import LlamaDecoder, llama_layout
from lightning_modules.backbone.next_token_network import Prefix
from lightning_modules.backbone.transformer import TransformerConfig

_HF = {  # ours -> transformers'
    "words": "model.language_model.embed_tokens",
    "transformer.blocks": "model.language_model.layers",
    "norm": "model.language_model.norm",
    "codes": "model.generation_embeddings",
    "aligner.0": "model.generation_aligner.fc1",
    "aligner.2": "model.generation_aligner.hidden_layers.0",
    "head.0": "model.generation_head.proj_out",
    "head.2": "model.generation_head.vision_head",
}
_DEEPSEEK = {  # ours -> DeepSeek's own
    "words": "language_model.model.embed_tokens",
    "transformer.blocks": "language_model.model.layers",
    "norm": "language_model.model.norm",
    "codes": "gen_embed",
    "aligner.0": "gen_aligner.layers.0",
    "aligner.2": "gen_aligner.layers.2",
    "head.0": "gen_head.output_mlp_projector",
    "head.2": "gen_head.vision_head",
}


class Janus(LlamaDecoder):
    """A Llama that reads a prompt and the codes of an image, with its own embedding and head for these.

    Its guidance s is that of `Sampling`; the published scale is w = 1 + s. What Janus has for understanding images,
    and its head for words, are not loaded. For the arguments see `LlamaDecoder`.
    """

    # Image understanding and the head for words are left out on purpose; rotary frequencies are computed.
    layouts = (
        llama_layout(_HF, r"lm_head\.|model\.(aligner|vision_model|vqmodel)\."),
        llama_layout(
            _DEEPSEEK,
            r"language_model\.lm_head\.|(aligner|vision_model|gen_vision_model)\.|.*\.rotary_emb\.inv_freq$",
        ),
    )
    text_tokenizer: JanusTokenizer

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: JanusTokenizer,
        text_vocabulary: int,
        transformer: TransformerConfig,
        feature_layers: Sequence[int] = (),
        rotary_base: float = 10_000.0,
        compiled: bool = False,
    ) -> None:
        super().__init__(
            image_tokenizer, text_tokenizer, text_vocabulary, transformer, feature_layers, rotary_base, compiled
        )
        dim, code_dim = transformer.dim, image_tokenizer.code_vectors.shape[1]
        self.codes = nn.Embedding(image_tokenizer.codebook_size, code_dim)
        self.aligner = nn.Sequential(Linear(code_dim, dim), nn.GELU(), Linear(dim, dim))
        self.head = nn.Sequential(Linear(dim, dim), nn.GELU(), Linear(dim, image_tokenizer.codebook_size))

    @property
    def prefix_length(self) -> int:
        return 32  # a caption of some 20 tokens in its template

    def check_stored(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if Janus's config, by transformers or DeepSeek, is of other sizes or another tokenizer.

        DeepSeek's leaves out what is as in `LlamaConfig`.
        """
        llama = config.get("text_config", config.get("language_config"))
        if llama is None:  # an export, say, which needs no translation
            return
        from transformers import LlamaConfig  # which the image tokenizer has needed already

        advice = "the sizes of Pro-1B and 1.3B are in decoder=janus_pro_1b, those of Pro-7B in decoder=janus_pro_7b"
        self.refuse_other_sizes(LlamaConfig(**llama), advice)
        if "text_config" in config and llama.get("pad_token_id") not in (None, self.text_tokenizer.pad):
            raise ValueError(
                f"Janus's config.json says pad_token_id {llama['pad_token_id']}, but in its text tokenizer that is "
                f"{self.text_tokenizer.pad}: decoder.module.text_tokenizer.checkpoint is of another Janus"
            )

    def prefix(self, prompts: Sequence[str], conditional: Sequence[bool]) -> Prefix:
        text, rows, words = self.text_tokenizer, [], []
        for prompt, kind in zip(map(text.parse, prompts), conditional, strict=True):
            rows.append(prompt.ids if kind else text.unconditional(prompt.ids))
            words.append(prompt.words if kind else range(0))
        return Prefix.of_ids(self.words, rows, words)

    def prefix_key(self, prompt: str, conditional: bool) -> Any:
        """Unconditional twins of prompts of one length are equal: padding between the template's ends."""
        return prompt if conditional else len(self.text_tokenizer.parse(prompt).ids)

    def code_table(self) -> Tensor:
        return self.codes.weight

    def embed(self, table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.aligner(table[tokens])

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.head[1](self.head[0](self.norm(hidden)))

    def logits(self, table: Tensor, head_input: Tensor) -> Tensor:
        return self.head[2](head_input).float()
