"""CLIPScore (arXiv 2104.08718) by any open_clip model: how well an image, or each patch of it, goes with its prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import get_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.loading import fingerprint
from lightning_modules.cache_key import Keyed, class_name, digest
from lightning_modules.rewards.verifier import Ability, Reward

_WEIGHT = 2.5  # CLIPScore's w

# In it are upper case, signs, an accent and spaces, so that cleaning shows, and more words than any model reads.
_EXAMPLES = ("A photo of TWO  cafés, left of a fire-hydrant &amp; a dog's bowl!", "word " * 200)

TextTokenizer = Callable[[Sequence[str]], Tensor]  # texts -> ids [B, L]


def preprocessing(clip: nn.Module) -> dict[str, list[Any]]:
    """The preprocessing of a model: `size` (height, width), and the `mean` and `std` of each colour."""
    config = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, **get_model_preprocess_cfg(clip)}
    size = config["size"] if isinstance(config["size"], (tuple, list)) else (config["size"], config["size"])
    return {"size": list(size), "mean": list(config["mean"]), "std": list(config["std"])}


def image_key(clip: nn.Module) -> dict[str, Any]:
    """The key of image features: the model's weights and its preprocessing."""
    return {"weights": fingerprint(clip), "preprocessing": preprocessing(clip)}


def image_features(clip: nn.Module, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1] -> unit features [B, D]: resized and normalised as the model was trained."""
    wanted = preprocessing(clip)
    if list(pixels.shape[-2:]) != wanted["size"]:
        pixels = F.interpolate(pixels, wanted["size"], mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(wanted[key], device=pixels.device).view(3, 1, 1) for key in ("mean", "std"))
    return clip.encode_image((pixels - mean) / std, normalize=True)  # type: ignore[operator]


def tokenizer_key(tokenizer: Any) -> Any:
    """The key of a tokenizer: of open_clip's the vocabulary, and how it is used."""
    if isinstance(tokenizer, Keyed):
        return tokenizer.cache_key()
    vocabulary = tokenizer.encoder if isinstance(tokenizer, SimpleTokenizer) else tokenizer.tokenizer.get_vocab()
    examples = tokenizer(list(_EXAMPLES)).tolist()
    return {"class": class_name(tokenizer), "vocabulary": digest(vocabulary), "examples": digest(examples)}


def cells(pixels: Tensor, patches: int) -> Tensor:
    """Images [B, 3, H, W] cut into an M x M grid, row by row: [B, M * M, 3, H / M, W / M]."""
    rows = pixels.unflatten(2, (patches, -1)).unflatten(4, (patches, -1))  # [B, 3, M, h, M, w]
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


class CLIPScore(Reward):
    """2.5 max(cos(image, prompt), 0) of whole images, 2.5 cos of patches. Features of each prompt are computed once.

    Args:
        clip, tokenizer: an open_clip model and its tokenizer (`load_clip`, `open_clip.get_tokenizer`).
        batch_size: images or patches in a forward pass.
    """

    abilities = frozenset({Ability.PATCHES})

    def __init__(self, clip: nn.Module, tokenizer: TextTokenizer, batch_size: int = 256) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._texts: dict[str, Tensor] = {}

    def cache_key(self) -> dict[str, Any]:
        """The model, its preprocessing and its tokenizer."""
        return {"class": class_name(self), "tokenizer": tokenizer_key(self.tokenizer), **image_key(self.clip)}

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return self.patches([row["prompt"] for row in prompts], pixels, 1)[:, 0, 0].clamp(min=0)

    @torch.no_grad()
    def patches(self, prompts: Sequence[str], pixels: Tensor, patches: int) -> Tensor:
        """S_ij of the prompt and patch ij of images [B, 3, H, W] cut into an M x M grid, [B, M, M]; not clipped at 0.

        Raises:
            ValueError: the image's sides are no multiples of `patches`.
        """
        height, width = pixels.shape[2:]
        if height % patches or width % patches:
            raise ValueError(f"images of {height}x{width} pixels have no {patches}x{patches} patches")
        self.clip.to(pixels.device)
        crops = cells(pixels, patches).flatten(0, 1)
        images = torch.cat([image_features(self.clip, part) for part in crops.split(self.batch_size)])
        texts = self._text_features(prompts, pixels.device)
        cosine = torch.einsum("bpd,bd->bp", images.unflatten(0, (len(pixels), -1)), texts)
        return _WEIGHT * cosine.view(-1, patches, patches)

    def _text_features(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Unit features of prompts, [B, D]."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]:
            features = self.clip.encode_text(self.tokenizer(new).to(device), normalize=True)  # type: ignore[operator]
            self._texts |= dict(zip(new, features.cpu(), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts]).to(device)
