"""GRPOModule: reinforces the shared decoder online, by groups of its own images (GRPO, arXiv 2402.03300)."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.optim import OptimizerFactory
from lightning_modules.parm import PARMObjective
from lightning_modules.policy import PolicyModule
from lightning_modules.rewards.parm import PARM

if TYPE_CHECKING:  # needs peft, which only those who use it install
    from lightning_modules.backbone.lora import LoRA

Baseline = Literal["mean", "others", "none"]
Scale = Literal["group", "batch", "none"]
Ratio = Literal["step", "sequence", "likelihood"]
_LIMIT = 10.0  # of the logarithm of a ratio, on both sides; beyond, it has no gradient


@dataclass(frozen=True)
class GRPOObjective:
    """Policy gradient with clipped importance ratios and advantages within groups of images of one prompt.

    A step of decoding is a token (next-token decoders) or a set of tokens (mask-token decoders).

    Attributes:
        baseline: taken from each reward: the `mean` of the group, that of its `others` (leave-one-out, arXiv
            2402.14740), or `none`: then rewards are the advantages, and images without any teach nothing.
        scale: advantages are divided by the standard deviation of the `group`, or of the whole `batch` (all groups of a
            round, each around its baseline), or not (`none`, arXiv 2503.20783).
        min_spread: a reward whose standard deviation within a group is not above this says nothing there.
        max_advantage: larger ones are cut to this, on both sides; null cuts none.
        positive_only: images below the baseline teach nothing (rejection-sampling fine-tuning).
        ratio: of probabilities under the policy and under that which drew the images: of each `step`, of the `sequence`
            (geometric mean over its steps, GSPO, arXiv 2507.18071), or none at all: then the loss is the negative
            log-`likelihood` of the images, whoever made them, weighted by advantage. That is the likelihood of
            pre-training, not that of the sampled distribution: to raise a guided probability, the decoder could also
            make good images unlikely without the prompt, which ruins it in a few steps where nothing is pushed down.
        clip_low, clip_high: ratios gain nothing beyond 1 - clip_low and 1 + clip_high (arXiv 2503.14476).
        beta: weight of the KL divergence from the reference, nats a step; 0 needs no reference.
        steps: the first so many steps of decoding teach, where most is decided; null: all. Each is a pass of a
            mask-token decoder, so fewer cost less. Likelihood has no steps.
    """

    baseline: Baseline = "mean"
    scale: Scale = "group"
    min_spread: float = 1e-3
    max_advantage: float | None = None
    positive_only: bool = False
    ratio: Ratio = "step"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("baseline", Baseline), ("scale", Scale), ("ratio", Ratio)):
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"objective.{name} must be one of {', '.join(get_args(known))}, not {value!r}")
        for name in ("min_spread", "clip_low", "clip_high", "beta"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"objective.{name} must be at least 0, not {value}")
        if self.clip_low >= 1:
            raise ValueError(f"objective.clip_low must be below 1, as no ratio is below 0, not {self.clip_low}")
        if self.max_advantage is not None and self.max_advantage <= 0:
            raise ValueError(f"objective.max_advantage must be above 0, or null, not {self.max_advantage}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"objective.steps must be at least 1, or null, not {self.steps}")

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        potentials: Mapping[str, Tensor],
    ) -> Tensor:
        """Advantages [P, G, 1] of G images of each of P prompts, from rewards [P, G] of each judge.

        Each reward is normalised by itself before they are added by their weights: in a sum, the judge with the widest
        scores would drown all others. `potentials` [P, G, S] of some rewards are values of what was there before each
        of S steps. They are taken from the reward (potential-based shaping without discount, Ng et al. 1999), so that
        advantages are of single steps, [P, G, S], and the optimum stays where it is.
        """
        parts = [weight * self._advantage(rewards[name], potentials.get(name)) for name, weight in weights.items()]
        total = torch.stack(torch.broadcast_tensors(*parts)).sum(0)
        if self.positive_only:
            total = total.clamp(min=0)
        return total if self.max_advantage is None else total.clamp(-self.max_advantage, self.max_advantage)

    def _advantage(self, rewards: Tensor, potential: Tensor | None) -> Tensor:
        size, rewards = rewards.shape[1], rewards[..., None]
        std = (rewards - rewards.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
        equal = std <= self.min_spread
        centred = rewards if potential is None else rewards - potential
        if self.baseline != "none":
            centred = (centred - centred.mean(1, keepdim=True)).masked_fill(equal, 0)
        if self.baseline == "others":
            centred = centred * size / max(1, size - 1)  # = reward - mean of the others
        if self.scale == "group":
            return centred / std.masked_fill(equal, 1)
        if self.scale == "batch":
            spread = centred.square().mean().sqrt()
            return centred / (spread if spread > 0 else 1)
        return centred

    def loss(
        self, log_probs: Tensor, recorded: Tensor, advantages: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of B images, a mean over all their steps, and what to log.

        Args:
            log_probs, recorded, reference: of the choices of S steps, [B, S], under the policy, under the policy that
                drew them, and under the reference (None: beta is 0).
            advantages: of the images, [B, 1], or of their steps, [B, S].
        """
        log: dict[str, Tensor] = {}
        if self.ratio == "likelihood":
            loss = -(log_probs * advantages).mean()
        else:
            loss, log = self._clipped_loss(log_probs - recorded, advantages)
        if reference is not None:
            log["kl"] = k3(reference - log_probs).mean()
            loss = loss + self.beta * log["kl"]
        return loss, {name: value.detach() for name, value in log.items()}

    def _clipped_loss(self, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss from log-ratios [B, S] and advantages [B, 1 or S], and what to log."""
        sampled = k3(log_ratio).mean()
        if self.ratio == "sequence":
            log_ratio = log_ratio.mean(1, keepdim=True)
        ratio = log_ratio.clamp(-_LIMIT, _LIMIT).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        low, high = (ratio < 1 - self.clip_low) & (advantage < 0), (ratio > 1 + self.clip_high) & (advantage > 0)
        log = {"clipped_low": low.float().mean(), "clipped_high": high.float().mean(), "kl_sampled": sampled}
        return -torch.minimum(ratio * advantage, clipped * advantage).mean(), log


def k3(log_ratio: Tensor) -> Tensor:
    """Estimate KL(p || q), nats, from log q - log p of samples of p: e^x - x - 1 (Schulman's k3), never below 0.

    Ratios beyond the limit count as that: top-k and top-p give tokens that they cut off no probability at all.
    """
    limited = log_ratio.clamp(-_LIMIT, _LIMIT)
    return limited.expm1() - limited


class GRPOModule(PolicyModule):
    """Reinforces images of which the judges think more than of others of the same prompt.

    Batches have `prompt` (B strings), `tokens` [B, T], `seed` (B numbers), `recorded`, the log-probabilities of the
    choices when they were drawn, [B, S] (an array, not a tensor, which Lightning would round in bfloat16; none where
    images were decoded anew in part), `advantage` (an array [B, 1 or S]), and the `trajectory` where there is one;
    `stats` are numbers about the groups of a round, which are logged; to refit PARM also `labels`, those of
    `PARMObjective.losses`.

    Args:
        decoder, parm, optimizer, warmup_steps, lora, refit, refit_lr: see `PolicyModule`.
        objective: advantages and loss.
        sampling: settings by which the images are drawn: what is trained is the distribution that is sampled.
    """

    learns_from = "groups"
    trains_sharded = False  # the policy decodes its groups with whole weights

    def __init__(
        self,
        decoder: TokenDecoder,
        parm: PARM | None,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        objective: GRPOObjective,
        sampling: Any,
        refit: PARMObjective | None = None,
        refit_lr: float = 1e-4,
        lora: "LoRA | None" = None,
    ) -> None:
        super().__init__(decoder, parm, optimizer, warmup_steps, lora, refit, refit_lr)
        self.objective, self.sampling = objective, sampling
        self.reference: TokenDecoder | None = None
        if objective.beta and lora is None:  # adapters are switched off instead
            shared = {id(decoder.image_tokenizer): decoder.image_tokenizer}
            self.reference = deepcopy(decoder, shared).requires_grad_(False)
            self.frozen_parts = (*self.frozen_parts, "reference")

    def advantages(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], potentials: Mapping[str, Tensor]
    ) -> Tensor:
        """Advantages of groups [P, G, 1 or S]; the data asks for them, to leave out groups that teach nothing."""
        return self.objective.advantages(rewards, weights, potentials)

    def _log_probs(self, decoder: TokenDecoder, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of the choices by which the images of a batch were made, single precision [B, S].

        Where likelihood is learnt, that of the whole image, nats a token, [B, 1].
        """
        if self.objective.ratio == "likelihood":
            whole = decoder.log_probs(batch["prompt"], batch["tokens"], batch["seed"])
            return whole.float()[:, None] / decoder.num_tokens
        read = {name: torch.as_tensor(part, device=self.device) for name, part in batch.get("trajectory", {}).items()}
        trajectory, steps = decoder.trajectory_type(**read) if read else None, self.objective.steps
        return decoder.policy_log_probs(batch["prompt"], batch["tokens"], self.sampling, trajectory, steps).float()

    @torch.no_grad()
    def _reference_log_probs(self, batch: dict[str, Any]) -> Tensor | None:
        if not self.objective.beta:
            return None
        if self.lora is None:
            assert self.reference is not None
            return self._log_probs(self.reference, batch)
        with self.lora.switched_off(self.decoder):
            return self._log_probs(self.decoder, batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        reference = self._reference_log_probs(batch)
        log_probs = self._log_probs(self.decoder, batch)
        advantages = torch.as_tensor(batch["advantage"], device=self.device)[:, : self.objective.steps]
        recorded = log_probs.detach()
        if self.objective.ratio != "likelihood":
            if "recorded" not in batch:
                advice = "module.objective.ratio must be likelihood"
                raise ValueError(f"{advice} where data.spec.strategy decodes images anew in part")
            recorded = torch.as_tensor(batch["recorded"], device=self.device)[:, : self.objective.steps]
        loss, log = self.objective.loss(log_probs, recorded, advantages, reference)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in {**batch["stats"], **log}.items()})
        return loss + self.parm_loss(batch["prompt"], batch["tokens"], batch["labels"]) if self.refit else loss

    def measure(self, batch: Any, stage: str) -> None:
        """Nothing: GenEval's callback measures the policy on prompts of its own."""
