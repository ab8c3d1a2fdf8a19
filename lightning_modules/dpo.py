"""DPOModule: aligns the shared decoder to preferences (arXiv 2305.18290; for image tokens, arXiv 2501.13926)."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.optim import OptimizerFactory
from lightning_modules.parm import PARMObjective
from lightning_modules.policy import PolicyModule
from lightning_modules.ranks import is_distributed
from lightning_modules.rewards.parm import PARM

if TYPE_CHECKING:  # needs peft, which only those who use it install
    from lightning_modules.backbone.lora import LoRA


class PreferenceLoss(Protocol):
    """Loss of each pair [B], from log-probabilities of whole sequences [B] under the policy and the reference."""

    def __call__(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor: ...


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """-log σ(β ((log π(x⁺) - log π_ref(x⁺)) - (log π(x⁻) - log π_ref(x⁻)))), arXiv 2305.18290, equation 7."""
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def compact(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 1.0) -> Tensor:
    """-log σ(β (s(x⁺) - s(x⁻))), s = log π: no reference holds the policy back; β 1 is the method's."""
    return -F.logsigmoid(beta * (chosen - rejected))


class DPOModule(PolicyModule):
    """Raises the log-probability of chosen images against that of rejected ones of the same prompt.

    Batches have `prompt` (B strings), `chosen` and `rejected` [B, T] tokens, `ref_chosen` and `ref_rejected`, their
    log-probabilities under the reference (B numbers, not a tensor, which Lightning would round in bfloat16), `seed` (B
    numbers) and `weight` [B] of each pair; to refit PARM also the labels of `PARMObjective.losses` for both sides,
    [2B, ...], chosen ones first.

    Args:
        decoder, parm, optimizer, warmup_steps, lora, refit, refit_lr: see `PolicyModule`.
        loss: of a pair.
        sft_weight: of the negative log-likelihood of the chosen image, nats a token; keeps it from falling.
        max_fall: training stops when chosen images are this much less likely than under the reference, nats an image.
    """

    learns_from = "pairs"

    def __init__(
        self,
        decoder: TokenDecoder,
        parm: PARM | None,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        loss: PreferenceLoss,
        sft_weight: float,
        max_fall: float,
        refit: PARMObjective | None,
        refit_lr: float,
        lora: "LoRA | None" = None,
    ) -> None:
        super().__init__(decoder, parm, optimizer, warmup_steps, lora, refit, refit_lr)
        self.loss, self.sft_weight, self.max_fall = loss, sft_weight, max_fall

    def measure(self, batch: dict[str, Any], stage: str) -> Tensor:
        prompts, seeds = batch["prompt"], batch["seed"]
        chosen, rejected = self.decoder.pair_log_probs(prompts, batch["chosen"], batch["rejected"], seeds)
        reference = (batch["ref_chosen"], batch["ref_rejected"])
        ref_chosen, ref_rejected = torch.tensor(reference, dtype=torch.float32, device=self.device)
        losses = self.loss(chosen, rejected, ref_chosen, ref_rejected)
        loss = (losses * batch["weight"]).mean() - self.sft_weight * chosen.mean() / self.decoder.num_tokens
        gain_chosen, gain_rejected = chosen.detach() - ref_chosen, rejected.detach() - ref_rejected
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=stage != "train", batch_size=len(losses))
        log = {
            "rewards/chosen": gain_chosen.mean(),
            "rewards/rejected": gain_rejected.mean(),
            "rewards/margins": (gain_chosen - gain_rejected).mean(),
            "rewards/accuracies": (gain_chosen > gain_rejected).float().mean(),
            "logps/chosen": chosen.detach().mean(),
            "logps/rejected": rejected.detach().mean(),
            # KL(reference || policy), from images that the reference drew
            "kl": -(gain_chosen + gain_rejected).mean() / 2,
        }
        named = {f"{stage}/{name}": value for name, value in log.items()}
        self.log_dict(named, sync_dist=stage != "train", batch_size=len(losses))
        if stage == "train":
            self._refuse_collapse(-gain_chosen.mean())
        return loss

    def _refuse_collapse(self, fall: Tensor) -> None:
        """Raise ValueError, on every rank at once, when chosen images have become too unlikely."""
        if is_distributed():
            torch.distributed.all_reduce(fall, torch.distributed.ReduceOp.MAX)
        if fall > self.max_fall:
            less = f"chosen images became {fall:.1f} nats less likely than under the reference"
            advice = "the policy is collapsing; lower the learning rate or raise beta or module.sft_weight"
            raise ValueError(f"{less}, more than module.max_fall={self.max_fall}: {advice}")

    def _refit_loss(self, batch: dict[str, Any]) -> Tensor:
        """Loss of PARM on both sides' images, read by the policy as it is now."""
        if "correct" not in batch:
            raise ValueError("module.refit needs pairs made from rollouts: images from files have no labels")
        tokens = torch.cat([batch["chosen"], batch["rejected"]])
        first_unverified = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        return self.parm_loss(batch["prompt"] * 2, tokens, batch | {"first_unverified": first_unverified})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.measure(batch, "train")
        return loss + self._refit_loss(batch) if self.refit else loss
