"""The check of reference images, which takes no torch."""

from collections.abc import Sized
from typing import Any


def refuse_few(references: Any, count: int) -> None:
    """Raise ValueError if there are fewer references than `fid.count`, as far as their number is known."""
    if isinstance(references, Sized) and len(references) < count:
        raise ValueError(f"fid.count is {count}, and there are only {len(references)} reference images")
