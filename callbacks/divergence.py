"""Divergence: stops training that pleases the reward alone."""

from math import sqrt
from statistics import mean, variance
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class Divergence(Callback):
    """Stops training when the reward has risen and a judge that has no say has fallen: the policy games the reward.

    The means of the first and the last steps are compared. A difference counts if it is larger than so many standard
    errors.

    Args:
        reward, independent: names of the logged metrics.
        window: steps at each end, at least 2; of a step that learns in several minibatches the metrics count once.
        errors: standard errors of a difference.
    """

    def __init__(self, reward: str, independent: str, window: int, errors: float) -> None:
        if window < 2:
            raise ValueError(f"callbacks.divergence.window must be at least 2, not {window}")
        self.reward, self.independent, self.window, self.errors = reward, independent, window, errors
        self.seen: list[tuple[float, float]] = []  # reward and independent score of each round

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = [*map(tuple, state_dict["seen"])]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = trainer.callback_metrics
        if missing := {self.reward, self.independent} - {*metrics}:
            known = ", ".join(sorted(name for name in metrics if name.startswith("train/")))
            out = "~callbacks.divergence leaves this rule out"
            raise ValueError(f"callbacks.divergence reads {min(missing)}, which is not logged ({known} are); {out}")
        now = float(metrics[self.reward]), float(metrics[self.independent])
        if self.seen[-1:] == [now]:
            return
        self.seen.append(now)
        if len(self.seen) < 2 * self.window or trainer.should_stop:
            return
        reward, independent = (self._change(list(values)) for values in zip(*self.seen, strict=True))
        if reward > self.errors and independent < -self.errors:
            trainer.should_stop = True
            rise = f"{self.reward} has risen by {reward:.1f} standard errors"
            rank_zero_info(f"Training stops: {rise}, and {self.independent} has fallen by {-independent:.1f}")

    def _change(self, values: list[float]) -> float:
        """The last steps' mean minus the first ones', in standard errors."""
        first, last = values[: self.window], values[-self.window :]
        error = sqrt((variance(first) + variance(last)) / self.window)
        return (mean(last) - mean(first)) / max(error, 1e-12)
