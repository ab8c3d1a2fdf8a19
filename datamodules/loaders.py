"""Data loaders that split over ranks: training pads and shuffles by epoch, evaluation sees every row exactly once."""

from collections.abc import Callable
from typing import Any

from lightning import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def make_loader(
    dataset: Dataset[Any],
    trainer: Trainer,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any],
    train: bool,
    shuffle: bool = False,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """A loader of this rank's share (the Trainer must not replace the sampler: `use_distributed_sampler: false`).

    Args:
        dataset: with a length.
        trainer: knows the rank, the number of ranks and, through `set_epoch`, the epoch that orders a shuffle.
        batch_size: rows a batch, per rank.
        collate_fn: rows -> batch.
        train: pad the shares to equal length; else row i goes to rank i modulo the number of ranks, once.
        shuffle: a new order every epoch, the same after a resume.
        num_workers: processes that load; 0 loads in the main process.
    """
    rank, world_size = trainer.global_rank, trainer.world_size
    total = len(dataset)  # type: ignore[arg-type]
    sampler: Any = range(rank, total, world_size)
    if train:
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=shuffle, seed=0)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        persistent_workers=num_workers > 0,
    )
