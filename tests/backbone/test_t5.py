"""The text side of LlamaGen on a tiny random T5, against transformers' own padded and masked batches."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_modules.backbone.caption import clean_caption
from lightning_modules.backbone.t5 import T5Text
from lightning_modules.backbone.tiny_t5 import save_tiny_t5

CPU = torch.device("cpu")
PROMPTS = ["A Red cube, (left of) a DOG", "", "猫", "two cats " * 20, "a photo of a bench"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_t5(str(tmp_path_factory.mktemp("t5") / "tiny"))


@pytest.fixture
def text(folder: str) -> T5Text:
    return T5Text(folder, width=24, max_tokens=40, dtype="float32")


@pytest.mark.filterwarnings("ignore:prompts of more than")
def test_features_are_those_of_transformers_own_padded_batch(folder: str, text: T5Text) -> None:
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token="<pad>")
    cleaned = [clean_caption(prompt) for prompt in PROMPTS]
    cut = {"max_length": 40, "padding": "max_length", "truncation": True}
    batch = tokenizer(cleaned, **cut, return_tensors="pt")
    model = T5EncoderModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[1] == lengths[2] == 1 and lengths[3] == 40
    found = text.features(PROMPTS, CPU)
    assert [len(rows) for rows in found] == lengths
    for rows, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(rows, wanted[: len(rows)], atol=1e-5, rtol=0)
    ids = [row[: n - 1] for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    assert text.encode(PROMPTS) == ids


def test_each_prompt_is_encoded_once_and_by_itself(text: T5Text) -> None:
    passes: list[list[int]] = []
    text.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(list(kwargs["input_ids"].shape)), with_kwargs=True
    )
    first = text.features(["a dog", "a cat and a dog", "a dog"], CPU)
    again = text.features(["a cat and a dog", "a dog"], CPU)
    assert passes == [[1, 7], [1, 17]]
    assert torch.equal(first[0], again[1]) and torch.equal(first[1], again[0])


def test_features_made_while_evaluating_can_be_trained_on(text: T5Text) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (features,) = text.features(["a dog"], CPU)
    assert features.dtype == torch.float32
    weight = torch.ones(24, requires_grad=True)
    (features @ weight).sum().backward()
    assert weight.grad is not None


def test_long_prompts_lose_their_end_with_a_warning(text: T5Text) -> None:
    with pytest.warns(UserWarning, match="prompts of more than 39 text tokens lose their end"):
        (ids,) = text.encode(["word " * 2000])
    assert len(ids) == 39
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(text.encode(["x" * 38])[0]) == 39  # T5 puts a token before each word


@pytest.mark.parametrize("prompt", ["a red cube", " A (Red)  cube & 猫 ball", ""])
def test_spans_are_those_of_the_prompt_itself(text: T5Text, prompt: str) -> None:
    spans = text.spans(prompt)
    assert len(spans) == len(text.encode([prompt])[0])
    assert spans == sorted(spans)
    covered = sorted({place for span in spans for place in range(*span)})
    assert "".join(prompt[place] for place in covered).lower() == clean_caption(prompt).replace(" ", "")


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Path]:
    yield Path(save_tiny_t5(str(tmp_path / "t5")))


def change(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_another_t5_is_refused_before_its_weights_are_read(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="is a T5 of width 24, but this LlamaGen was trained on features of width 2048"
    ):
        T5Text(str(broken))
    change(broken, model_type="mt5")
    with pytest.raises(ValueError, match="must be a t5 model; it is a mt5 model"):
        T5Text(str(broken), width=24)


def test_weights_that_are_missing_are_named(broken: Path) -> None:
    change(broken, num_layers=3)
    with pytest.raises(ValueError, match=r"has no tensor 'encoder\.block\.2\."):
        T5Text(str(broken), width=24)


def test_without_a_tokenizer_a_sentence_says_so(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="the folder has no tokenizer"):
        T5Text(str(broken), width=24)
