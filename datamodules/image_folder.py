"""A folder of images in GenEval's layout, and the results of what has been judged of it already.

<images>/00000/metadata.jsonl (one prompt) and <images>/00000/samples/0000.png, 0001.png, ...
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from datamodules.prompt_folders import PromptFolder
from lightning_modules.artifacts import ArtifactCache
from lightning_modules.broken_files import read_json
from lightning_modules.files import write_text
from lightning_modules.image_reader import UnreadableImage, read_image


@dataclass(frozen=True)
class Images:
    """The images of one prompt."""

    folder: PromptFolder
    files: tuple[str, ...]  # those that could be read
    pixels: tuple[np.ndarray, ...]  # uint8 [H, W, 3] each
    notes: tuple[str, ...]  # what is unusual about one, a sentence each
    left_out: tuple[str, ...]  # why one was not read, a sentence each


def read(folder: PromptFolder, side: int | None) -> Images:
    """Read the images of a prompt; others than of `side` pixels, if the detector needs that, are left out."""
    files, pixels, notes = [], [], []
    left_out = [f"{folder.name(other)} has no name like 0000.png" for other in folder.others]
    for file in folder.files:
        name = folder.name(file)
        try:
            image = read_image(folder.path / "samples" / file, name)
        except UnreadableImage as error:
            left_out.append(str(error))
            continue
        height, width = image.pixels.shape[:2]
        if side is not None and (height, width) != (side, side):
            left_out.append(f"{name} has {width}x{height} pixels, and the detector needs {side}x{side}")
            continue
        unusual = {
            f"is a {image.format} image; lossy compression changes what is detected": image.format != "PNG",
            f"has the mode {image.mode} and was converted to RGB": image.mode != "RGB",
            "is transparent in parts, which were laid on white": image.transparent,
            "was turned upright, as its EXIF data say": image.turned,
        }
        notes += [f"{name} {note}" for note, holds in unusual.items() if holds]
        files.append(file)
        pixels.append(image.pixels)
    return Images(folder, tuple(files), tuple(pixels), tuple(notes), tuple(left_out))


def _read_all(side: int | None, folders: Sequence[PromptFolder]) -> list[Images]:
    return [read(folder, side) for folder in folders]


class ScoreStore:
    """Results of prompts, a file each, so that a killed scoring is resumed; several processes can use it at once.

    `judged_by` is all that decides the results; for `root` and `module` see `ArtifactCache`.
    """

    def __init__(self, root: str, judged_by: Mapping[str, Any], module: str = __name__) -> None:
        self._parts = ArtifactCache(root, module).parts("scores", judged_by)
        self.folder = self._parts.root

    def open(self) -> None:
        """Create the folder; raises OSError, naming it, if results cannot be kept there."""
        self._parts.open()

    def load(self, folder: PromptFolder) -> dict[str, Any] | None:
        """Return the result of a prompt; None if these images have none yet, or none that can be read."""
        path = self._path(folder)
        result = read_json(path) if path.is_file() else None
        return result if isinstance(result, dict) else None

    def save(self, folder: PromptFolder, result: Mapping[str, Any]) -> None:
        """Keep the result of a prompt."""
        write_text(self._path(folder), json.dumps(result))

    def _path(self, folder: PromptFolder) -> Path:
        return self._parts.path(f"{folder.path.name}.json", folder.key)


class ImageFolderDataModule(LightningDataModule):
    """Batches of prompts with all their images, those in which a prompt has no result yet.

    Rank r of n has prompts r, r + n, ..., always in the same batches: networks round a little differently in others,
    and a resumed run is to give the results of an uninterrupted one. `batch_size` is prompts, per rank; for `folders`
    and `side` see `scan` and `read`.
    """

    trainer: Trainer

    def __init__(
        self, folders: Sequence[PromptFolder], side: int | None, store: ScoreStore, batch_size: int, num_workers: int
    ) -> None:
        super().__init__()
        self.folders, self.side, self.store = folders, side, store
        self.batch_size, self.num_workers = batch_size, num_workers

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Images stay as they are: sizes differ, and detectors move their own inputs."""
        return batch

    def predict_dataloader(self) -> DataLoader[list[Images]]:
        own = self.folders[self.trainer.global_rank :: self.trainer.world_size]
        batches = [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]
        missing: Any = [batch for batch in batches if any(self.store.load(folder) is None for folder in batch)]
        collate = partial(_read_all, self.side)
        return DataLoader(missing, batch_size=None, collate_fn=collate, num_workers=self.num_workers)
