"""GenEvalCallback: says when a model is evaluated by GenEval, and logs the results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_modules.decoding.strategy import Judges
from lightning_modules.evaluator import Evaluation, Evaluator, Prompts
from lightning_modules.report.media import log_images, log_report
from lightning_modules.report.report import write_report
from lightning_modules.report.results import RunInfo
from lightning_modules.report.tables import print_table
from lightning_modules.runs.checkpoints import shown
from lightning_modules.runs.checks import refuse_unknown_strategies


@dataclass(eq=False)
class GenEvalCallback(Callback):
    """GenEval at validation epoch ends (on validation prompts) and in testing (on evaluation prompts).

    Validation logs `val/geneval` where it evaluates: in its first epoch, and every `every_n_epochs`.

    Attributes:
        validation_strategies: names of the strategies that validation decodes by.
        test_strategies: the same of testing; null: all of them.
        monitor: the strategy whose score is `val/geneval`.
        before_training: the test that ends training runs strategies that ask a trained verifier a second time, with it
            as it was before.
        validation_prompts, test_prompts: GenEval metadata.
        every_n_epochs: how often validation runs it.
        run: for titles.
    """

    evaluator: Evaluator
    validation_strategies: Sequence[str]
    test_strategies: Sequence[str] | None
    monitor: str
    before_training: bool
    validation_prompts: Prompts
    test_prompts: Prompts
    every_n_epochs: int
    folder: str
    run: RunInfo

    def __post_init__(self) -> None:
        self._untrained: Judges = {}
        self._has_evaluated = False
        refuse_unknown_strategies(vars(self), self.evaluator.strategies)

    def state_dict(self) -> dict[str, Any]:
        return {"has_evaluated": self._has_evaluated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._has_evaluated = state_dict["has_evaluated"]

    def evaluation(self, pl_module: LightningModule, device: torch.device, testing: bool) -> Evaluation:
        """Return what a test, or a validation, evaluates."""
        decoder: Any = pl_module.decoder
        if testing:
            names = self.test_strategies or list(self.evaluator.strategies)
            return Evaluation(decoder, device, self.test_prompts, names, self._untrained)
        prompts, names = self.validation_prompts, self.validation_strategies
        return Evaluation(decoder, device, prompts, names, {}, with_trace=False, key="geneval.validation_prompts")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        evaluation = self.evaluation(pl_module, trainer.strategy.root_device, stage == "test")
        self.evaluator.prepare(evaluation, training=stage == "fit")  # by now the data has said which judges teach
        if stage == "fit" and self.before_training:  # a checkpoint is restored after this
            self._untrained = self.evaluator.judges.copy_trained()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the score of an earlier validation: early stopping would count it once more."""
        trainer.callback_metrics.pop("val/geneval", None)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = not self._has_evaluated or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.sanity_checking or not due:
            return
        evaluation = self.evaluation(pl_module, pl_module.device, testing=False)
        result = self.evaluator.evaluate(evaluation, asked_to_stop=lambda: trainer.received_sigterm)
        self._has_evaluated = True
        scores = {**result.scores("val"), "val/geneval": result.strategies[self.monitor].overall}
        pl_module.log_dict(scores, sync_dist=True)  # all ranks have the same, or Lightning warns
        log_images(trainer, "val", result)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluation = self.evaluation(pl_module, pl_module.device, testing=True)
        with self.evaluator.resumed(evaluation, lambda: trainer.received_sigterm) as result:
            pl_module.log_dict(result.scores("test"), sync_dist=True)
            if trainer.is_global_zero:
                folder = Path(self.folder)
                write_report(folder, result, replace(self.run, weights=_weights(trainer)))
                print(*result.warnings, sep="\n", end="\n" if result.warnings else "")
                print_table(result.strategies)
                log_images(trainer, "test", result)
                log_report(trainer, folder)


def _weights(trainer: Trainer) -> str:
    """Say which weights a test evaluates."""
    if trainer.ckpt_path is not None:
        return shown(str(trainer.ckpt_path))
    return f"last weights, step {trainer.global_step}" if trainer.global_step else "weights of the config"
