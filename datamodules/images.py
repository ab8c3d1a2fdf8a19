"""Images with captions, for training the image tokenizer and the decoder."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.shapes.scenes import CaptionedImage
from datamodules.streams import StreamDataModule


def as_pixels(images: list[np.ndarray]) -> Tensor:
    """Images, uint8 [H, W, 3] each -> float [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


class ImagesDataModule(StreamDataModule[CaptionedImage]):
    """Batches of `image` [B, 3, H, W] in [0, 1] and `prompt`, B strings."""

    @staticmethod
    def collate(samples: list[tuple[int, CaptionedImage]]) -> dict[str, Any]:
        return {
            "image": as_pixels([sample.image for _, sample in samples]),
            "prompt": [sample.metadata["prompt"] for _, sample in samples],
        }
