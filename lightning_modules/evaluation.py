"""EvaluationModule: a decoder, and a PARM, that are measured as they are."""

from typing import Any

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.optim import ResumableModule
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import Likelihood, Verifier


class EvaluationModule(ResumableModule):
    """For `task=evaluate` of weights as they are: callbacks decode prompts of their own, so there is no data.

    Args:
        decoder: what is measured.
        parm: a reward model for strategies, if any.
    """

    learns_from = None

    def __init__(self, decoder: Decoder, parm: PARM | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.parm = parm

    @property
    def verifiers(self) -> dict[str, Verifier[Any]]:
        """The verifiers that strategies can name; decoders of pixels have none."""
        likelihood: dict[str, Verifier[Any]] = {"likelihood": Likelihood()}
        return (likelihood if self.decoder.has_likelihood else {}) | ({"parm": self.parm} if self.parm else {})

    def test_dataloader(self) -> list[int]:
        """One empty batch: without any, the Trainer would not test at all."""
        return [0]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: what is measured is measured by callbacks."""
