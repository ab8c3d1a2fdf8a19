"""Prompts whose images are to be made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from datamodules.geneval_prompts import sample_path
from datamodules.prompt_templates import Metadata


class PromptsDataModule(LightningDataModule):
    """Images to be made: (index of the prompt, number of the sample, GenEval metadata), those that are not there yet.

    Each prompt is one rank's, with all its images. `folder` has GenEval's layout; `batch_size` is images, per rank.
    """

    trainer: Trainer

    def __init__(self, prompts: Sequence[Metadata], images_per_prompt: int, folder: str, batch_size: int) -> None:
        super().__init__()
        if images_per_prompt < 1:
            raise ValueError(f"images_per_prompt must be at least 1, not {images_per_prompt}")
        self.prompts, self.images_per_prompt = prompts, images_per_prompt
        self.folder, self.batch_size = Path(folder), batch_size

    def jobs(self, rank: int = 0, world_size: int = 1) -> list[tuple[int, int, Metadata]]:
        """Return all of a rank's images."""
        own = range(rank, len(self.prompts), world_size)
        return [(i, j, self.prompts[i]) for i in own for j in range(self.images_per_prompt)]

    def missing(self, rank: int = 0, world_size: int = 1) -> list[tuple[int, int, Metadata]]:
        """Return those that are not there yet; an empty file is what a full disk or a broken copy leaves."""
        return [
            job
            for job in self.jobs(rank, world_size)
            if not (path := self.folder / sample_path(*job[:2])).is_file() or not path.stat().st_size
        ]

    def predict_dataloader(self) -> DataLoader[Any]:
        jobs = self.missing(self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(jobs, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]
