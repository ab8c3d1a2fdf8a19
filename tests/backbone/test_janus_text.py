"""Prompts of Janus: templates, ids by the names of tokens, spans, and tokenizers that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from lightning_modules.backbone.janus_text import JanusTokenizer
from lightning_modules.backbone.tiny_text_tokenizer import save_tiny_text_tokenizer
from tests.helpers.janus import BOI, BOS, PAD, SPECIAL

PROMPTS = ["a photo of a dog", "  Zwei Bären,\nnebeneinander. ", "3d; x=(1/2)", "\u732b"]
# A user's turn and the beginning of the answer, as the published template writes them.
CHAT = "{% for m in messages %}<|User|>: {{ m.content[0].text | trim }}\n\n{% endfor %}<|Assistant|>:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_text_tokenizer(str(tmp_path_factory.mktemp("text") / "tokenizer"), SPECIAL)


def read(folder: str, ids: list[int]) -> str:
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "prompt", "chat"),
    [
        ("janus_pro", " a dog. ", "<|User|>: a dog.\n\n<|Assistant|>:"),
        ("janus", "a dog.", "User: a dog.\n\nAssistant:"),
        ("janus_pro", " ", "<|User|>:<|Assistant|>:"),
        ("janus", "", "User:Assistant:"),
    ],
)
def test_templates(folder: str, template: Any, prompt: str, chat: str) -> None:
    tokenizer = JanusTokenizer(folder, template)
    ids = tokenizer.encode([prompt])[0]
    assert read(folder, ids) == f"{BOS}{chat}{BOI}"
    assert ids.count(tokenizer.bos) == ids.count(tokenizer.boi) == 1
    unconditional = tokenizer.unconditional(ids)
    assert read(folder, unconditional) == BOS + PAD * (len(ids) - 2) + BOI


def test_ids_are_those_of_transformers_processor(folder: str) -> None:
    from transformers import JanusImageProcessor, JanusProcessor, PreTrainedTokenizerFast

    inner = Tokenizer.from_file(f"{folder}/tokenizer.json")
    bos = inner.token_to_id(BOS)
    inner.post_processor = TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, bos)])  # type: ignore[assignment]
    names = {"image_token": "<image_placeholder>", "boi_token": BOI, "eoi_token": "<end_of_image>"}
    special = {"bos_token": BOS, "pad_token": PAD, "extra_special_tokens": names}
    theirs: Any = JanusProcessor(
        JanusImageProcessor(), PreTrainedTokenizerFast(tokenizer_object=inner, **special), chat_template=CHAT
    )
    turns = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in PROMPTS]
    texts = theirs.apply_chat_template(turns, add_generation_prompt=True)
    ours = JanusTokenizer(folder).encode(PROMPTS)
    for text, prompt_ids in zip(texts, ours, strict=True):
        assert theirs(text=text, generation_mode="image").input_ids.tolist() == [prompt_ids]


def test_spans_are_of_the_prompt_alone(folder: str) -> None:
    tokenizer = JanusTokenizer(folder)
    for prompt in (*PROMPTS, "User: <|User|>"):
        parsed = tokenizer.parse(prompt)
        assert len(parsed.words) == len(parsed.spans)
        whole = read(folder, parsed.ids[parsed.words.start : parsed.words.stop])
        assert whole == prompt.strip()
        assert {i for a, b in parsed.spans for i in range(a, b)} == {i for i, c in enumerate(prompt) if not c.isspace()}
    assert tokenizer.spans("") == []
    assert not tokenizer.parse("").words


def test_long_prompts_are_refused(folder: str) -> None:
    tokenizer = JanusTokenizer(folder, max_text=8)
    assert len(tokenizer.parse("12345678").words) == 8
    with pytest.raises(ValueError, match=r"prompt 'dog dog .*\.\.\.' has 7999 tokens, more than the 8 of decoder\.mod"):
        tokenizer.encode([" ".join(["dog"] * 2000)])


@pytest.mark.parametrize("token", [BOS, PAD, BOI])
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path: Path, token: str) -> None:
    folder = save_tiny_text_tokenizer(str(tmp_path / "text"), [name for name in SPECIAL if name != token])
    with pytest.raises(ValueError, match=rf"has no token '{token}', so it is not a Janus's"):
        JanusTokenizer(folder)


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path, folder: str) -> None:
    inner = Tokenizer.from_file(f"{folder}/tokenizer.json")
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(words)  # type: ignore[assignment]
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="reads 'hello world' as 'helloworld'"):
        JanusTokenizer(str(tmp_path))


def test_the_other_template_is_refused_where_it_can_be_known(tmp_path: Path, folder: str) -> None:
    named = tmp_path / "Janus-1.3B"
    named.symlink_to(folder)
    with pytest.raises(ValueError, match="is of a Janus with template=janus, not janus_pro"):
        JanusTokenizer(str(named))
    with pytest.raises(ValueError, match="'deepseek-ai/Janus-Pro-7B' is of a Janus with template=janus_pro, not janus"):
        JanusTokenizer("deepseek-ai/Janus-Pro-7B", "janus")
    for i, (file, content) in enumerate(
        {"chat_template.jinja": CHAT, "chat_template.json": json.dumps({"chat_template": CHAT})}.items()
    ):
        chatting = Path(save_tiny_text_tokenizer(str(tmp_path / f"text{i}"), SPECIAL))
        (chatting / file).write_text(content)
        with pytest.raises(ValueError, match="with template=janus_pro, not janus"):
            JanusTokenizer(str(chatting), "janus")
        JanusTokenizer(str(chatting))
        (chatting / file).write_text(content.replace("<|User|>", "User"))
        with pytest.raises(ValueError, match="with template=janus, not janus_pro"):
            JanusTokenizer(str(chatting))
    with pytest.raises(ValueError, match=r"text_tokenizer\.template is one of janus_pro, janus, not 'pro'"):
        JanusTokenizer(folder, "pro")  # type: ignore[arg-type]


def test_the_key_names_what_decides_ids(folder: str) -> None:
    keys = [JanusTokenizer(folder, *rest).cache_key() for rest in ((), ("janus",), ("janus_pro", 12))]
    assert len({json.dumps(key) for key in keys}) == 3
