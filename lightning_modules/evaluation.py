"""EvaluationModule: a decoder, and a PARM, that are measured as they are."""

from typing import Any

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.optim import ResumableModule
from lightning_modules.rewards.parm import PARM


class EvaluationModule(ResumableModule):
    """For `task=evaluate` of weights as they are: callbacks decode prompts of their own, so there is no data."""

    learns_from = None

    def __init__(self, decoder: Decoder, parm: PARM | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.parm = parm

    def test_dataloader(self) -> list[int]:
        """One empty batch: without any, the Trainer would not test at all."""
        return [0]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: what is measured is measured by callbacks."""
