"""When GenEval runs while a model trains."""

from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.geneval import GenEvalCallback


@pytest.mark.parametrize(
    ("every_n_epochs", "validated", "evaluated"),
    [(1, [0, 1, 2], [0, 1, 2]), (2, [1, 3, 5], [1, 3, 5]), (4, [1, 3, 5, 7], [1, 3, 7])],
    ids=["every epoch", "every validation", "every other validation"],
)
def test_epochs_are_counted_as_the_trainer_counts_them(
    monkeypatch: pytest.MonkeyPatch, every_n_epochs: int, validated: list[int], evaluated: list[int]
) -> None:
    """The first validation always has a score; from then on it is the latest one's."""
    done: list[int] = []
    logged: list[dict[str, float]] = []
    trainer: Any = SimpleNamespace(sanity_checking=False, current_epoch=0, loggers=[])
    callback = GenEvalCallback(
        reward=None,  # type: ignore[arg-type]
        strategies={"sample": None},  # type: ignore[dict-item]
        validation_strategies=["sample"],
        test_strategies=None,
        monitor="sample",
        validation_prompts=[],
        test_prompts=[],
        images_per_prompt=1,
        batch_size=1,
        every_n_epochs=every_n_epochs,
        seed=0,
        folder="",
        sheet_prompts=0,
        rewards={},
        holdout=[],
    )

    def evaluate(*_: Any) -> dict[str, Any]:
        done.append(trainer.current_epoch)
        return {"sample": SimpleNamespace(overall=float(trainer.current_epoch), tasks={}, objects=1.0, holdout={})}

    monkeypatch.setattr(callback, "_evaluate", evaluate)
    module: Any = SimpleNamespace(log_dict=lambda values, **_: logged.append(dict(values)))
    for trainer.current_epoch in validated:
        callback.on_validation_epoch_end(trainer, module)
    assert done == evaluated
    latest = [max(epoch for epoch in evaluated if epoch <= now) for now in validated]
    assert [values["val/geneval"] for values in logged] == latest
