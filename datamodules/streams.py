"""Training data made on the fly: streams of samples that are functions of their index."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset

from datamodules.loaders import make_loader

Sample = TypeVar("Sample")
Sample_co = TypeVar("Sample_co", covariant=True)


class Stream(Protocol[Sample_co]):
    """Endless samples."""

    def __getitem__(self, index: int) -> Sample_co: ...


@dataclass(frozen=True)
class StreamDataset(Dataset[tuple[int, Sample]]):
    """The first `length` samples of a stream, each with its index."""

    stream: Stream[Sample]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        return index, self.stream[index]


class StreamDataModule(LightningDataModule, Generic[Sample]):
    """Samples from one stream for training and another for validation and test.

    Args:
        train, validation: streams.
        train_images, validation_images: samples an epoch, and of a validation.
        batch_size: samples a batch, per rank.
        num_workers: processes that render; 0 renders in the main process.
    """

    makes_rollouts = False
    trainer: Trainer

    def __init__(
        self,
        train: Stream[Sample],
        validation: Stream[Sample],
        train_images: int,
        validation_images: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.train_dataset = StreamDataset(train, train_images)
        self.validation_dataset = StreamDataset(validation, validation_images)
        self.batch_size, self.num_workers = batch_size, num_workers

    @staticmethod
    @abstractmethod
    def collate(samples: list[tuple[int, Any]]) -> dict[str, Any]:
        """Turn samples with their indices into a batch."""

    def _loader(self, dataset: StreamDataset[Sample], train: bool) -> DataLoader[dict[str, Any]]:
        settings = self.trainer, self.batch_size, self.collate
        return make_loader(dataset, *settings, train, shuffle=False, num_workers=self.num_workers)  # random by itself

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.train_dataset, train=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.validation_dataset, train=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.validation_dataset, train=False)
