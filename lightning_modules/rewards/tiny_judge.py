"""A vision-language judge of two layers and random weights, with which everything can be tried out on a CPU."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_modules.files import make_once
from lightning_modules.rewards.vision_language import Questions

# Like the published one, it opens an answer otherwise in the past than in the present (a space before the newline).
TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + ' ' }}
    {%- for part in message.content if part.type == 'image' %}{{- '<image>' }}{% endfor %}
    {%- for part in message.content if part.type == 'text' %}{{- '\\n' + part.text }}{% endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def _words() -> Tokenizer:
    """Byte-level BPE of the judge's questions, in which yes and no are words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    options: Any = {"vocab_size": 400, "special_tokens": special, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    bpe.train_from_iterator(["yes", "no"] * 50 + [Questions().clear, Questions().final] * 9, trainer)
    return bpe


def save_tiny_judge(folder: str) -> str:
    """Write a LLaVA-OneVision of 4 image tokens a view and of random weights, always the same; return its folder."""
    make_once(Path(folder), _write_judge)
    return folder


def _write_judge(folder: Path) -> None:
    import transformers

    special: Any = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    special["extra_special_tokens"] = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_words(), **special)
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    size = {"height": 28, "width": 28}
    image = transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints)
    video = transformers.LlavaOnevisionVideoProcessor(size=size)
    options: Any = {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "chat_template": TEMPLATE}
    transformers.LlavaOnevisionProcessor(image, tokenizer, video, **options).save_pretrained(folder)
    small: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids: Any = tokenizer.get_vocab()
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**small, image_size=28, patch_size=14, vision_use_head=False),
        text_config=transformers.Qwen2Config(**small, num_key_value_heads=2, vocab_size=len(tokenizer)),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=pinpoints,
    )
    generator = torch.Generator().manual_seed(0)
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # large enough for answers to differ between images
                weight.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
