"""What was found of shares of the prompts: batches, kept until a test is complete, and ranks, put together."""

import json
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning import Trainer

from lightning_modules.backbone.decoder import Cost
from lightning_modules.files import is_read_only, refuse_unwritable, write_text
from lightning_modules.ranks import is_distributed
from lightning_modules.report.drawing import TraceView
from lightning_modules.report.tables import StrategyResult


@dataclass
class Share:
    """What one rank found for one strategy, in a batch or in all of its own."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    thumbnails: dict[int, np.ndarray] = field(default_factory=dict)
    stories: dict[int, TraceView] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    objects: int = 0
    independent: dict[str, float] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Share") -> None:
        """Take in what was found for other images."""
        self.rows += other.rows
        self.thumbnails |= other.thumbnails
        self.stories |= other.stories
        self.cost.add(other.cost)
        self.seconds += other.seconds
        self.objects += other.objects
        for own, others in ((self.independent, other.independent), (self.stats, other.stats)):
            for name, total in others.items():
                own[name] = own.get(name, 0.0) + total

    def to_json(self) -> str:
        """All of it as text, pictures included."""
        return json.dumps(asdict(self), default=_packed)

    @staticmethod
    def from_json(text: str) -> "Share":
        """What `to_json` wrote."""
        plain = json.loads(text, object_hook=_unpacked)
        plain["thumbnails"] = {int(index): pixels for index, pixels in plain["thumbnails"].items()}
        plain["stories"] = {int(index): TraceView.of(story) for index, story in plain["stories"].items()}
        return Share(**plain | {"cost": Cost(**plain["cost"])})


def _packed(value: Any) -> dict[str, Any]:
    """What JSON has no words for."""
    if isinstance(value, bytes):
        return {"base64": b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return {"base64": b64encode(value.tobytes()).decode(), "shape": value.shape}
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _unpacked(value: dict[str, Any]) -> Any:
    if "base64" not in value:
        return value
    data = b64decode(value["base64"])
    return np.frombuffer(data, np.uint8).reshape(value["shape"]) if "shape" in value else data


class ShareStore:
    """Shares of single batches in a folder, each a file that is there as a whole or not at all.

    While one run has the folder, others with the same evaluation keep nothing. Where nothing can be written, what is
    there is read.

    Args:
        folder: of one evaluation.
        trainer: its ranks share the folder.

    Attributes:
        access: what this run may do there: all, read alone (nobody can write to it), or nothing (another run has it).
    """

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.folder, self.rank = folder, trainer.global_rank
        self._lock_file = folder.with_name(f".{folder.name}.lock")
        self._lock = FileLock(self._lock_file)
        access = self._take() if trainer.is_global_zero else "nothing"
        self.access: Literal["all", "read", "nothing"] = trainer.strategy.broadcast(access)

    def _take(self) -> Literal["all", "read", "nothing"]:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            refuse_unwritable(self.folder)
        except Timeout:
            return "nothing"
        except OSError as error:
            if not is_read_only(error):
                raise
            return "read"
        return "all"

    @property
    def count(self) -> int:
        """Batches of this rank that are there."""
        return len(list(self.folder.glob(f"*.{self.rank}.json"))) if self.access != "nothing" else 0

    def get(self, name: str, make: Callable[[], Share]) -> Share:
        """The share of that name; `make` makes it if it is not there."""
        path = self.folder / f"{name}.{self.rank}.json"
        if self.access != "nothing":
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # what is broken is made again
                return Share.from_json(path.read_text(encoding="utf-8"))
        share = make()
        if self.access == "all":
            write_text(path, share.to_json())
        return share

    def release(self) -> None:
        """Leave what is there to another run."""
        self._lock.release()

    def clear(self) -> None:
        """Remove what is there, of all ranks: none of them needs it any more."""
        if self.access == "all":
            shutil.rmtree(self.folder)
            self._lock_file.unlink(missing_ok=True)
            self.release()


def combine(name: str, share: Share, scores: Mapping[str, float]) -> StrategyResult:
    """The result of a strategy, the same on every rank, from the shares of all of them."""
    shares = [share]
    if is_distributed():
        shares *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, share)
    whole = Share()
    for each in shares:
        whole.add(each)
    images = len(whole.rows)
    return StrategyResult(
        name=name,
        overall=scores["overall"],
        tasks={task: score for task, score in scores.items() if task != "overall"},
        rows=sorted(whole.rows, key=lambda row: row["filename"]),
        thumbnails=dict(sorted(whole.thumbnails.items())),
        decoder_forwards=whole.cost.decoder_passes / images,
        verifier_calls=whole.cost.verifier_calls / images,
        tokens=whole.cost.tokens / images,
        seconds=whole.seconds / images,
        objects=whole.objects / images,
        independent={judge: total / images for judge, total in whole.independent.items()},
        stats={name: total / images for name, total in whole.stats.items()},
        stories=whole.stories,
    )
