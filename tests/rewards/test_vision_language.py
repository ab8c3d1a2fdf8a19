"""The vision-language judge on a tiny random LLaVA-OneVision: against transformers itself, cached and in batches."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_modules.rewards.geneval_reward import to_uint8
from lightning_modules.rewards.tiny_judge import TEMPLATE, save_tiny_judge
from lightning_modules.rewards.vision_language import CHATML, Questions, VisionLanguageJudge

transformers = pytest.importorskip("transformers")

CLEAR, POTENTIAL = Questions().clear, Questions().potential
PROMPTS = [
    "a red star",
    "a photo of two green circles and a heart, on the left of a ring",
    "a cross",
    "three blue stars",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_judge(str(tmp_path_factory.mktemp("judge") / "tiny"))


@pytest.fixture(scope="module")
def judge(checkpoint: str) -> VisionLanguageJudge:
    return VisionLanguageJudge(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def conversation(*turns: str) -> list[dict]:
    """What transformers' chat templates take."""
    texts = [[{"type": "text", "text": turn}] for turn in turns]
    texts[0].insert(0, {"type": "image"})
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def clear_of(judge: VisionLanguageJudge, pixels: Tensor) -> Tensor:
    """P(clear) of images with the prompts."""
    return judge.clear_and_potential(PROMPTS, pixels)[0]


def direct(checkpoint: str, conversations: list[list[dict]], pixels: Tensor, template: str | None = None) -> Tensor:
    """P(yes) [B] by transformers' own processor, from PIL images, and model, with no cache; for two images or more."""
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    texts = processor.apply_chat_template(conversations, template, add_generation_prompt=True)
    images = [Image.fromarray(image) for image in to_uint8(pixels)]
    inputs = processor(text=texts, images=[images], padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    return logits[:, processor.tokenizer.convert_tokens_to_ids(["yes", "no"])].softmax(-1)[:, 0]


def conversations(*questions: str) -> list[list[dict]]:
    """The same questions about each prompt, all answered with yes but the last."""
    turns = [turn for question in questions for turn in ("yes", question)][1:]
    return [conversation(*(turn.replace("{prompt}", prompt) for turn in turns)) for prompt in PROMPTS]


def test_answers_are_those_of_transformers(judge: VisionLanguageJudge, checkpoint: str, pixels: Tensor) -> None:
    clear, potential = judge.clear_and_potential(PROMPTS, pixels)
    expected = direct(checkpoint, conversations(CLEAR), pixels)
    torch.testing.assert_close(clear, expected, atol=1e-5, rtol=0)
    expected = direct(checkpoint, conversations(CLEAR, POTENTIAL), pixels)
    torch.testing.assert_close(potential, expected, atol=1e-5, rtol=0)
    rows = [{"tag": "any", "prompt": prompt} for prompt in PROMPTS]
    expected = direct(checkpoint, conversations(Questions().final), pixels)
    torch.testing.assert_close(judge(rows, pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", [TEMPLATE, CHATML])
def test_the_second_question_reuses_what_was_read_for_the_first(
    judge: VisionLanguageJudge, checkpoint: str, pixels: Tensor, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge.processor, "chat_template", template)
    forward, widths = judge.model.forward, []

    def watched(**inputs: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(judge.model, "forward", watched)
    asked = [conversations(*questions) for questions in ((CLEAR,), (CLEAR, POTENTIAL))]
    apart = tuple(direct(checkpoint, each, pixels, template) for each in asked)
    together = judge.clear_and_potential(PROMPTS, pixels)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    texts = [judge.processor.apply_chat_template(each, add_generation_prompt=True) for each in asked]
    clear, potential = (max(map(len, judge.processor.tokenizer(each)["input_ids"])) for each in texts)
    first, second = widths
    assert first > clear  # an image is several tokens
    assert second <= potential - clear + 5  # its own tokens, and those of the template that differ in the past


def test_an_image_is_judged_alike_alone_and_in_a_batch(judge: VisionLanguageJudge, pixels: Tensor) -> None:
    together = torch.stack(judge.clear_and_potential(PROMPTS, pixels))
    alone = [torch.stack(judge.clear_and_potential([PROMPTS[i]], pixels[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone, 1), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_matter(
    judge: VisionLanguageJudge, pixels: Tensor, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = clear_of(judge, pixels)
    monkeypatch.setattr(judge, "batch_size", batch_size)
    torch.testing.assert_close(clear_of(judge, pixels), expected, atol=1e-5, rtol=0)


def test_prompts_and_images_matter(judge: VisionLanguageJudge, pixels: Tensor) -> None:
    same_image = judge.clear_and_potential(PROMPTS, pixels[:1].expand(4, -1, -1, -1))[1]
    same_prompt = judge.clear_and_potential(PROMPTS[:1] * 4, pixels)[1]
    for values in (same_image, same_prompt):
        assert values.shape == (4,)
        assert values.std() > 1e-3
        assert ((values > 0) & (values < 1)).all()


def test_images_are_padded_to_a_square(judge: VisionLanguageJudge, pixels: Tensor) -> None:
    wide, square = pixels[:, :, 4:-4], pixels.clone()
    grey = torch.tensor(judge.processor.image_processor.image_mean)[:, None, None]
    square[:, :, :4] = square[:, :, -4:] = ((grey * 255).floor() + 0.5) / 255
    torch.testing.assert_close(clear_of(judge, wide), clear_of(judge, square), atol=1e-5, rtol=0)
    assert not torch.allclose(clear_of(judge, wide), clear_of(judge, pixels), atol=1e-3)


def test_no_images_no_answers(judge: VisionLanguageJudge, pixels: Tensor) -> None:
    assert judge([], pixels[:0]).shape == (0,)


def test_a_checkpoint_without_chat_template_is_asked_in_chatml(judge: VisionLanguageJudge) -> None:
    messages = conversation("A?", "yes", "B?")
    text = judge.processor.apply_chat_template(messages, chat_template=CHATML, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nA?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_half_precision_stays_close(judge: VisionLanguageJudge, checkpoint: str, pixels: Tensor) -> None:
    half = VisionLanguageJudge(checkpoint)
    assert half.model.dtype == torch.bfloat16
    torch.testing.assert_close(clear_of(half, pixels), clear_of(judge, pixels), atol=0.1, rtol=0)


def test_what_is_refused(
    judge: VisionLanguageJudge, checkpoint: str, pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"question 'final' must contain \{prompt\}; it is 'Is it good\?'"):
        Questions(final="Is it good?")
    with pytest.raises(ValueError, match="answer 'perhaps' must be one token of the judge's, not \\['p"):
        VisionLanguageJudge(checkpoint, no="perhaps")
    with pytest.raises(FileNotFoundError, match="nowhere' is neither a folder nor to be had from the Hugging Face hub"):
        VisionLanguageJudge(str(tmp_path / "nowhere"))
    transformers.Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a llava_onevision model; it is a qwen2 model"):
        VisionLanguageJudge(str(tmp_path))
    with pytest.raises(ValueError, match="shorter"):
        judge.clear_and_potential(PROMPTS[:3], pixels)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install -e '\.\[showo\]'"):
        VisionLanguageJudge(checkpoint)


def test_a_critique_is_what_transformers_generates(judge: VisionLanguageJudge, checkpoint: str, pixels: Tensor) -> None:
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    asked = [conversation(judge.questions.critique.replace("{prompt}", prompt)) for prompt in PROMPTS]
    texts = processor.apply_chat_template(asked, add_generation_prompt=True)
    images = [Image.fromarray(image) for image in to_uint8(pixels)]
    inputs = processor(text=texts, images=[images], padding=True, padding_side="left", return_tensors="pt")
    answers = model.generate(**inputs, max_new_tokens=judge.critique_tokens, do_sample=False)
    expected = processor.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = judge.critique(PROMPTS, pixels)
    assert found == [text.strip() for text in expected]
    assert len(set(found)) > 1
    assert judge.critique(PROMPTS[:1], pixels[:1]) == found[:1]
