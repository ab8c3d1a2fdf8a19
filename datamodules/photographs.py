"""A folder of images as references, all cut to one size."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


@dataclass(frozen=True)
class Photograph:
    """An image, uint8 [side, side, 3]."""

    image: np.ndarray


class Photographs:
    """The middle squares of the PNG, JPEG and WebP images in a folder and those below it, by their number.

    Args:
        folder: of the images.
        side: pixels along each side.

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, folder: str, side: int) -> None:
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        self.files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in kinds)
        if not self.files:
            raise FileNotFoundError(f"fid.references.folder: there are no images in {folder}")
        self.side = side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Photograph:
        try:
            with Image.open(self.files[index]) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"fid.references.folder: {self.files[index]} cannot be read: {error}") from error
        return Photograph(np.asarray(ImageOps.fit(upright, (self.side, self.side), Image.Resampling.BICUBIC)))
