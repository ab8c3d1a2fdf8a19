"""Janus's prompts: a chat of one turn, which ends where the image begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from lightning_modules.backbone.janus_template import ROLES, Template, check_name
from lightning_modules.backbone.text import read_tokenizer, refuse_long
from lightning_modules.cache_key import Keyed, class_name, digest

_BOS, _PAD, _BOI = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5c\u2581pad\u2581\uff5c>", "<begin_of_image>"
_SAMPLE = "hello world"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as Janus reads it."""

    ids: list[int]  # from the beginning of the sentence to that of the image
    words: range  # positions of the prompt's own tokens among them
    spans: list[tuple[int, int]]  # the characters of the prompt that each of these stands for, start and end


class JanusTokenizer(Keyed):
    """A tokenizer as published with a Janus, and the template that this Janus was trained with.

    Ids of special tokens differ between checkpoints, so they are looked up.

    Args:
        checkpoint: a folder with `tokenizer.json`, or OWNER/NAME on the hub.
        template: of Janus-Pro, or of the first Janus (1.3B), whose roles are plain words.
        max_text: longest prompt, in tokens of its own; longer ones are refused.

    Raises:
        FileNotFoundError: there is no `tokenizer.json`.
        ValueError: it is broken, lacks a special token, loses spaces, or is of a Janus with the other template.
    """

    name_check: ClassVar[str] = "lightning_modules.backbone.janus_template.check_name"

    def __init__(self, checkpoint: str, template: Template = "janus_pro", max_text: int = 128) -> None:
        if template not in get_args(Template):
            raise ValueError(f"text_tokenizer.template is one of {', '.join(get_args(Template))}, not {template!r}")
        check_name(checkpoint, {"template": template})
        self._tokenizer = read_tokenizer(checkpoint)
        ids: list[int] = []
        for token in (_BOS, _PAD, _BOI):
            if (found := self._tokenizer.token_to_id(token)) is None:
                raise ValueError(f"text tokenizer {checkpoint!r} has no token {token!r}, so it is not a Janus's")
            ids.append(found)
        read = self._tokenizer.decode(self._tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)
        if read != _SAMPLE:
            raise ValueError(f"text tokenizer {checkpoint!r} reads {_SAMPLE!r} as {read!r}: get Janus's tokenizer.json")
        self.template, self.max_text = template, max_text
        self.bos, self.pad, self.boi = ids
        self.size = self._tokenizer.get_vocab_size()

    def cache_key(self) -> dict[str, Any]:
        content = digest(self._tokenizer.to_str())
        return {"class": class_name(self), "tokenizer": content, "template": self.template, "max_text": self.max_text}

    def parse(self, prompt: str) -> EncodedPrompt:
        """Read a prompt in its template; ValueError if it is too long."""
        user, assistant = ROLES[self.template]
        text, start = prompt.strip(), len(user) + 2
        # As the original has it, an empty turn leaves out the blanks as well; transformers' template keeps them.
        chat = f"{user}: {text}\n\n{assistant}:" if text else f"{user}:{assistant}:"
        encoded = self._tokenizer.encode(chat, add_special_tokens=False)
        end, shift = start + len(text), len(prompt) - len(prompt.lstrip()) - start
        own = [i for i, (a, b) in enumerate(encoded.offsets) if max(a, start) < min(b, end)]
        refuse_long(prompt, len(own), self.max_text)
        words = range(own[0], own[-1] + 1) if own else range(0)
        spans = [(max(a, start) + shift, min(b, end) + shift) for a, b in encoded.offsets[words.start : words.stop]]
        spans = [(b - len(prompt[a:b].lstrip()), b) for a, b in spans]
        return EncodedPrompt([self.bos, *encoded.ids, self.boi], range(words.start + 1, words.stop + 1), spans)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt in its template, special ones included."""
        return [self.parse(prompt).ids for prompt in prompts]

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """The prompt without content that guidance compares with one of these ids: padding, which is attended to."""
        return [ids[0], *[self.pad] * (len(ids) - 2), ids[-1]]

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        return self.parse(prompt).spans
