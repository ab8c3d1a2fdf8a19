"""Published text tokenizers made small: every byte is a token."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_modules.files import make_once


def save_tiny_text_tokenizer(folder: str, special: Sequence[str] = ("<|endoftext|>",), codes: int = 0) -> str:
    """Write a byte-level `tokenizer.json`, as Phi, Janus and Emu3 have it, with no merges, and return its folder.

    Its first ids are those of special tokens, and of codes of images under Emu3's names.
    """
    first = [*special, *(f"<|visual token {code:06d}|>" for code in range(codes))]
    make_once(Path(folder), partial(_write, special=first))
    return folder


def _write(folder: Path, special: list[str]) -> None:
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
