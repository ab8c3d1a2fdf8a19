"""GeneratorModule: a decoder that is not trained here, to compare with."""

from typing import Any

from lightning import LightningModule

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.rewards.verifier import Verifier


class GeneratorModule(LightningModule):
    """Has a decoder to be evaluated (by callbacks) and nothing to be trained or tested on its own.

    Args:
        decoder: makes the images.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @property
    def judges(self) -> dict[str, Verifier[Any]]:
        """None of its own: strategies can name rewards."""
        return {}

    def test_step(self, batch: list[dict[str, Any]], batch_idx: int) -> None:
        """Nothing: callbacks do what there is to do when all prompts have passed."""
