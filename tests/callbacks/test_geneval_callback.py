"""When GenEval runs while a model trains."""

from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.geneval import GenEvalCallback
from lightning_modules.decoding.sample import Sample
from lightning_modules.report.results import EvaluationResult, RunInfo, StrategyResult


@pytest.mark.parametrize(
    ("every_n_epochs", "validated", "evaluated"),
    [(1, [0, 1, 2], [0, 1, 2]), (2, [1, 3, 5], [1, 3, 5]), (4, [1, 3, 5, 7], [1, 3, 7])],
    ids=["every epoch", "every validation", "every other validation"],
)
def test_epochs_are_counted_as_the_trainer_counts_them(
    every_n_epochs: int, validated: list[int], evaluated: list[int]
) -> None:
    """The first validation always has a score; from then on scores are logged where they are measured."""
    done: list[int] = []
    logged: list[dict[str, float]] = []
    trainer: Any = SimpleNamespace(sanity_checking=False, current_epoch=0, global_step=0, loggers=[])

    def evaluate(*_: Any, **__: Any) -> EvaluationResult:
        done.append(trainer.current_epoch)
        rows = [{"tag": "colors", "prompt": "a red star", "correct": True}]
        result = StrategyResult("sample", float(trainer.current_epoch), {"colors": 1.0}, rows, {}, 1, 0, 0.1, 1.0, {})
        return EvaluationResult({}, [], {"sample": result})

    evaluator: Any = SimpleNamespace(strategies={"sample": Sample(None)}, evaluate=evaluate)
    callback = GenEvalCallback(
        evaluator, ["sample"], None, "sample", False, [], [], every_n_epochs, "", RunInfo("", [])
    )
    module: Any = SimpleNamespace(decoder=None, device=None, log_dict=lambda values, **_: logged.append(dict(values)))
    for trainer.current_epoch in validated:
        callback.on_validation_epoch_end(trainer, module)
    assert done == evaluated
    assert [values["val/geneval"] for values in logged] == evaluated


@pytest.mark.parametrize(
    ("validated", "tested", "monitor", "said"),
    [
        (["verified"], None, "sample", "validation_strategies names the strategy 'verified'; there are: sample, more"),
        (["sample"], ["beam"], "sample", "test_strategies names the strategy 'beam'"),
        (["sample"], None, "beam", "monitor names the strategy 'beam'"),
        (
            ["sample"],
            None,
            "more",
            "monitor is 'more', and that is not among callbacks.geneval.valid",
        ),
    ],
)
def test_strategies_that_are_not_there_are_named(
    validated: list[str], tested: list[str] | None, monitor: str, said: str
) -> None:
    evaluator: Any = SimpleNamespace(strategies={"sample": Sample(None), "more": Sample(None)})
    with pytest.raises(ValueError, match=rf"^callbacks\.geneval\.{said}"):
        GenEvalCallback(evaluator, validated, tested, monitor, False, [], [], 1, "", RunInfo("", []))


def test_early_stopping_counts_only_what_was_measured() -> None:
    scores = iter([0.5, 0.4, 0.6, 0.7])

    def evaluate(*_: Any, **__: Any) -> EvaluationResult:
        rows = [{"tag": "colors", "prompt": "a red star", "correct": True}]
        return EvaluationResult(
            {}, [], {"sample": StrategyResult("sample", next(scores), {}, rows, {}, 1, 0, 0, 1, {})}
        )

    evaluator: Any = SimpleNamespace(
        strategies={"sample": Sample(None)}, evaluate=evaluate, prepare=lambda *_, **__: None
    )
    geneval = GenEvalCallback(evaluator, ["sample"], None, "sample", False, [], [], 2, "", RunInfo("", []))
    stop = EarlyStopping("val/geneval", patience=2, mode="max", strict=False, check_on_train_epoch_end=False)
    model: Any = BoringModel()
    model.decoder = None
    trainer = Trainer(
        accelerator="cpu", max_epochs=7, limit_train_batches=1, limit_val_batches=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, callbacks=[geneval, stop],
    )  # fmt: skip
    trainer.fit(model)
    assert trainer.current_epoch == 7 and next(scores, None) is None and stop.best_score == pytest.approx(0.7)
