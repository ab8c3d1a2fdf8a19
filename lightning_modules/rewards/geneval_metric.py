"""GenEval's scores from single verdicts: the official summary of stored rows, a metric across processes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.rewards.geneval_metadata import TASKS


@dataclass(frozen=True)
class TaskScore:
    """Correct images out of all images of one task."""

    correct: int
    total: int

    @property
    def score(self) -> float:
        return self.correct / self.total


@dataclass(frozen=True)
class Summary:
    """Scores of one run; `str()` of it is the official printout."""

    total_images: int
    total_prompts: int
    correct_images: float  # share of images
    correct_prompts: float  # share of prompts with at least one correct image: grows with the images per prompt
    tasks: dict[str, TaskScore]  # in order of first appearance

    @property
    def overall(self) -> float:
        """The headline: plain mean over the tasks present, whatever their sizes."""
        return sum(task.score for task in self.tasks.values()) / len(self.tasks)

    def __str__(self) -> str:
        tasks = [f"{tag:<16} = {t.score:.2%} ({t.correct} / {t.total})\n" for tag, t in self.tasks.items()]
        return (
            f"Summary\n=======\nTotal images: {self.total_images}\nTotal prompts: {self.total_prompts}\n"
            f"% correct images: {self.correct_images:.2%}\n% correct prompts: {self.correct_prompts:.2%}\n\n"
            f"Task breakdown\n==============\n{''.join(tasks)}\n"
            f"Overall score (avg. over tasks): {self.overall:.5f}\n"
        )


def summarize(rows: Iterable[Mapping[str, Any]]) -> Summary:
    """Sum up result rows with `tag`, `correct` and `metadata`, the JSON text that tells prompts apart.

    Raises ValueError if there are no rows.
    """
    images: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for row in rows:
        images.setdefault(row["tag"], []).append(bool(row["correct"]))
        prompts[row["metadata"]] = prompts.get(row["metadata"], False) or bool(row["correct"])
    if not images:
        raise ValueError("there are no GenEval results to summarize")
    tasks = {tag: TaskScore(sum(correct), len(correct)) for tag, correct in images.items()}
    every = [verdict for correct in images.values() for verdict in correct]
    return Summary(len(every), len(prompts), sum(every) / len(every), sum(prompts.values()) / len(prompts), tasks)


class GenEvalMetric(Metric):
    """Share of correct images per task and the plain mean over the tasks present, summed over all processes.

    Whatever feeds it must show every image once: padding that a distributed sampler adds would count twice.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", default=torch.zeros(len(TASKS), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros(len(TASKS), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, tags: Sequence[str], correct: Tensor | Sequence[bool]) -> None:
        """Add B images: their tasks and whether each is correct, [B].

        Raises:
            ValueError: a tag is not one of `TASKS`, or there are not as many verdicts as tags.
        """
        if unknown := set(tags) - set(TASKS):
            raise ValueError(f"unknown GenEval tags {sorted(unknown)}, known are {', '.join(TASKS)}")
        verdicts = torch.as_tensor(correct, device=self.total.device).long()
        if verdicts.shape != (len(tags),):
            raise ValueError(f"{len(tags)} tags need verdicts of shape [{len(tags)}], found {list(verdicts.shape)}")
        tasks = torch.tensor([TASKS.index(tag) for tag in tags], dtype=torch.long, device=self.total.device)
        self.correct.index_add_(0, tasks, verdicts)
        self.total.index_add_(0, tasks, torch.ones_like(verdicts))

    def compute(self) -> dict[str, Tensor]:
        """Scores in [0, 1] of the tasks seen, in official order, and `overall`, their mean (NaN if none)."""
        seen = self.total > 0
        scores = self.correct[seen] / self.total[seen]
        names = [task for task, present in zip(TASKS, seen.tolist(), strict=True) if present]
        return {**dict(zip(names, scores, strict=True)), "overall": scores.mean()}
