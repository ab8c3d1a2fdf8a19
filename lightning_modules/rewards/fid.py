"""FID: how far a set of images is from reference images, which GenEval does not see."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import trange

from lightning_modules.backbone.loading import fingerprint
from lightning_modules.cache_key import Keyed, class_name
from lightning_modules.rewards.clip_score import image_features, image_key
from lightning_modules.rewards.references import refuse_few


class CLIPFeatures(nn.Module, Keyed):
    """Unit features of an open_clip model's image tower [B, D]: features that need no Inception."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.num_features: int = clip.visual.output_dim  # type: ignore[assignment, union-attr]

    def cache_key(self) -> dict[str, Any]:
        """The model's weights and its preprocessing."""
        return {"class": class_name(self), **image_key(self.clip)}

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> features."""
        return image_features(self.clip, pixels)


class FID(Keyed):
    """torchmetrics' Frechet distance to reference images; sums over all processes.

    Args:
        references: images by number, `references[i].image` uint8 [H, W, 3], all of one size; with a `cache_key`.
        count: of them.
        feature: what makes features [B, D] of pixels in [0, 1], or the width of a layer of Inception (2048 is the
            usual one; needs `pip install torch-fidelity` and its weights).
        batch_size: references in a forward pass.
    """

    def __init__(self, references: Any, count: int, feature: CLIPFeatures | int = 2048, batch_size: int = 64) -> None:
        if count < 2:
            raise ValueError(f"fid.count must be at least 2 reference images, not {count}")
        refuse_few(references, count)
        self.references, self.count, self.batch_size = references, count, batch_size
        self.metric = FrechetInceptionDistance(feature, reset_real_features=False, normalize=True)
        self.feature = feature

    def cache_key(self) -> dict[str, Any]:
        """The references, how many of them, and what makes features."""
        if isinstance(self.feature, int):
            feature = {"inception": self.feature, "weights": fingerprint(self.metric.inception)}
        else:
            feature = self.feature.cache_key()
        references = self.references.cache_key()
        return {"class": class_name(self), "references": references, "count": self.count, "feature": feature}

    @torch.no_grad()
    def start(self, device: torch.device | str, rank: int, world_size: int) -> None:
        """Forget the images, but not the references: these are read once, each by one process."""
        self.metric.to(device)
        if not self.metric.real_features_num_samples:
            own = range(rank, self.count, world_size)
            for start in trange(0, len(own), self.batch_size, desc="FID references", disable=rank > 0):
                numbers = own[start : start + self.batch_size]
                self.metric.update(self._pixels(np.stack([self.references[i].image for i in numbers])), real=True)
        self.metric.reset()

    @torch.no_grad()
    def update(self, images: np.ndarray) -> None:
        """Add images, uint8 [B, H, W, 3]."""
        self.metric.update(self._pixels(images), real=False)

    def compute(self) -> float:
        """The distance; lower is better."""
        return float(self.metric.compute())

    def _pixels(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images).to(self.metric.device).permute(0, 3, 1, 2).float() / 255
