"""PARMModule: trains the reward model on what the frozen shared decoder knows of images with known outcome."""

from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.next_token import Evidence, NextTokenDecoder
from lightning_modules.optim import FrozenPartsMixin, OptimizerFactory, warmup_cosine
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.ranking import RankingMetric, tenths
from lightning_modules.rewards.verifier import Likelihood, Verifier


class PARMModule(FrozenPartsMixin, LightningModule):
    """Binary cross-entropy of the value of every prefix against the outcome of the finished image.

    Batches have `prompt` (B strings), `tokens` [B, T] or `image` (fewer where neighbours share one), `correct` [B] in
    {0, 1}, `clauses` [B, C] (1, 0, or NaN where the prompt does not ask), `free_from` [B] (prefixes that end before it
    are not trained: a verifier steered what came next) and `group` [B] (index of the prompt). With `evidence`, what the
    decoder knew of the tokens when it drew them, no decoder pass is needed.

    Args:
        decoder: the shared decoder, frozen here.
        parm: the reward model.
        optimizer: makes the optimizer from parameters.
        warmup_steps: steps of linear warm-up, then cosine decay to zero.
        clause_weight: of the auxiliary loss that asks which clauses of the prompt hold.
    """

    frozen_parts = ("decoder",)

    def __init__(
        self,
        decoder: NextTokenDecoder,
        parm: PARM,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        clause_weight: float,
    ) -> None:
        super().__init__()
        self.decoder = decoder.eval().requires_grad_(False)
        self.parm = parm
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.clause_weight = clause_weight
        self.ranking = torch.nn.ModuleDict({name: RankingMetric() for name in self.judges})

    @property
    def judges(self) -> dict[str, Verifier[Any]]:
        """The verifiers that strategies can name."""
        return {"parm": self.parm, "likelihood": Likelihood()}

    @property
    def exported(self) -> tuple[str, PARM]:
        """What `task=export` writes: the config node that builds it, and the thing itself."""
        return "parm", self.parm

    def _evidence(self, batch: dict[str, Any]) -> Evidence:
        self.decoder.eval()
        tokens = batch["tokens"] if "tokens" in batch else self.decoder.image_tokenizer.encode(batch["image"])
        word_ids = self.decoder.word_ids(batch["prompt"])
        if "evidence" in batch:
            return self.decoder.recall(word_ids, tokens, **batch["evidence"])
        return self.decoder.evidence(word_ids, tokens)

    def loss(self, evidence: Evidence, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Value loss and clause loss, nats a prediction."""
        batch_size, num_tokens = evidence.log_probs.shape
        if self.parm.causal:
            lengths = torch.arange(1, num_tokens + 1, device=self.device).expand(batch_size, -1)
            logits, clause_logits = self.parm(evidence)
        else:
            span = num_tokens - batch["free_from"].clamp(min=1) + 1
            drawn = (torch.rand(batch_size, device=self.device) * span).long()
            lengths = (batch["free_from"].clamp(min=1) + drawn)[:, None].clamp(max=num_tokens)
            logits, clause_logits = self.parm(evidence, lengths[:, 0])
        trained = (lengths >= batch["free_from"][:, None]).float()
        target = batch["correct"][:, None].expand_as(logits)
        value_loss = F.binary_cross_entropy_with_logits(logits, target, weight=trained, reduction="sum")
        asked = trained[..., None] * (~batch["clauses"].isnan()).float()[:, None]
        clauses = batch["clauses"].nan_to_num()[:, None].expand_as(clause_logits)
        clause_loss = F.binary_cross_entropy_with_logits(clause_logits, clauses, weight=asked, reduction="sum")
        return value_loss / trained.sum().clamp(min=1), clause_loss / asked.sum().clamp(min=1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        value_loss, clause_loss = self.loss(self._evidence(batch), batch)
        self.log_dict({"train/loss": value_loss, "train/clause_loss": clause_loss}, prog_bar=True)
        return value_loss + self.clause_weight * clause_loss

    def _rank(self, batch: dict[str, Any], stage: str) -> None:
        evidence = self._evidence(batch)
        value_loss, _ = self.loss(evidence, batch)
        size = len(batch["prompt"])
        self.log(f"{stage}/loss", value_loss, prog_bar=True, sync_dist=True, batch_size=size)
        for name, judge in self.judges.items():
            values = judge.values(evidence, tenths(self.decoder.num_tokens))
            self.ranking[name].update(values, batch["correct"], batch["group"])  # type: ignore[operator]

    def _log_ranking(self, stage: str) -> None:
        for name, metric in self.ranking.items():
            assert isinstance(metric, RankingMetric)
            result = metric.compute()
            metric.reset()
            log = {}
            for i, auc in enumerate(result["auc"]):
                log[f"{stage}/{name}/auc_{10 * (i + 1)}"] = auc
            log[f"{stage}/{name}/chosen"] = result["chosen"][-1]
            if name == "parm":
                log[f"{stage}/{name}/ece"] = result["ece"][-1]
                log[f"{stage}/{name}/ece_50"] = result["ece"][len(result["ece"]) // 2 - 1]
            self.log_dict(log)
            self.log(f"{stage}/{name}/auc", result["auc"][-1], prog_bar=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._rank(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_ranking("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._rank(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._log_ranking("test")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return warmup_cosine(self, self.optimizer, self.warmup_steps)
