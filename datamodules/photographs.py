"""A folder of images as references, all cut to one size."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.cache_key import Keyed, class_name
from lightning_modules.image_reader import UnreadableImage, fit_square, read_image


@dataclass(frozen=True)
class Photograph:
    """An image, uint8 [side, side, 3]."""

    image: np.ndarray


class Photographs(Keyed):
    """The middle squares, resized to `side` pixels, of the PNG, JPEG and WebP images in a folder and those below it.

    What is hidden (.name) is left out. Raises FileNotFoundError if there are none.
    """

    reads = ("folder",)

    def __init__(self, folder: str, side: int) -> None:
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        found = (path for path in Path(folder).rglob("*") if path.suffix.lower() in kinds)
        self.files = sorted(p for p in found if not any(part[0] == "." for part in p.relative_to(folder).parts))
        if not self.files:
            raise FileNotFoundError(f"fid.references.folder: there are no images in {folder}")
        self.side = side

    def cache_key(self) -> dict[str, Any]:
        """The bytes of the files, in their order, and their size."""
        hashes = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in self.files)
        return {"class": class_name(self), "sha256": hashlib.sha256(hashes).hexdigest()[:16], "side": self.side}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Photograph:
        try:
            image = read_image(self.files[index], str(self.files[index]))
        except UnreadableImage as error:
            raise ValueError(f"fid.references.folder: {error}") from None
        return Photograph(fit_square(image.pixels, self.side))
