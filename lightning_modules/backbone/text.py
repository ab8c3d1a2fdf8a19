"""Prompts: tokenizers, and a small Transformer encoder over words."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lightning_modules.backbone.checkpoint_folder import from_hub
from lightning_modules.backbone.transformer import Transformer, TransformerConfig
from lightning_modules.backbone.words import known_words
from lightning_modules.broken_files import first_line, refuse_broken
from lightning_modules.cache_key import Keyed, class_name, digest


class TextTokenizer(Protocol):
    """A tokenizer of prompts."""

    size: int  # number of ids

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt; ValueError for one that cannot be read."""

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """The characters of a prompt that each of its ids stands for, start and end."""

    def cache_key(self) -> Any:
        """See `Keyed`."""


class DelimitedTokenizer(TextTokenizer, Protocol):
    """A tokenizer as mask-token decoders need it: its ids of prompts are without special ones."""

    end_of_text: int  # the id that opens and closes a prompt


def word_spans(prompt: str) -> list[tuple[int, int]]:
    """The characters of each word of a prompt, start and end."""
    return [word.span() for word in re.finditer(r"\S+", prompt)]


def refuse_long(prompt: str, length: int, most: int | None) -> None:
    """Raise ValueError for a prompt of more tokens than the configured `max_text`."""
    if most is not None and length > most:
        found = f"prompt {prompt[:40] + '...'!r} has {length} tokens"
        raise ValueError(f"{found}, more than the {most} of decoder.module.text_tokenizer.max_text")


def read_tokenizer(checkpoint: str) -> Tokenizer:
    """Read the `tokenizer.json` of a folder, or of OWNER/NAME on the hub.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is broken.
    """
    file = Path(checkpoint) / "tokenizer.json"
    if not file.is_file():
        if file.parent.exists():
            raise FileNotFoundError(f"text tokenizer {checkpoint!r}: the folder has no tokenizer.json")
        file = from_hub(checkpoint, ["tokenizer.json"]) / "tokenizer.json"
    refuse_broken(file)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"text tokenizer: {file} is not a tokenizer: {first_line(error)}") from error


class PublishedTokenizer(Keyed):
    """A tokenizer as published with a language model.

    Args:
        checkpoint: a folder with `tokenizer.json`, or OWNER/NAME on the hub (Show-o's: microsoft/phi-1_5).
        end_of_text: the token that opens and closes a prompt.
        max_text: longest prompt, in tokens; longer ones are refused. null: of any length.

    Raises:
        FileNotFoundError, ValueError: there is no `tokenizer.json`; it is broken, or has no such token.
    """

    def __init__(self, checkpoint: str, end_of_text: str = "<|endoftext|>", max_text: int | None = None) -> None:
        self._checkpoint, self._tokenizer, self.max_text = checkpoint, read_tokenizer(checkpoint), max_text
        self.size, self.end_of_text = self._tokenizer.get_vocab_size(), self.id_of(end_of_text)

    def id_of(self, token: str) -> int:
        """The id of a token; ValueError if there is no such token."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"text tokenizer {self._checkpoint!r} has no token {token!r}")
        return found

    def cache_key(self) -> dict[str, Any]:
        content = digest(self._tokenizer.to_str())
        sizes = {"end_of_text": self.end_of_text, "max_text": self.max_text}
        return {"class": class_name(self), "tokenizer": content} | sizes

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        rows = [entry.ids for entry in self._tokenizer.encode_batch(list(prompts), add_special_tokens=False)]
        for prompt, ids in zip(prompts, rows, strict=True):
            refuse_long(prompt, len(ids), self.max_text)
        return rows

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """The characters of each token, without the space that many begin with."""
        offsets = self._tokenizer.encode(prompt, add_special_tokens=False).offsets
        return [(end - len(prompt[start:end].lstrip()), end) for start, end in offsets]


class WordTokenizer(Keyed):
    """Maps the words of a prompt to ids; id 0 is padding, and a prompt of padding alone is the empty prompt."""

    end_of_text = 0  # padding, which no word is

    def __init__(self, vocabulary: Sequence[str], max_words: int) -> None:
        self.vocabulary, self.max_words = list(vocabulary), max_words
        self.size = len(self.vocabulary) + 1
        self._ids = {word: i + 1 for i, word in enumerate(self.vocabulary)}

    def cache_key(self) -> dict[str, Any]:
        return {"class": class_name(self), "vocabulary": digest(self.vocabulary), "max_words": self.max_words}

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Word ids of each prompt, without padding."""
        return [[word for word in row if word] for row in self(prompts).tolist()]

    spans = staticmethod(word_spans)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Word ids, int64 [B, max_words]; ValueError for unknown words, or more than `max_words`."""
        rows = []
        for prompt in prompts:
            words = known_words(prompt, self._ids, self.max_words)
            rows.append([self._ids[word] for word in words] + [0] * (self.max_words - len(words)))
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.max_words)


class PromptEncoder(nn.Module):
    """Bidirectional Transformer over the words of a prompt; padding is attended to like a word."""

    def __init__(self, tokenizer: WordTokenizer, config: TransformerConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(tokenizer.size, config.dim)
        self.positions = nn.Parameter(torch.zeros(tokenizer.max_words, config.dim))
        self.transformer = Transformer(config)
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, word_ids: Tensor) -> Tensor:
        """Word ids [B, L] -> prompt embeddings [B, L, dim]."""
        return self.norm(self.transformer(self.words(word_ids) + self.positions, causal=False)[-1])

    def read(self, word_ids: Tensor, encoded: Tensor) -> Tensor:
        """Features of a prompt for verifiers: each word by itself beside its embedding in the prompt, [B, L, 2 dim].

        The latter can be so much of a mix with its neighbours that PARM does not find the word for what it sees.
        """
        words = self.words(word_ids)
        return torch.cat([nn.functional.layer_norm(words, words.shape[-1:]), encoded], dim=-1)
