"""The published files of LlamaGen, each a model for images of one size; torch is not imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PIXELS = {"t2i_XL_stage1_256.pt": 256, "t2i_XL_stage2_512.pt": 512}  # of the sides of images


def check_name(checkpoint: str, config: Mapping[str, Any], image_size: int | None) -> None:
    """Raise ValueError if a file, by its published name, is a model for images of another size."""
    pixels = _PIXELS.get(Path(checkpoint).name)
    if image_size is not None and pixels not in (None, image_size):
        raise of_other_images(checkpoint, f"{pixels} pixels", f"{image_size} are not")


def of_other_images(file: Path | str, found: str, own: str) -> ValueError:
    """The refusal of a file for images of another size."""
    wanted = f"those of tokenizer.module.config.image_size={own}"
    return ValueError(f"{file} is for images of {found}, but {wanted}: see decoder=llamagen_256 and llamagen_512")
