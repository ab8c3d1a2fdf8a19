"""Naming the colours of detected objects as GenEval does: crops, and CLIP with three templates for each colour.

The crops are those of the official evaluation (github.com/djghosh13/geneval), the classifier its CLIP ViT-L/14.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from lightning_modules.backbone.loading import fingerprint
from lightning_modules.cache_key import Keyed, class_name
from lightning_modules.rewards.clip_score import tokenizer_key
from lightning_modules.rewards.geneval_metadata import COLORS
from lightning_modules.rewards.geneval_rules import Detections
from lightning_modules.rewards.open_clip_loader import load_clip

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def crop(
    image: NDArray[np.uint8],
    box: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    background: str | None,
    to_box: bool,
) -> Image.Image:
    """Cut out of an image [H, W, 3] the pixels from which the colour of an object is read.

    Args:
        box: corners [4] (x1, y1, x2, y2), pixels, rounded half to even; what lies outside of the image is black.
        mask: the object's pixels [H, W].
        background: colour of the pixels that are not the object's. None, like no mask, leaves them as they are.
        to_box: cut the box out, instead of taking the whole image.
    """
    if mask is not None and background is not None:
        paint = np.asarray(Image.new("RGB", (1, 1), background))
        image = np.where(mask[..., None], image, paint)
    picture = Image.fromarray(image)
    return picture.crop(np.rint(box).astype(int).tolist()) if to_box else picture


class CLIPColors(Keyed):
    """Names the colours of objects by CLIP: the one of GenEval's ten whose three sentences fit the crop best.

    Args:
        model, pretrained: see `load_clip`, also for errors. The official evaluation's is ViT-L/14 with QuickGELU.
        background, to_box: see `crop`.
        batch_size: crops in a forward pass.
    """

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        pretrained: str | None = "openai",
        background: str | None = "#999",
        to_box: bool = True,
        batch_size: int = 256,
    ) -> None:
        clip: Any = load_clip(model, pretrained, key="geneval.reward.colors")
        self.clip = clip.eval().requires_grad_(False)
        self.transform: Any = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.background, self.to_box, self.batch_size = background, to_box, batch_size
        self.device = torch.device("cpu")
        self._classifiers: dict[str, Tensor] = {}
        self.name = model

    def cache_key(self) -> dict[str, Any]:
        """The model's weights, how it wants its images, how it reads texts, and what is cut out."""
        clip = {"weights": fingerprint(self.clip), "preprocessing": get_model_preprocess_cfg(self.clip)}
        cut = {"background": self.background, "to_box": self.to_box}
        return {"class": class_name(self), **clip, "tokenizer": tokenizer_key(self.tokenizer), **cut}

    def to(self, device: torch.device | str) -> Self:
        """Move the model."""
        self.device = torch.device(device)
        self.clip.to(self.device)
        self._classifiers.clear()
        return self

    def crop(self, image: NDArray[np.uint8], detections: Detections, index: int) -> Image.Image:
        """Cut out of an image [H, W, 3] the pixels from which the colour of a detection is read."""
        mask = detections.masks([index])[0] if detections.masks is not None else None
        return crop(image, detections.boxes[index], mask, self.background, self.to_box)

    @torch.no_grad()
    def __call__(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """Colours of N objects from their crops and class names, all crops in one pass (or in `batch_size` ones)."""
        colors: list[str] = []
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            for start in range(0, len(crops), self.batch_size):
                part = slice(start, start + self.batch_size)
                pixels = torch.stack([self.transform(picture) for picture in crops[part]]).to(self.device)
                features = self.clip.encode_image(pixels, normalize=True)
                weights = torch.stack([self._classifier(name) for name in names[part]])
                logits = torch.einsum("id,icd->ic", 100 * features, weights.to(features.dtype))
                colors += [COLORS[i] for i in logits.argmax(1).tolist()]
        return colors

    def _classifier(self, name: str) -> Tensor:
        """Unit vectors of the ten colours for objects of a class, [10, D]; each the mean of its sentences' ones."""
        if name not in self._classifiers:
            sentences = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            features = self.clip.encode_text(self.tokenizer(sentences).to(self.device), normalize=True)
            means = features.view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._classifiers[name] = means / means.norm(dim=1, keepdim=True)
        return self._classifiers[name]


@dataclass(frozen=True, eq=False)
class LazyColors:
    """`Detections.colors` of one image, uint8 [H, W, 3]: a classifier names what is asked for and not known yet."""

    classifier: CLIPColors
    image: NDArray[np.uint8]
    detections: Detections
    known: dict[int, str] = field(default_factory=dict)

    def __call__(self, indices: Sequence[int]) -> list[str]:
        name_colors([(self, indices)])
        return [self.known[index] for index in indices]


def name_colors(asked: Sequence[tuple[LazyColors, Sequence[int]]]) -> None:
    """Name the colours of detections of many images, those that are not known yet, in one pass."""
    todo = [(colors, index) for colors, indices in asked for index in indices if index not in colors.known]
    if not todo:
        return
    crops = [colors.classifier.crop(colors.image, colors.detections, index) for colors, index in todo]
    names = [colors.detections.classes[index] for colors, index in todo]
    for (colors, index), color in zip(todo, todo[0][0].classifier(crops, names), strict=True):
        colors.known[index] = color
