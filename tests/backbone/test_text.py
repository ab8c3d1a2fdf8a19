"""Published text tokenizers."""

from pathlib import Path

import pytest

from lightning_modules.backbone.text import PublishedTokenizer
from tests.helpers.models import write_tokenizer


def test_ids_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = PublishedTokenizer(write_tokenizer(tmp_path, ["<|endoftext|>", "a", "photo", "of"]))
    assert tokenizer.encode(["a photo", "", "of a"]) == [[1, 2], [], [3, 1]]
    assert (tokenizer.size, tokenizer.end_of_text) == (4, 0)


def test_a_tokenizer_without_the_closing_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no token '<\|endoftext\|>'"):
        PublishedTokenizer(write_tokenizer(tmp_path, ["unknown", "a"]))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder has no tokenizer"):
        PublishedTokenizer(str(tmp_path))


def test_what_is_neither_here_nor_on_the_hub_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither a folder nor to be had from the Hugging"):
        PublishedTokenizer("nobody/nothing")
