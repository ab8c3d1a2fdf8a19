"""Published text tokenizers made small: every byte is a token."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_modules.files import make_once


def save_tiny_text_tokenizer(folder: str, special: Sequence[str] = ("<|endoftext|>",)) -> str:
    """Write a byte-level `tokenizer.json`, as Phi and Janus have it, with no merges, and return its folder."""
    make_once(Path(folder), partial(_write, special=list(special)))
    return folder


def _write(folder: Path, special: list[str]) -> None:
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
