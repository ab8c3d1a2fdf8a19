"""What ranks found of their shares of the prompts, put together."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from callbacks.drawing import Story
from callbacks.report import StrategyResult
from lightning_modules.backbone.decoder import Cost
from lightning_modules.ranks import is_distributed


@dataclass
class Share:
    """What one rank found for one strategy."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    thumbnails: dict[int, np.ndarray] = field(default_factory=dict)
    stories: dict[int, Story] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    objects: int = 0
    holdout: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    notes: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


def combine(name: str, share: Share, scores: Mapping[str, float]) -> StrategyResult:
    """The result of a strategy, the same on every rank, from the shares of all of them."""
    shares = [share]
    if is_distributed():
        shares *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, share)
    rows = sorted((row for share in shares for row in share.rows), key=lambda row: row["filename"])
    thumbnails: dict[int, np.ndarray] = {}
    told: dict[int, Story] = {}
    for share in shares:
        thumbnails |= share.thumbnails
        told |= share.stories
    return StrategyResult(
        name=name,
        overall=scores["overall"],
        tasks={task: score for task, score in scores.items() if task != "overall"},
        rows=rows,
        thumbnails=dict(sorted(thumbnails.items())),
        decoder_forwards=sum(share.cost.decoder_passes for share in shares) / len(rows),
        verifier_calls=sum(share.cost.verifier_calls for share in shares) / len(rows),
        tokens=sum(share.cost.tokens for share in shares) / len(rows),
        seconds=sum(share.seconds for share in shares) / len(rows),
        objects=sum(share.objects for share in shares) / len(rows),
        holdout={judge: sum(share.holdout[judge] for share in shares) / len(rows) for judge in shares[0].holdout},
        notes={note: sum(share.notes[note] for share in shares) / len(rows) for note in shares[0].notes},
        stories=told,
    )
