"""The base of modules that align the shared decoder: the policy, its adapters, and what they export."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.optim import OptimizerFactory, TrainedModule, trainable
from lightning_modules.parm import PARMObjective
from lightning_modules.rewards.parm import PARM

if TYPE_CHECKING:  # needs peft, which only those who use it install
    from lightning_modules.backbone.lora import LoRA


class PolicyModule(TrainedModule):
    """Trains the decoder, or adapters beside its layers.

    Args:
        decoder, parm: the shared decoder, which is trained; the reward model for its verified decoding, if any.
        optimizer, warmup_steps: see `TrainedModule`.
        lora: adapters that are trained instead of the decoder's own weights; null trains these.
        refit, refit_lr: loss and learning rate by which PARM learns from the same images, to follow the policy that it
            reads; null: it does not.
    """

    exported_parts = ("decoder",)

    def __init__(
        self,
        decoder: TokenDecoder,
        parm: PARM | None,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        lora: "LoRA | None",
        refit: PARMObjective | None,
        refit_lr: float,
    ) -> None:
        if refit is not None and parm is None:
            raise ValueError("module.refit needs module.parm, the PARM that learns")
        super().__init__(optimizer, warmup_steps)
        if lora is not None:
            lora.inject(decoder)
        self.decoder, self.lora, self.refit, self.refit_lr = decoder, lora, refit, refit_lr
        self.parm = None if parm is None else parm.requires_grad_(refit is not None)
        self.frozen_parts = ("decoder.image_tokenizer",) if refit else ("decoder.image_tokenizer", "parm")

    @property
    def exported(self) -> dict[str, nn.Module]:
        if self.lora is not None:
            self.lora.merge(self.decoder)
        return super().exported | ({"parm": self.parm} if self.refit and self.parm else {})

    def trained(self) -> list[Any]:
        groups: list[dict[str, Any]] = [{"params": trainable(self.decoder)}]
        if self.refit and self.parm:
            groups.append({"params": trainable(self.parm), "lr": self.refit_lr})
        return groups

    def parm_loss(self, prompts: Sequence[str], tokens: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """Loss of PARM on images [B, T], read by the policy as it is now; for `labels` see `PARMObjective.losses`."""
        assert self.refit and self.parm
        losses = self.refit.training_losses(self.parm, self.decoder.features(prompts, tokens), labels)
        self.log("train/parm_loss", losses["loss"], prog_bar=True)
        return losses["total"]

    def _is_frozen(self, key: str) -> bool:
        beside_adapters = self.lora is not None and key.startswith("decoder.") and not self.lora.is_adapter(key)
        return beside_adapters or super()._is_frozen(key)
