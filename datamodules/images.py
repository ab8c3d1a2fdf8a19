"""Images with captions, for training the image tokenizer and the decoder."""

from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.loaders import make_loader
from datamodules.shapes.scenes import CaptionedImage


class Stream(Protocol):
    """Endless captioned images, a function of the index."""

    def __getitem__(self, index: int) -> CaptionedImage: ...


class StreamDataset(Dataset[dict[str, Any]]):
    """The first `length` images of a stream: `image` uint8 [3, H, W] and `prompt`."""

    def __init__(self, stream: Stream, length: int) -> None:
        self.stream = stream
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.stream[index]
        return {"image": torch.from_numpy(sample.image).permute(2, 0, 1), "prompt": sample.metadata["prompt"]}


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor | list[str]]:
    """Stack images as float [B, 3, H, W] in [0, 1] and list prompts."""
    images = torch.stack([sample["image"] for sample in samples])
    return {"image": images.float() / 255, "prompt": [sample["prompt"] for sample in samples]}


class ImagesDataModule(LightningDataModule):
    """Captioned images from one stream for training and another for validation.

    Args:
        train, validation: streams.
        train_images: images an epoch.
        validation_images: images of a validation.
        batch_size: images a batch, per rank.
        num_workers: processes that render; 0 renders in the main process.
    """

    def __init__(
        self,
        train: Stream,
        validation: Stream,
        train_images: int,
        validation_images: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.train_dataset = StreamDataset(train, train_images)
        self.validation_dataset = StreamDataset(validation, validation_images)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def _loader(self, dataset: StreamDataset, train: bool) -> DataLoader[dict[str, Any]]:
        # A stream is random by itself: shuffling would only cost the reproducible order.
        assert self.trainer is not None
        return make_loader(dataset, self.trainer, self.batch_size, collate, train=train, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.train_dataset, train=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.validation_dataset, train=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.validation_dataset, train=False)
