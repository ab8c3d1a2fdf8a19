"""EvaluationModule: a decoder that is measured as it is."""

from typing import Any

from lightning import LightningModule

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.rewards.verifier import Verifier


class EvaluationModule(LightningModule):
    """For `task=evaluate` of published weights: callbacks decode prompts of their own, so there is no data.

    Args:
        decoder: what is measured.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @property
    def judges(self) -> dict[str, Verifier[Any]]:
        """None of its own; see `judges` of GenEvalCallback."""
        return {}

    def test_dataloader(self) -> list[int]:
        """One empty batch: without any, the Trainer would not test at all."""
        return [0]

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Nothing: what is measured is measured by callbacks."""
