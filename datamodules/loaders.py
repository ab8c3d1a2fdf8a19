"""Data loaders that split over ranks: training pads and shuffles by epoch, evaluation sees every row exactly once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lightning import Trainer
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler


class _BatchesFrom(BatchSampler):
    """Batches of indices without the first `start`."""

    start = 0

    def __iter__(self) -> Iterator[list[int]]:
        return islice(super().__iter__(), self.start, None)


class ResumableLoader(DataLoader[Any]):
    """A loader that knows its place in the epoch: Lightning saves it, and a resumed run begins with the next batch."""

    batch_sampler: _BatchesFrom
    _served = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._served % len(self)}  # after the last one a new epoch begins

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.batch_sampler.start = state_dict["batches"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._served = self.batch_sampler.start
        batches = super().__iter__()  # reads the batch sampler twice where workers load
        self.batch_sampler.start = 0
        for batch in batches:
            self._served += 1
            yield batch


def _leave_sigterm_to_parent(_: int) -> None:
    """Let a worker live through SIGTERM to a whole group of processes, of which the main one saves and then ends it."""
    if hasattr(signal, "sigwaitinfo"):  # of Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def make_loader(
    dataset: Dataset[Any],
    trainer: Trainer,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any],
    train: bool,
    shuffle: bool = False,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Return a loader of this rank's rows (the Trainer must not replace the sampler: `use_distributed_sampler: false`).

    Args:
        batch_size: rows a batch, per rank.
        train: pad to equal length on all ranks; else row i goes to rank i modulo the number of ranks, once.
        shuffle: a new order every epoch, the same after a resume.
        num_workers: processes that load; 0 loads in the main process.
    """
    rank, world_size = trainer.global_rank, trainer.world_size
    sampler: Any = range(rank, len(dataset), world_size)  # type: ignore[arg-type]
    if train:
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=shuffle, seed=0)
    return ResumableLoader(
        dataset,
        batch_sampler=_BatchesFrom(sampler, batch_size, drop_last=False),
        num_workers=num_workers,
        collate_fn=collate_fn,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_sigterm_to_parent,
    )
