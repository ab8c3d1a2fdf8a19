"""Divergence: when it stops training, when not, and that a resumed run counts on."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.divergence import Divergence

NAMES = "train/reward/geneval", "train/independent/clip"


def make() -> Divergence:
    return Divergence(*NAMES, window=10, errors=4.0)


def steps(callback: Divergence, rise: float, fall: float, count: int = 60, first: int = 0, minibatches: int = 1) -> int:
    """Tell a callback of steps in which the metrics drift, by so much at the end; the step at which it stops, or 0."""
    noise = random.Random(first)
    trainer: Any = SimpleNamespace(should_stop=False, callback_metrics={})
    for step in range(first, first + count):
        values = 0.5 + rise * step / count + noise.gauss(0, 0.02), 1.3 - fall * step / count + noise.gauss(0, 0.05)
        trainer.callback_metrics = dict(zip(NAMES, values, strict=True))
        for _ in range(minibatches):
            callback.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
        if trainer.should_stop:
            return step
    return 0


@pytest.mark.parametrize(
    ("rise", "fall", "stops"), [(0.2, 0.3, True), (0.2, 0.0, False), (0.0, 0.3, False), (-0.2, 0.3, False)]
)
def test_training_stops_where_the_reward_rises_and_the_other_judge_falls(rise: float, fall: float, stops: bool) -> None:
    assert (steps(make(), rise, fall) > 0) == stops


def test_minibatches_of_a_step_count_once() -> None:
    assert steps(make(), 0.2, 0.3, minibatches=4) == steps(make(), 0.2, 0.3)


def test_a_resumed_run_counts_on() -> None:
    begun, resumed = make(), make()
    assert steps(begun, 0.0, 0.0, count=15) == 0
    resumed.load_state_dict(begun.state_dict())
    assert steps(resumed, 0.2, 0.3, count=15, first=15) > 0
    assert steps(make(), 0.2, 0.3, count=15, first=15) == 0  # too few by itself


def test_what_is_not_logged_is_named() -> None:
    trainer: Any = SimpleNamespace(should_stop=False, callback_metrics={"train/reward/geneval": 0.5})
    with pytest.raises(
        ValueError, match=r"reads train/independent/clip, which is not logged \(train/reward/geneval are\)"
    ):
        make().on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window must be at least 2, not 1"):
        Divergence(*NAMES, window=1, errors=4.0)
