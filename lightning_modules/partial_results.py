"""Results of a part of the prompts: of a batch, kept until an evaluation is complete, or of a rank, gathered."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from filelock import FileLock, Timeout
from torch.serialization import safe_globals

from lightning_modules.artifacts import ArtifactCache, Key
from lightning_modules.backbone.decoder import Cost
from lightning_modules.broken_files import read_torch
from lightning_modules.files import whole
from lightning_modules.ranks import broadcast, gather, rank
from lightning_modules.report.drawing import Curve, Frame, ImageStrip, Section, TraceView
from lightning_modules.report.results import StrategyResult
from lightning_modules.rewards.geneval_metric import GenEvalMetric


@dataclass
class PartialResult:
    """Sums over some images of one strategy; see `StrategyResult`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    thumbnails: dict[int, torch.Tensor] = field(default_factory=dict)
    traces: dict[int, TraceView] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    objects: int = 0
    independent: dict[str, float] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)

    def add(self, other: "PartialResult") -> None:
        """Add the results of other images."""
        self.rows += other.rows
        self.thumbnails |= other.thumbnails
        self.traces |= other.traces
        self.cost.add(other.cost)
        self.seconds += other.seconds
        self.objects += other.objects
        for own, others in ((self.independent, other.independent), (self.stats, other.stats)):
            for name, total in others.items():
                own[name] = own.get(name, 0.0) + total


# What files of batches may hold.
_CLASSES: list[Any] = [PartialResult, Cost, TraceView, Section, ImageStrip, Frame, Curve]


def gather_results(name: str, partial: PartialResult) -> StrategyResult:
    """Return the result of a strategy, the same on every rank, from the partial results of all of them."""
    total, metric = PartialResult(), GenEvalMetric(sync_on_compute=False)
    for each in gather(partial):
        total.add(each)
    metric.update([row["tag"] for row in total.rows], [row["correct"] for row in total.rows])
    scores, images = {task: float(score) for task, score in metric.compute().items()}, len(total.rows)
    return StrategyResult(
        name=name,
        overall=scores.pop("overall"),
        tasks=scores,
        rows=sorted(total.rows, key=lambda row: row["filename"]),
        thumbnails={i: pixels.numpy() for i, pixels in sorted(total.thumbnails.items())},
        decoder_passes=total.cost.decoder_passes / images,
        verifier_calls=total.cost.verifier_calls / images,
        tokens=total.cost.tokens / images,
        image_decodes=total.cost.image_decodes / images,
        seconds=total.seconds / images,
        objects=total.objects / images,
        independent={judge: value / images for judge, value in total.independent.items()},
        stats={name: value / images for name, value in total.stats.items()},
        traces=total.traces,
    )


class KeptBatches:
    """Results of the batches of one evaluation, a file each, until the `with` block ends without an error.

    Attributes:
        access: what this run may do with them: all, read (nobody can write), or nothing (another run is at work).
    """

    def __init__(self, parts: ArtifactCache) -> None:
        self.parts, self.folder = parts, parts.root
        self._lock_file = self.folder.with_name(f".{self.folder.name}.run")
        self._lock = FileLock(self._lock_file)
        self.access: Literal["all", "read", "nothing"] = "nothing"

    def __enter__(self) -> Self:
        self.access = broadcast(self._take() if rank() == 0 else "nothing")
        if rank() == 0 and self.access != "nothing" and (count := len(list(self.folder.glob("*.pt")))):
            print(f"The evaluation resumes; batches decoded and judged before: {count} ({self.folder})")
        if rank() == 0 and self.access == "read":
            print(f"scores_dir: nothing can be written to {self.folder.parent}: no batch of this evaluation is kept")
        return self

    def _take(self) -> Literal["all", "read", "nothing"]:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self.parts.open()
        except Timeout:
            return "nothing"
        except OSError:  # a result without kept batches is better than none
            return "read"
        return "all"

    def get(self, key: Key, make: Callable[[], PartialResult]) -> PartialResult:
        """Return the result of the batch of that key, which is made if it is not there."""
        path = self.parts.path("batch.pt", key)
        if self.access != "nothing":
            with suppress(OSError, ValueError), safe_globals(_CLASSES):  # what is broken is made again
                if isinstance(result := read_torch(path, thorough=True), PartialResult):
                    return result
        result = make()
        if self.access == "all":
            with whole(path) as partial:
                torch.save(result, partial)
        return result

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self.access == "all" and rank() == 0:
            shutil.rmtree(self.folder)
            self._lock_file.unlink(missing_ok=True)
        self._lock.release()
