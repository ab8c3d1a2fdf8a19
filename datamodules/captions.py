"""Rendered images with true and altered captions, for PARM's start (no decoder's mistakes seen yet)."""

from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.loaders import make_loader
from datamodules.shapes.captions import CaptionPair


class Pairs(Protocol):
    """Endless images with two captions each, a function of the index."""

    def __getitem__(self, index: int) -> CaptionPair: ...


class PairDataset(Dataset[dict[str, Any]]):
    """The first `length` images of a stream of caption pairs, with their verdicts; see `PARMModule` for the fields."""

    def __init__(self, pairs: Pairs, length: int) -> None:
        self.pairs = pairs
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        return {
            "image": torch.from_numpy(pair.image).permute(2, 0, 1).float() / 255,
            "prompt": [caption["prompt"] for caption in pair.captions],
            "correct": torch.tensor([float(verdict.correct) for verdict in pair.verdicts]),
            "clauses": torch.tensor([verdict.clauses for verdict in pair.verdicts]),
            "group": index,
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """B images with two captions each -> a batch of 2B rows; the two of one image stand side by side."""
    group = torch.tensor([sample["group"] for sample in samples]).repeat_interleave(2)
    return {
        "image": torch.stack([sample["image"] for sample in samples]).repeat_interleave(2, 0),
        "prompt": [prompt for sample in samples for prompt in sample["prompt"]],
        "correct": torch.cat([sample["correct"] for sample in samples]),
        "clauses": torch.cat([sample["clauses"] for sample in samples]),
        "free_from": torch.zeros_like(group),
        "group": group,
    }


class CaptionsDataModule(LightningDataModule):
    """Caption pairs from one stream for training and another for validation.

    Args:
        train, validation: streams of caption pairs.
        train_images, validation_images: images an epoch, and of a validation.
        batch_size: images a batch, per rank; a batch has twice as many rows.
        num_workers: processes that render; 0 renders in the main process.
    """

    def __init__(
        self,
        train: Pairs,
        validation: Pairs,
        train_images: int,
        validation_images: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.train_dataset = PairDataset(train, train_images)
        self.validation_dataset = PairDataset(validation, validation_images)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def _loader(self, dataset: PairDataset, train: bool) -> DataLoader[dict[str, Any]]:
        # A stream is random by itself: shuffling would only cost the reproducible order.
        assert self.trainer is not None
        return make_loader(dataset, self.trainer, self.batch_size, collate, train=train, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.train_dataset, train=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.validation_dataset, train=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.validation_dataset, train=False)
