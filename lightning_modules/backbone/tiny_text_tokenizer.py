"""A published text tokenizer made small: every byte is a token."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_modules.files import make_once


def save_tiny_text_tokenizer(folder: str) -> str:
    """Write `tokenizer.json` as Phi has it, with no merges, and return its folder."""
    make_once(Path(folder), _write)
    return folder


def _write(folder: Path) -> None:
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:1])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
