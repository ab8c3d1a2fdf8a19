"""Processes that load."""

import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import Dataset

from datamodules.loaders import make_loader


class _Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_begins_with_the_next_batch_and_the_one_after_it_with_the_first(workers: int) -> None:
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1)
    loader: Any = make_loader(_Numbers(), trainer, 4, list, train=False, num_workers=workers)
    batches = iter(loader)
    served = [next(batches) for _ in range(3)]
    again: Any = make_loader(_Numbers(), trainer, 4, list, train=False, num_workers=workers)
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert rest[0] == [12, 13, 14, 15]
    assert served + rest == list(again) == [list(range(i, i + 4)) for i in range(0, 40, 4)]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="workers end with the group there")
def test_workers_live_through_a_signal_to_the_group_until_their_parent_ends_them() -> None:
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1)
    loader: Any = make_loader(_Numbers(), trainer, 4, list, train=False, num_workers=1)
    batches = iter(loader)
    assert next(batches) == [0, 1, 2, 3]
    (worker,) = loader._iterator._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # not from the parent
    assert [row for batch in batches for row in batch] == list(range(4, 40))
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
