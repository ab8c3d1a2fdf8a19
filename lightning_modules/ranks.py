"""What ranks exchange, and what makes their training step that of one process with the rows of all."""

from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """Say if other ranks work on the same step."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process among all ranks."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if is_distributed() else 1


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in their order."""
    values = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return rank 0's value."""
    values = [value]
    if is_distributed():
        dist.broadcast_object_list(values)
    return values[0]


def uniform_rows(rows: int, *shape: int, device: torch.device | None = None) -> Tensor:
    """Draw uniform numbers in [0, 1) for each of this rank's rows, [B, ...]: those that the row gets on one process.

    Ranks take the rows of a batch in turn (`datamodules.loaders`), and their generators are seeded alike.
    """
    return torch.rand(rows * world_size(), *shape, device=device)[rank() :: world_size()]


def mean_over_ranks(count: Tensor) -> Tensor:
    """Take the mean of a count over ranks: sums divided by it have the gradient of the mean over all ranks' terms."""
    if is_distributed():
        count = count.clone()
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count


def is_first() -> bool:
    """Say if this is the process of rank 0; known before processes have met."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]
