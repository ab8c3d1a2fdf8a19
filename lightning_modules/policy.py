"""The base of modules that align the shared decoder: the policy, its adapters, and what they export."""

from typing import TYPE_CHECKING

from torch import nn

from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.optim import OptimizerFactory, TrainedModule
from lightning_modules.rewards.parm import PARM

if TYPE_CHECKING:  # needs peft, which only those who use it install
    from lightning_modules.backbone.lora import LoRA


class PolicyModule(TrainedModule):
    """Trains the decoder, or adapters beside its layers.

    Args:
        decoder, parm: the shared decoder, which is trained; the reward model for its verified decoding, if any.
        optimizer, warmup_steps: see `TrainedModule`.
        lora: adapters that are trained instead of the decoder's own weights; null trains these.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        parm: PARM | None,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        lora: "LoRA | None",
    ) -> None:
        super().__init__(optimizer, warmup_steps)
        if lora is not None:
            lora.inject(decoder)
        self.decoder, self.lora = decoder, lora
        self.parm = None if parm is None else parm.requires_grad_(False)
        self.frozen_parts = ("decoder.image_tokenizer", "parm")

    @property
    def exported(self) -> dict[str, nn.Module]:
        if self.lora is not None:
            self.lora.merge(self.decoder)
        return {"decoder": self.decoder}

    def _is_frozen(self, key: str) -> bool:
        beside_adapters = self.lora is not None and key.startswith("decoder.") and not self.lora.is_adapter(key)
        return beside_adapters or super()._is_frozen(key)
