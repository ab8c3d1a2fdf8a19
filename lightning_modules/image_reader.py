"""One reader of images, for all that come from outside: 8-bit RGB and upright, or refused in one sentence."""

import hashlib
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ImageSource = str | Path | bytes  # a path, or an encoded image

# Other formats that Pillow knows would run programs (EPS), or take almost any bytes for an image (TGA).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# How an image of EXIF orientation 2, 3, ... is turned upright; ImageOps.exif_transpose fails on other broken data.
_Turn = Image.Transpose
_TURNS: dict[Any, Image.Transpose] = dict(enumerate((
    _Turn.FLIP_LEFT_RIGHT, _Turn.ROTATE_180, _Turn.FLIP_TOP_BOTTOM, _Turn.TRANSPOSE, _Turn.ROTATE_270, _Turn.TRANSVERSE,
    _Turn.ROTATE_90,
), 2))  # fmt: skip


class UnreadableImage(ValueError):
    """Says in one sentence which image cannot be used, and why."""


@dataclass(frozen=True)
class ReadImage:
    """An image, and what was done to it."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    format: str  # of the file, as Pillow calls it; MPO is a phone's JPEG with more images behind it
    mode: str  # of the pixels before they were converted to RGB
    turned: bool  # it was turned or mirrored, as its EXIF data say; TIFF images are without mention
    transparent: bool  # parts of it were, and were laid on white


def read_image(source: ImageSource, name: str) -> ReadImage:
    """Read an image; `name` is its name in errors.

    Raises UnreadableImage if it is missing, broken, none of `FORMATS`, moves, or has more than 8 bits a colour or more
    pixels than Pillow's limit.
    """
    with _opened(source, name) as file:
        if not file.read(1):
            raise UnreadableImage(f"{name} cannot be read: the file is empty")
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            kind, mode = str(image.format), image.mode
            if mode[0] in "IF":  # the conversion would cut off at white
                raise UnreadableImage(f"{name} has the mode {mode}, more than 8 bits a pixel and colour")
            if kind != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
                raise UnreadableImage(f"{name} has {frames} frames, so which image is meant is unknown")
            image.load()
            turn = None
            with suppress(Exception):  # EXIF data that cannot be parsed turn nothing, as in any viewer
                turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
            colors = image.convert("RGBA" if image.has_transparency_data else "RGB")
            transparent = colors.mode == "RGBA" and colors.getchannel("A").getextrema()[0] != 255
            if transparent:
                colors = Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors)
            upright = colors.convert("RGB") if turn is None else colors.convert("RGB").transpose(turn)
            return ReadImage(np.array(upright), kind, mode, turn is not None, transparent)


def hash_image(source: ImageSource, name: str) -> str:
    """Hash an image's bytes; raises `UnreadableImage` if they cannot be read."""
    with _opened(source, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fit_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """Cut out the middle square of an image and resize it, uint8 [H, W, 3] -> [side, side, 3]."""
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC))


@contextmanager
def _opened(source: ImageSource, name: str) -> Iterator[BufferedReader | BytesIO]:
    """Open the bytes of an image; whatever happens while they are open becomes an `UnreadableImage`."""
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(Path(source).stat().st_mode):
            raise OSError("it is no file")  # but a pipe or a device, which might never end
        with BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these name no file
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield file
    except UnreadableImage:
        raise
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        raise UnreadableImage(f"{name} cannot be read: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is no image of the formats {', '.join(FORMATS)}, or a broken one"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, OSError | SyntaxError | ValueError) else repr(error)
