"""The ranking quality of verifiers: within-prompt AUC, choosing among k, calibration, along an image."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.utilities import dim_zero_cat


def tenths(num_tokens: int) -> list[int]:
    """Prefix lengths at each tenth of an image."""
    return [max(1, round(num_tokens * tenth / 10)) for tenth in range(1, 11)]


class RankingMetric(Metric):
    """Ranking quality of log-values against correctness, images compared within their prompt.

    Update with values [B, P] (P prefix lengths), correct [B] (0 or 1) and group [B] (which prompt). Gives `auc` [P],
    the fraction of correct-wrong pairs of a prompt that are ordered right, ties half, nan without any; `chosen` [P],
    that of prompts whose highest-valued image is correct, ties sharing; `ece` [P], exp(value)'s calibration error.
    """

    full_state_update = False
    values: list[Tensor]
    correct: list[Tensor]
    group: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("values", "correct", "group"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor, correct: Tensor, group: Tensor) -> None:
        self.values.append(values.detach().float())
        self.correct.append(correct)
        self.group.append(group)

    def compute(self) -> dict[str, Tensor]:
        values, correct, group = (dim_zero_cat(state) for state in (self.values, self.correct, self.group))
        wins = values.new_zeros(values.shape[1])
        pairs, chosen = 0, []
        for g in group.unique():
            own, right = values[group == g], correct[group == g] > 0.5
            good, bad = own[right], own[~right]  # [n, P]
            difference = good[:, None] - bad[None]
            wins += (difference > 0).sum((0, 1)) + 0.5 * (difference == 0).sum((0, 1))
            pairs += difference.shape[0] * difference.shape[1]
            best = (own == own.amax(0)).float()  # [n, P]; ties share the choice
            chosen.append((best * right[:, None]).sum(0) / best.sum(0))
        probability = values.clamp(max=0).exp()
        ece = [binary_calibration_error(p, correct.long(), n_bins=10, norm="l1") for p in probability.unbind(1)]
        return {"auc": wins / pairs, "chosen": torch.stack(chosen).mean(0), "ece": torch.stack(ece)}
