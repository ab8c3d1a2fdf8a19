"""LlamaGen (arXiv 2406.06525), text to image: T5's features of a caption, then image tokens, by a Llama of its own.

Quirks of the published weights that have to be kept: text positions have neither identity nor rotation but zeros for
their queries and keys, so they are attended to evenly; and the unconditional row has as many text positions as the
prompt, from an embedding that was never trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.llamagen_files import check_name, of_other_images
from lightning_modules.backbone.loading import CheckpointReader, Layout
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.next_token_network import Prefix
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.t5 import T5Text
from lightning_modules.backbone.transformer import Transformer, TransformerConfig

_TABLE = "freqs_cis"  # what some files hold of the rotary embeddings, one row a position
_STEMS = {  # ours -> the original names
    "caption.0": ["cls_embedding.cap_proj.fc1"],
    "caption.2": ["cls_embedding.cap_proj.fc2"],
    "codes": ["tok_embeddings"],
    "norm": ["norm"],
    "head": ["output"],
    "attention_norm": ["attention_norm"],
    "attention.qkv": ["attention.wqkv"],
    "attention.proj": ["attention.wo"],
    "mlp_norm": ["ffn_norm"],
    "mlp.0": ["feed_forward.w1", "feed_forward.w3"],
    "mlp.2": ["feed_forward.w2"],
}


class LlamaGen(NextTokenDecoder):
    """Reads the features of a caption on the left of the image; see `NextTokenNetwork` for the other arguments.

    Args:
        text_tokenizer: T5, which gives the features, of at most as many tokens as the model was trained with.
    """

    name_check: ClassVar[str] = "lightning_modules.backbone.llamagen_files.check_name"
    text_tokenizer: T5Text
    unconditional: Tensor

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: T5Text,
        transformer: TransformerConfig,
        feature_layers: Sequence[int] = (),
        compiled: bool = False,
    ) -> None:
        super().__init__(image_tokenizer, transformer, feature_layers, compiled)
        dim, width, codes = transformer.dim, text_tokenizer.width, image_tokenizer.codebook_size
        self.text_tokenizer = text_tokenizer
        first, last = nn.Linear(width, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.caption = nn.Sequential(first, nn.GELU(approximate="tanh"), last)
        # It stays as it was initialised, so it has to come with the weights.
        self.register_buffer("unconditional", torch.randn(text_tokenizer.max_tokens, width) * width**-0.5)
        self.codes = nn.Embedding(codes, dim)
        self.transformer, self.norm = Transformer(transformer), transformer.norm()
        self.head = Linear(dim, codes, bias=False)
        for layer in (first, last, self.codes, self.head):
            nn.init.normal_(layer.weight, std=0.02)

    @staticmethod
    def stored_as(key: str) -> list[str]:
        """The original tensors that, joined along their first dimension, are our tensor `key`."""
        if key == "unconditional":
            return ["cls_embedding.uncond_embedding"]
        key, layer = key.removesuffix(".weight"), ""
        if key.startswith("transformer.blocks."):
            _, _, index, key = key.split(".", 3)
            layer = f"layers.{index}."
        return [f"{layer}{original}.weight" for original in _STEMS[key]]

    layouts = (Layout(stored_as, f"{_TABLE}$"),)

    def check_tensors(self, stored: CheckpointReader, file: Path) -> None:
        """Raise ValueError if a file, by its name or its rotary table, is a model for images of another size."""
        pixels = self.image_tokenizer.image_size
        check_name(file.name, {}, pixels)
        if _TABLE in stored.keys:
            tokens = stored.shape([_TABLE])[0] - self.text_tokenizer.max_tokens
            if tokens != self.num_tokens:
                raise of_other_images(file, f"{tokens} tokens", f"{pixels} have {self.num_tokens} tokens")

    @property
    def max_words(self) -> int:
        return self.text_tokenizer.max_tokens - 1

    @property
    def prefix_length(self) -> int:
        return 20  # a caption of GenEval's, or one a little longer

    def prefix(self, prompts: Sequence[str], conditional: Sequence[bool]) -> Prefix:
        """Features of captions; a twin has as many of the last rows of the unconditional embedding."""
        device = self.head.weight.device
        features = self.text_tokenizer.features(prompts, device)
        rows = [
            each.to(self.unconditional) if kind else self.unconditional[-len(each) :]
            for each, kind in zip(features, conditional, strict=True)
        ]
        embeddings = self.caption(pad_sequence(rows, batch_first=True, padding_side="left"))
        length = embeddings.shape[1]
        padding = [length - len(row) for row in rows]
        words = [range(pad, length - 1) if kind else range(0) for pad, kind in zip(padding, conditional, strict=True)]
        return Prefix(embeddings, torch.tensor(padding), words)

    def code_table(self) -> Tensor:
        return self.codes.weight

    def embed(self, table: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        return table[tokens]

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def logits(self, table: Tensor, head_input: Tensor) -> Tensor:
        return self.head(head_input).float()

    def rotary(self, positions: Tensor) -> Rotary:
        """Half of the pairs turn by the row, the others by the column; of text positions nothing is left."""
        grid, rotated = self.image_tokenizer.grid, self.transformer.config.head_dim // 2
        sides = [Rotary.at(index, rotated) for index in (positions // grid, positions % grid)]
        image = positions[:, None] >= 0
        cos, sin = (torch.cat(parts, -1) * image for parts in ([r.cos for r in sides], [r.sin for r in sides]))
        return Rotary(cos, sin, interleaved=True)

    @property
    def text_bytes(self) -> int:
        return self.text_tokenizer.bytes
