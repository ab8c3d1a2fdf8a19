"""FLAN-T5 as LlamaGen reads prompts (FoundationVision/LlamaGen, arXiv 2406.06525): cleaned, cut, and encoded once."""

import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.backbone.caption import clean_caption
from lightning_modules.backbone.checkpoint_folder import from_hub
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.text import PublishedTokenizer
from lightning_modules.broken_files import read_settings, refuse_broken_folder
from lightning_modules.cache_key import Keyed, class_name, digest, published_key

_KEPT = 4096  # prompts whose features are kept, at most 0.5 MB each


class T5Text(Keyed):
    """A frozen encoder of T5's make, with its tokenizer. It belongs to no module: it is neither trained nor exported.

    Args:
        checkpoint: a folder with tokenizer.json, config.json and safetensors, or OWNER/NAME on the hub.
        width: of its features, which the decoder was trained on.
        max_tokens: text tokens of a prompt with the closing one; longer prompts lose their end.
        dtype: of the network, as published bfloat16.

    Raises:
        ImportError, FileNotFoundError: transformers is not installed; a file is missing.
        ValueError: it is another kind of model, or one of another width, or lacks weights.
    """

    def __init__(
        self,
        checkpoint: str = "google/flan-t5-xl",
        width: int = 2048,
        max_tokens: int = 120,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        try:
            from transformers import T5EncoderModel
        except ImportError as error:
            raise ImportError("T5Text needs transformers: pip install -e '.[llamagen]'") from error
        folder = Path(checkpoint)
        if not folder.is_dir():
            folder = from_hub(checkpoint, ["*.safetensors", "*.json"])
        refuse_broken_folder(folder)
        config = read_settings(folder / "config.json")
        if (kind := config.get("model_type")) != "t5":
            raise ValueError(f"text encoder {checkpoint!r} must be a t5 model; it is a {kind} model")
        if (stored := config.get("d_model")) != width:
            wanted = f"this LlamaGen was trained on features of width {width} (google/flan-t5-xl has 2048)"
            raise ValueError(f"text encoder {checkpoint!r} is a T5 of width {stored}, but {wanted}")
        self._tokenizer = PublishedTokenizer(str(folder), end_of_text="</s>")
        self.size, self.end_of_text = self._tokenizer.size, self._tokenizer.end_of_text
        self.width, self.max_tokens = width, max_tokens
        load: Any = T5EncoderModel.from_pretrained
        options = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
        self.model, loaded = load(folder, **options, output_loading_info=True)
        if wrong := sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}):
            raise ValueError(f"text encoder {checkpoint!r} has no tensor {wrong[0]!r} of the right shape")
        self.model.eval().requires_grad_(False)
        self._features = lru_cache(_KEPT)(self._encode)

    @cached_property
    def _network_key(self) -> dict[str, Any]:
        return {"weights": fingerprint(self.model), "config": digest(published_key(self.model.config.to_dict()))}

    def cache_key(self) -> dict[str, Any]:
        """The network, which never changes, and how prompts become its ids."""
        text = {"tokenizer": self._tokenizer.cache_key(), "max_tokens": self.max_tokens}
        return {"class": class_name(self), **self._network_key, **text}

    @property
    def bytes(self) -> int:
        """Memory of the network."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each cleaned prompt without the closing one; what is too long loses its end, with a warning."""
        most, found = self.max_tokens - 1, self._tokenizer.encode([clean_caption(prompt) for prompt in prompts])
        if any(len(ids) > most for ids in found):
            warnings.warn(f"prompts of more than {most} text tokens lose their end", stacklevel=2)
        return [ids[:most] for ids in found]

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """The characters of the prompt itself that each id stands for: cleaning keeps most of them, in their order."""
        cleaned = clean_caption(prompt)
        places = [len(prompt)] * (len(cleaned) + 1)
        for source, target, size in SequenceMatcher(None, prompt.lower(), cleaned, False).get_matching_blocks():
            places[target : target + size] = range(source, source + size)
        tokens = self._tokenizer.spans(cleaned)[: self.max_tokens - 1]
        return [(places[start], places[end - 1] + 1 if end > start else places[start]) for start, end in tokens]

    def features(self, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
        """Hidden states of each prompt's ids and the closing one, [ids + 1, width], on the CPU.

        A prompt is encoded by itself, when it is first asked for, so its features do not depend on others.
        """
        self.model.to(device)
        return [self._features(prompt) for prompt in prompts]

    # Tensors that inference mode makes could not be used in training.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        device = self.model.device
        ids = torch.tensor([[*self.encode([prompt])[0], self.end_of_text]], device=device)
        with torch.autocast(device.type, enabled=False):
            return self.model(input_ids=ids).last_hidden_state[0].cpu()
