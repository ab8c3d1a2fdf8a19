"""Images of every kind: read as they look, or refused in a sentence that names them."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from lightning_modules.image_reader import UnreadableImage, hash_image, read_image
from tests.helpers.pictures import HUGE, png

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
PIXELS = np.asarray(PICTURE)


def encode(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
def test_images_are_turned_upright_and_it_is_said_where_they_were(kind: str, orientation: int | None) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    encoded = encode(PICTURE, kind, exif=exif)
    image = read_image(encoded, "it")
    turned = orientation in range(2, 9)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    assert np.array_equal(image.pixels, upright)
    assert turned == (image.pixels.shape == (7, 5, 3) or not np.array_equal(image.pixels, plain(kind)))
    assert image.turned == (turned and kind != "TIFF")


def plain(kind: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encode(PICTURE, kind))))


@pytest.mark.parametrize("exif", [b"nonsense", b"II*\0\x08\0\0\0\xff\xff\x12\x01", b"II*\0\xff\xff\xff\xff"])
def test_broken_exif_data_turn_nothing(exif: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(encode(PICTURE, exif=b"Exif\0\0" + exif), "it")
    assert np.array_equal(image.pixels, PIXELS) and not image.turned


def constant(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (3, 2), value)


PALETTE = constant("P", 1)
PALETTE.putpalette([9, 9, 9, 200, 100, 0])
SIXTEEN = np.array([[0x12FF, 0xFE00, 0x0001]], ">u2").tobytes()


@pytest.mark.parametrize(
    ("encoded", "mode", "color", "transparent"),
    [
        (encode(constant("L", 100)), "L", [100, 100, 100], False),
        (encode(constant("1", 1)), "1", [255, 255, 255], False),
        (encode(PALETTE), "P", [200, 100, 0], False),
        (encode(PALETTE, transparency=0), "P", [200, 100, 0], False),
        (encode(PALETTE, transparency=1), "P", [255, 255, 255], True),
        (encode(PALETTE, transparency=b"\xff\x80"), "P", [227, 177, 127], True),
        (encode(constant("RGBA", (200, 100, 0, 255))), "RGBA", [200, 100, 0], False),
        (encode(constant("RGBA", (200, 100, 0, 128))), "RGBA", [227, 177, 127], True),
        (encode(constant("RGBA", (200, 100, 0, 0))), "RGBA", [255, 255, 255], True),
        (encode(constant("LA", (100, 0))), "LA", [255, 255, 255], True),
        (encode(constant("RGB", (200, 100, 0)), transparency=(200, 100, 0)), "RGB", [255, 255, 255], True),
        (encode(constant("CMYK", (0, 255, 255, 0)), "TIFF"), "CMYK", [255, 0, 0], False),
        (encode(constant("LAB", (255, 128, 128)), "TIFF"), "LAB", [255, 255, 255], False),
        (encode(constant("YCbCr", (76, 85, 255)), "JPEG", quality=100), "RGB", [254, 0, 0], False),
        (png(1, 1, 16, 2, b"\0" + SIXTEEN), "RGB", [0x12, 0xFE, 0], False),
        (png(1, 1, 4, 0, b"\0\x80"), "L", [136, 136, 136], False),
    ],
)
def test_modes_are_converted_to_what_they_look_like(
    encoded: bytes, mode: str, color: list[int], transparent: bool
) -> None:
    image = read_image(encoded, "it")
    assert (image.mode, image.transparent) == (mode, transparent) and image.pixels.dtype == np.uint8
    assert image.pixels.shape[2] == 3 and abs(image.pixels.astype(int) - color).max() <= 1  # 1: rounded in conversions


FRAMES = {"save_all": True, "append_images": [constant("RGB", "red").resize((7, 5))]}


def test_the_first_of_a_phones_images_is_read() -> None:
    image = read_image(encode(constant("RGB", "white"), "MPO", **FRAMES), "it")
    assert image.format == "MPO" and image.pixels.min() == 255


WORKFLOW = PngImagePlugin.PngInfo()
WORKFLOW.add_text("workflow", "x" * 2_000_000, zip=True)
WHOLE = encode(PICTURE)
DEEP = "has the mode {}, more than 8 bits a pixel and colour"
NO_IMAGE = "cannot be read: it is no image of the formats PNG, JPEG, WEBP, GIF, BMP, TIFF, or a broken one"
LARGE = "cannot be read: it has more than 89,478,485 pixels; make it smaller"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cannot be read: the file is empty"),
        (b"<!DOCTYPE html><title>404</title>", NO_IMAGE),
        (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ", NO_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_IMAGE),
        (WHOLE[:40], "cannot be read: "),
        (WHOLE[:-30], "cannot be read: image file is truncated"),
        (encode(PICTURE, "JPEG")[:-40], "cannot be read: image file is truncated"),
        (WHOLE.replace(b"IHDR", b"IHDX"), NO_IMAGE),
        (WHOLE[:20] + b"\xff" + WHOLE[21:], NO_IMAGE),
        (encode(PICTURE, pnginfo=WORKFLOW), "cannot be read: Decompressed data too large"),
        (png(10_000, 10_000, 8, 2, b""), LARGE),
        (HUGE, LARGE),
        (encode(constant("I;16", 9)), DEEP.format("I;16")),
        (encode(constant("I", 9), "TIFF"), DEEP.format("I")),
        (encode(constant("F", 0.5), "TIFF"), DEEP.format("F")),
        *((encode(PICTURE, kind, **FRAMES), "has 2 frames, so which image is meant is unknown")
          for kind in ("GIF", "WEBP", "PNG", "TIFF")),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_cause(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for source in (path, str(path), content):
        with pytest.raises(UnreadableImage) as refused:
            read_image(source, "a.png")
        assert str(refused.value).startswith(f"a.png {sentence}") and "\n" not in str(refused.value)


def test_what_is_no_file_is_named_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    causes = {
        "folder.png": "it is no file",
        "pipe.png": "it is no file",
        "link.png": "No such file or directory",
        "loop.png": "Too many levels of symbolic links",
        "a\0.png": "embedded null byte",
        "a" * 300: "File name too long",
    }
    for name, cause in causes.items():
        for use in (read_image, hash_image):
            with pytest.raises(UnreadableImage) as refused:
                use(tmp_path / name, name)
            assert str(refused.value) == f"{name} cannot be read: {cause}"
    with pytest.raises(UnreadableImage, match="it cannot be read: the file is empty"):
        read_image(b"", "it")


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(WHOLE)
    assert hash_image(tmp_path / "a.png", "a") == hash_image(WHOLE, "b")
    assert hash_image(WHOLE + b"\0", "b") != hash_image(WHOLE, "b")
