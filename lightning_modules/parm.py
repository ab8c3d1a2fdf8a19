"""PARMModule: trains the reward model on what the frozen shared decoder knows of images with known outcome."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.optim import OptimizerFactory, TrainedModule
from lightning_modules.ranks import mean_over_ranks, uniform_rows
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.ranking import RankingMetric, tenths
from lightning_modules.rewards.verifier import Likelihood, TokenVerifier


def masked_bce(logits: Tensor, targets: Tensor, mask: Tensor, over_ranks: bool = False) -> Tensor:
    """Mean binary cross-entropy over the targets in `mask` (broadcast) that are not NaN, nats; 0 if there are none.

    With `over_ranks` the mean of all ranks' results is that over the targets of all of them.
    """
    weight = (mask & ~targets.isnan()).float()
    total = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), weight=weight, reduction="sum")
    count = mean_over_ranks(weight.sum()) if over_ranks else weight.sum()
    return total / (count + (count == 0))


@dataclass(frozen=True)
class PARMObjective:
    """Binary cross-entropy of the value of every prefix against the outcome of the finished image.

    Attributes:
        clause_weight, grounding_weight: of the auxiliary losses that ask which clauses of the prompt hold, and which
            tokens show what which word names.
        feature_dropout: fraction of the training rows without the decoder's features given the prompt (`PARM.forward`:
            not trusted). They are easier to learn than the image, but misled the decoder where it drew something wrong.
        finished: fraction of the images of mask-token decoders that are read after the last step, others after any. Of
            next-token decoders one pass reads all prefixes.
    """

    clause_weight: float = 0.5
    grounding_weight: float = 2.0
    feature_dropout: float = 0.5
    finished: float = 0.5

    def __post_init__(self) -> None:
        for name in ("feature_dropout", "finished"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")

    def losses(
        self, parm: PARM, features: DecoderFeatures, labels: Mapping[str, Tensor], trusted: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of value (`loss`), clauses and grounding, nats a prediction.

        The features are about finished images; for a PARM that is not causal, about grids on the way to them. Labels
        are `correct` [B] in {0, 1}, `clauses` [B, C] and `grounding` [B, T, L] (1, 0, or NaN where the prompt does not
        ask), `first_unverified` [B] (prefixes that end before it are not trained: a verifier steered what came next).
        `trusted` (see `PARM.forward`) is given in training, where the means are those over the targets of all ranks.
        """
        over_ranks = trusted is not None
        logits, clause_logits, match_logits = parm(features, trusted)
        known, trained = (torch.ones_like(each, dtype=torch.bool) for each in (features.log_probs, logits))
        if features.undecided is not None:
            known = ~features.undecided
        else:
            lengths = torch.arange(1, logits.shape[1] + 1, device=logits.device)
            trained = lengths >= labels["first_unverified"].clamp(min=1)[:, None]
        correct, clauses = labels["correct"][:, None], labels["clauses"][:, None]
        return {
            "loss": masked_bce(logits, correct.expand_as(logits), trained, over_ranks),
            "clause_loss": masked_bce(clause_logits, clauses.expand_as(clause_logits), trained[..., None], over_ranks),
            "grounding_loss": masked_bce(match_logits, labels["grounding"], known[..., None], over_ranks),
        }

    def training_losses(self, parm: PARM, features: DecoderFeatures, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses under feature dropout, and their weighted sum (`total`)."""
        log_probs = features.log_probs
        trusted = uniform_rows(len(log_probs), device=log_probs.device) >= self.feature_dropout
        losses = self.losses(parm, features, labels, trusted)
        auxiliary = self.clause_weight * losses["clause_loss"] + self.grounding_weight * losses["grounding_loss"]
        return losses | {"total": losses["loss"] + auxiliary}


class PARMModule(TrainedModule):
    """Trains the reward model; measures how well it ranks images of one prompt.

    Batches have `prompt` (B strings), `tokens` [B, T] or `image` (fewer where neighbours share one), the labels of
    `PARMObjective.losses` and `group` [B] (index of the prompt). `features`, from when the tokens were drawn, save the
    decoder pass. Batches of mask-token decoders have a `trajectory`, and of the features the statistics alone. The
    decoder is frozen here. For `optimizer` and `warmup_steps` see `TrainedModule`.
    """

    exported_parts = ("parm",)
    frozen_parts = ("decoder",)
    trains_sharded = False  # the frozen decoder runs in parts
    learns_from = "rollouts"

    def __init__(
        self,
        decoder: TokenDecoder,
        parm: PARM,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        objective: PARMObjective,
    ) -> None:
        super().__init__(optimizer, warmup_steps)
        if parm.causal != decoder.causal:
            wanted = str(decoder.causal).lower()
            raise ValueError(f"parm.module.causal must be {wanted} for a {type(decoder).__name__}")
        self.decoder = decoder.eval().requires_grad_(False)
        self.parm, self.objective = parm, objective
        self.ranking = torch.nn.ModuleDict({name: RankingMetric() for name in self.verifiers})

    @property
    def verifiers(self) -> dict[str, TokenVerifier[Any]]:
        """The verifiers that strategies can name."""
        return {"parm": self.parm, "likelihood": Likelihood()}

    def _features(self, batch: dict[str, Any], fraction: float | None = None) -> DecoderFeatures:
        """Return the decoder's features of a batch; of grids at a fraction of the steps, by default drawn for each."""
        self.decoder.eval()
        if "tokens" not in batch:
            batch = batch | {"tokens": self.decoder.image_tokenizer.encode(batch["image"])}
        return self.decoder.training_features(batch, self.objective.finished, fraction)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.objective.training_losses(self.parm, self._features(batch), batch)
        total = losses.pop("total")
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, prog_bar=True)
        return total

    def measure(self, batch: dict[str, Any], stage: str) -> None:
        lengths = tenths(self.decoder.num_tokens)
        on_the_way = [length / self.decoder.num_tokens for length in lengths]
        with isolate_rng():
            torch.manual_seed(0)  # of causal ones one pass shows every prefix
            seen = [self._features(batch, fraction) for fraction in ([None] if self.parm.causal else on_the_way)]
        for features in seen:
            losses = self.objective.losses(self.parm, features, batch)
            named = {f"{stage}/{name}": loss for name, loss in losses.items()}
            self.log_dict(named, sync_dist=True, batch_size=len(batch["prompt"]))
        for name, judge in self.verifiers.items():
            values = torch.cat([judge.values(features, lengths) for features in seen], dim=1)
            self.ranking[name].update(values, batch["correct"], batch["group"])  # type: ignore[operator]

    def _log_ranking(self, stage: str) -> None:
        for name, metric in self.ranking.items():
            assert isinstance(metric, RankingMetric)
            result = metric.compute()
            metric.reset()
            auc, chosen, ece = result["auc"], result["chosen"], result["ece"]
            log = {f"auc_{10 * i}": each for i, each in enumerate(auc, 1)}
            log |= {"chosen": chosen[-1], "ece": ece[-1], "ece_50": ece[len(ece) // 2 - 1]}
            self.log_dict({f"{stage}/{name}/{key}": value for key, value in log.items()}, sync_dist=True)
            self.log(f"{stage}/{name}/auc", auc[-1], prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self._log_ranking("val")

    def on_test_epoch_end(self) -> None:
        self._log_ranking("test")
