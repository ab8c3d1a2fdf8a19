"""Rendered images with true and altered captions, for PARM's start (no decoder's mistakes seen yet)."""

from typing import Any

import numpy as np
import torch

from datamodules.images import as_pixels
from datamodules.shapes.captions import CaptionPair
from datamodules.streams import StreamDataModule


class CaptionsDataModule(StreamDataModule[CaptionPair]):
    """Batches of B images with two captions each, which stand side by side; see `PARMModule` for the fields."""

    @staticmethod
    def collate(samples: list[tuple[int, CaptionPair]]) -> dict[str, Any]:
        pairs = [pair for _, pair in samples]
        verdicts = [verdict for pair in pairs for verdict in pair.verdicts]
        group = torch.tensor([index for index, _ in samples]).repeat_interleave(2)
        return {
            "image": as_pixels([pair.image for pair in pairs]),
            "prompt": [caption["prompt"] for pair in pairs for caption in pair.captions],
            "correct": torch.tensor([float(verdict.correct) for verdict in verdicts]),
            "clauses": torch.tensor([verdict.clauses for verdict in verdicts]),
            "grounding": torch.from_numpy(np.stack([found for pair in pairs for found in pair.grounding])),
            "free_from": torch.zeros_like(group),
            "group": group,
        }
