"""Pictures as files: faulty ones, and folders in GenEval's layout."""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.geneval_prompts import sample_path


def png(width: int, height: int, bits: int, color: int, data: bytes) -> bytes:
    """A PNG of these bytes; color is 0 for grey, 2 for RGB."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


HUGE = png(20_000, 20_000, 8, 2, b"")


def write_folder(folder: Path, rows: list[dict[str, Any]], images: Mapping[tuple[int, int], np.ndarray]) -> Path:
    """GenEval's layout."""
    for i, row in enumerate(rows):
        (folder / f"{i:05d}" / "samples").mkdir(parents=True)
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(row))
    for (i, j), image in images.items():
        Image.fromarray(image).save(folder / sample_path(i, j))
    return folder
