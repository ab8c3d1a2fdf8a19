"""The folders of a folder of images in GenEval's layout: 00000, 00001, ..., one a prompt.

<images>/00000/metadata.jsonl (one prompt) and <images>/00000/samples/0000.png, 0001.png, ...
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_modules.jsonl import read_jsonl
from lightning_modules.rewards.geneval_metadata import validate_metadata

_NUMBER = "[0-9]+"  # what they are called
_NAMED = 5  # faulty folders that an error names


@dataclass(frozen=True)
class PromptFolder:
    """A prompt, the names of its images in `samples`, and of what else is there."""

    path: Path
    metadata: dict[str, Any]
    files: tuple[str, ...]
    others: tuple[str, ...]

    def name(self, file: str) -> str:
        """Name an image for results and sentences."""
        return f"{self.path.name}/samples/{file}"

    @cached_property
    def key(self) -> dict[str, Any]:
        """The prompt and hashes of its images, as they are when this is first read."""
        from lightning_modules.image_reader import UnreadableImage, hash_image  # imports numpy, and `scan` needs none

        images: dict[str, str | None] = dict.fromkeys(self.files)  # None for what cannot be read
        for file in self.files:
            with suppress(UnreadableImage):
                images[file] = hash_image(self.path / "samples" / file, file)
        return {"prompt": self.metadata, "images": images, "others": self.others}


def scan(images: str | Path, class_names: Sequence[str] | None) -> list[PromptFolder]:
    """Find the prompts of a folder of images, in the order of their numbers; they name these classes (None: any).

    Raises FileNotFoundError if there is no such folder, and ValueError, naming files, if it has no prompts, or some
    without images or valid metadata.
    """
    found, complaints = [], []
    for folder in _numbered(images):
        try:
            found.append(_open(folder, class_names))
        except ValueError as error:
            complaints.append(str(error))
    if len(complaints) > _NAMED:
        complaints[_NAMED:] = [f"{len(complaints) - _NAMED} more folders have faults"]
    if complaints:
        raise ValueError(f"images: {'; '.join(complaints)}")
    return found


def _numbered(images: str | Path) -> list[Path]:
    root = Path(images)
    if not root.is_dir():
        raise FileNotFoundError(f"images: there is no folder {images}")
    folders = [path for path in root.iterdir() if path.is_dir() and re.fullmatch(_NUMBER, path.name)]
    if not folders:
        raise ValueError(f"images: {images} has no folders 00000, 00001, ... with metadata.jsonl and samples")
    return sorted(folders, key=lambda path: (int(path.name), path.name))


def unnumbered(images: str | Path) -> list[str]:
    """Name the folders that `scan` takes for no prompts."""
    names = (path.name for path in Path(images).iterdir() if path.is_dir())
    return sorted(name for name in names if not re.fullmatch(_NUMBER, name) and name[0] != ".")


def _open(folder: Path, class_names: Sequence[str] | None) -> PromptFolder:
    file, samples = folder / "metadata.jsonl", folder / "samples"
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file, so what the images should show is unknown")
    prompts = [prompt for _, prompt in read_jsonl(file)]
    if len(prompts) != 1:
        raise ValueError(f"{file}: must hold one prompt in one line, not {len(prompts)}")
    metadata = prompts[0]
    validate_metadata(metadata, class_names, str(file))
    names = sorted(path.name for path in samples.iterdir() if path.name[0] != ".") if samples.is_dir() else []
    files = [name for name in names if re.fullmatch(_NUMBER + r"\.(png|jpe?g|webp)", name, re.IGNORECASE)]
    if not files:
        raise ValueError(f"{samples}: there are no images 0000.png, 0001.png, ...")
    by_number: dict[int, str] = {}
    for name in files:
        if (first := by_number.setdefault(int(name.split(".")[0]), name)) != name:
            raise ValueError(f"{samples}: {first} and {name} have one number, and only one of them can be meant")
    return PromptFolder(folder, metadata, tuple(files), tuple(name for name in names if name not in files))
