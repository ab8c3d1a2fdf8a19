"""When GenEval runs while a model trains."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_modules.backbone.diffusion import DiffusionSampling
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.sample import Sample
from lightning_modules.rewards.geneval import CLASS_NAMES
from tests.helpers.callback import make_callback


def test_what_is_not_the_official_evaluation_is_said() -> None:
    sample = Sample(DiffusionSampling(steps=1, guidance=1.0, size=64))
    strategies = {"sample": sample, "best": BestOfN(sample, n=2, judge="clauses")}
    kinds = {"geneval": None, "strict": None, "clauses": None}
    rewards = [
        SimpleNamespace(detector=SimpleNamespace(class_names=names), kinds=lambda: kinds)
        for names in (CLASS_NAMES, ("star",))
    ]
    coco, shapes = (
        make_callback(reward=reward, strategies=strategies, images_per_prompt=2)._incomparable() for reward in rewards
    )
    ceiling = "best chooses by what it is measured by: it is a ceiling"
    assert shapes == [ceiling]
    assert coco[:3] == [
        ceiling,
        "2 images of each prompt instead of the official 4",
        "not the official prompt set: 0 of 80 single_object prompts",
    ]


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
    callback = make_callback(every_n_epochs=every_n_epochs, reward=SimpleNamespace(kinds=dict))

    def evaluate(*_: Any) -> dict[str, Any]:
        done.append(trainer.current_epoch)
        return {"sample": SimpleNamespace(overall=float(trainer.current_epoch), tasks={}, objects=1.0, independent={})}

    monkeypatch.setattr(callback, "_evaluate", evaluate)
    module: Any = SimpleNamespace(judges={}, log_dict=lambda values, **_: logged.append(dict(values)))
    for trainer.current_epoch in validated:
        callback.on_validation_epoch_end(trainer, module)
    assert done == evaluated
    latest = [max(epoch for epoch in evaluated if epoch <= now) for now in validated]
    assert [values["val/geneval"] for values in logged] == latest
