"""The folders of a folder of images in GenEval's layout: 00000, 00001, ..., one a prompt."""

import re
from pathlib import Path

NUMBER = "[0-9]+"  # what they are called


def prompt_folders(images: str | Path) -> list[Path]:
    """Find them, in the order of their numbers.

    Raises FileNotFoundError if there is no folder of images, and ValueError if it has none of prompts.
    """
    root = Path(images)
    if not root.is_dir():
        raise FileNotFoundError(f"images: there is no folder {images}")
    folders = [path for path in root.iterdir() if path.is_dir() and re.fullmatch(NUMBER, path.name)]
    if not folders:
        raise ValueError(f"images: {images} has no folders 00000, 00001, ... with metadata.jsonl and samples")
    return sorted(folders, key=lambda path: (int(path.name), path.name))
