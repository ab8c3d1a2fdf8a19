"""The paper's judge (arXiv 2501.13926): a vision-language model that answers yes or no about half-made images.

The original samples up to 100 tokens of an answer, one image at a time, and uses the first. Here P(yes) is read off
the logits of one forward pass over a batch, and a follow-up question costs only its own tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.backbone.checkpoint_folder import from_hub
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.broken_files import refuse_broken_folder
from lightning_modules.cache_key import class_name, digest, key_of, published_key
from lightning_modules.rewards.verifier import Critic, StepJudge

# The chat format of Qwen2, with its default system prompt; for checkpoints that come without a template.
CHATML = """\
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- for part in message.content %}{{- '<image>\n' if part.type == 'image' else part.text }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


@dataclass(frozen=True)
class Questions:
    """The questions to the judge; each must contain {prompt}, which stands for the prompt of the image.

    Attributes:
        clear: is an unfinished image clear enough to be judged?
        potential: asked after a yes to `clear`: can it still become what the prompt says?
        final: does a finished image show what the prompt says?
        critique: what in a finished image is not as the prompt says? Answered in words.
    """

    clear: str = (
        "This is an unfinished image, on its way to becoming: {prompt}. "
        "Can enough be made out already to tell what the finished image will show? Answer yes or no."
    )
    potential: str = (
        "If the image is completed from here, can it still come to match this description in every point: {prompt}? "
        "Answer yes or no."
    )
    final: str = (
        "This image was made from the description: {prompt}. "
        "Are all the objects, numbers, colors and positions in it as described? Answer yes or no."
    )
    critique: str = (
        "This image was made from the description: {prompt}. "
        "Say in one short sentence what in it is not as described, and how it should be."
    )

    def __post_init__(self) -> None:
        for name, question in asdict(self).items():
            if "{prompt}" not in question:
                raise ValueError(f"question {name!r} must contain {{prompt}}; it is {question!r}")


class VisionLanguageJudge(StepJudge, Critic):
    """A frozen LLaVA-OneVision that judges images; called as a reward, it gives P(yes) to the final question.

    As in the original, it sees an image whole, padded to a square, without the close-up views that LLaVA-OneVision adds
    to a lone image: 730 tokens instead of some 3700 for 512 x 512 pixels.

    Args:
        checkpoint: a folder, or OWNER/NAME on the hub, with safetensors; code that comes with it is not run.
        batch_size: images in a forward pass.
        yes, no: the answers, one token each; the probability of `yes` against `no` counts.
        critique_tokens: longest critique.

    Raises:
        ImportError, FileNotFoundError: transformers is not installed; there is no such checkpoint.
        ValueError: the model is of another kind, or an answer is not one token.
    """

    abilities = StepJudge.abilities | Critic.abilities

    def __init__(
        self,
        checkpoint: str,
        dtype: str = "bfloat16",
        batch_size: int = 8,
        questions: Questions = Questions(),
        yes: str = "yes",
        no: str = "no",
        critique_tokens: int = 40,
    ) -> None:
        try:
            from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise ImportError("VisionLanguageJudge needs transformers: pip install -e '.[showo]'") from error
        folder = Path(checkpoint)
        if not folder.is_dir():
            folder = from_hub(checkpoint, ["*.safetensors", "*.json", "*.jinja", "*.txt"])
        refuse_broken_folder(folder)
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != "llava_onevision":
            raise ValueError(f"judge {checkpoint!r} must be a llava_onevision model; it is a {kind} model")
        self.processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        self.questions, self.yes, self.no = questions, yes, no
        self.batch_size, self.critique_tokens = batch_size, critique_tokens
        self._answers = [self._token(yes), self._token(no)]
        self.processor.chat_template = self.processor.chat_template or CHATML
        full = self.processor.vision_feature_select_strategy == "full"  # else the first token of an image is dropped
        self._image = self.processor.image_token * (self.processor.num_image_tokens + full)  # one more ends the image
        options: Any = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, **options)
        self.model.eval().requires_grad_(False)

    def cache_key(self) -> dict[str, Any]:
        """The network, how it is shown images and conversations, and what it is asked."""
        tokenizer = json.loads(self.processor.tokenizer.backend_tokenizer.to_str())
        del tokenizer["padding"], tokenizer["truncation"]
        configs = self.model.config, self.model.generation_config, self.processor.image_processor
        network = {"class": class_name(self), "weights": fingerprint(self.model)}
        network["configs"] = digest([published_key(config.to_dict()) for config in configs])
        texts = {"tokenizer": digest(tokenizer), "template": digest(self.processor.chat_template), "image": self._image}
        asked = {"questions": key_of(self.questions), "answers": [self.yes, self.no]}
        return {**network, **texts, **asked, "critique_tokens": self.critique_tokens}

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        """P(yes) [B]: finished images [B, 3, H, W], in [0, 1], show what their prompts (GenEval metadata) say."""
        return self._judge(pixels, self._conversations([row["prompt"] for row in prompts], [self.questions.final]))[0]

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """P(yes) to both questions, [B] each; image and first question are read once for both."""
        first = [self.questions.clear]
        second = [*first, self.yes, self.questions.potential]
        clear, potential = self._judge(pixels, *(self._conversations(prompts, turns) for turns in (first, second)))
        return clear, potential

    @torch.no_grad()
    def critique(self, prompts: Sequence[str], pixels: Tensor) -> list[str]:
        """The likeliest answer, word by word, to what in finished images [B, 3, H, W], in [0, 1], is wrong."""
        self.model.to(pixels.device)
        texts: list[str] = []
        rows = self._conversations(prompts, [self.questions.critique])
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            ids = [torch.tensor(row, device=pixels.device) for row in rows[part]]
            inputs, mask = _left_padded(ids), _left_padded([torch.ones_like(row) for row in ids])
            text = {"input_ids": inputs, "attention_mask": mask, "pad_token_id": self.processor.tokenizer.pad_token_id}
            options = {"max_new_tokens": self.critique_tokens, "do_sample": False}
            answers = self.model.generate(**text, **self._views(pixels[part]), **options)
            texts += self.processor.batch_decode(answers[:, inputs.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _token(self, word: str) -> int:
        tokenizer = self.processor.tokenizer
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            tokens = tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(f"answer {word!r} must be one token of the judge's, not {tokens}")
        return ids[0]

    def _conversations(self, prompts: Sequence[str], turns: Sequence[str]) -> list[list[int]]:
        """Token ids of a conversation for each prompt, in turns of user (image first) and judge, up to an answer."""
        rows = []
        for prompt in prompts:
            parts = [[{"type": "text", "text": turn.replace("{prompt}", prompt)}] for turn in turns]
            parts[0].insert(0, {"type": "image"})
            chat = [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(parts)]
            text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            text = text.replace(self.processor.image_token, self._image)
            rows.append(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        return rows

    def _views(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [0, 1] -> what the model is given of B images, each seen whole."""
        # A lone image is also cut into views; so a batch passes for one conversation, of one image more than there are.
        images = (pixels * 255).to(torch.uint8)  # truncated, as Show-o's scripts do
        views = self.processor.image_processor([[*images, images[0]]], return_tensors="pt")
        return {
            "pixel_values": views["pixel_values"][:-1].to(self.model.device, self.model.dtype),
            "image_sizes": views["image_sizes"][:-1].to(self.model.device),
            "batch_num_images": views["batch_num_images"],
        }

    def _judge(self, pixels: Tensor, *asked: list[list[int]]) -> Tensor:
        """P(yes) [len(asked), B] as the next word of conversations about B images, given as token ids."""
        self.model.to(pixels.device)
        rows = list(zip(pixels, *asked, strict=True))
        answers = [pixels.new_empty(len(asked), 0, dtype=torch.float32)]
        for start in range(0, len(rows), self.batch_size):
            images, *conversations = zip(*rows[start : start + self.batch_size], strict=True)
            answers.append(self._read(torch.stack(images), conversations).to(pixels.device))
        return torch.cat(answers, 1)

    @torch.no_grad()
    def _read(self, pixels: Tensor, asked: Sequence[Sequence[list[int]]]) -> Tensor:
        """P(yes) as in `_judge`, for one batch, with a forward pass for each of the `asked`.

        It reads only what the conversation before did not have. Padding is on the left and masked, so all rows continue
        from one column of the cache.
        """
        device = self.model.device
        inputs: dict[str, Any] = self._views(pixels)
        read: Sequence[list[int]] = [[]] * len(pixels)
        mask = torch.zeros(len(pixels), 0, dtype=torch.int64, device=device)
        answers = []
        for rows in asked:
            pairs = list(zip(read, rows, strict=True))
            if excess := max(len(old) - _shared(old, row) for old, row in pairs):
                inputs["past_key_values"].crop(-excess)
            new = [torch.tensor(row[len(old) - excess :], device=device) for old, row in pairs]
            known = mask[:, : mask.shape[1] - excess]
            mask = torch.cat([known, _left_padded([torch.ones_like(row) for row in new])], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, known.shape[1] :]
            text = {"input_ids": _left_padded(new), "attention_mask": mask, "position_ids": positions}
            output = self.model(**text, **inputs, use_cache=True, logits_to_keep=1)
            answers.append(output.logits[:, -1, self._answers].float().softmax(-1)[:, 0])
            inputs, read = {"past_key_values": output.past_key_values}, rows
        return torch.stack(answers)


def _left_padded(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_side="left")


def _shared(old: list[int], new: list[int]) -> int:
    """The number of items that two lists have in common at their start."""
    return next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
