"""Pairs from rollouts: who is chosen, who is dropped, and how tasks are balanced."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from datamodules.pairs import Pair, PairRule, PairsDataModule, balance, make_pairs
from lightning_modules.backbone.mask_likelihood import MaskEstimate
from tests.helpers.models import make_masked

IMAGES = [[i] for i in range(8)]


def test_the_best_stands_against_the_worst() -> None:
    pairs, dropped = make_pairs([0, 0, 0, 1, 1, 1], IMAGES[:6], [0.2, 0.9, 0.5, 0.3, 0.1, 0.0], [0] * 6, PairRule())
    assert pairs == [Pair(1, 0, pytest.approx(0.7)), Pair(3, 5, pytest.approx(0.3))]
    assert not +dropped


def test_widest_margins_come_first_and_no_image_twice() -> None:
    pairs, _ = make_pairs([0] * 5, IMAGES[:5], [0.0, 1.0, 0.4, 0.8, 0.1], [0] * 5, PairRule(per_prompt=9))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(1, 0), (3, 4)]


def test_prompts_without_contrast_and_duplicates_are_dropped_and_counted() -> None:
    images = [[1], [1], [2], [3], [4]]
    pairs, dropped = make_pairs([0, 0, 0, 1, 1], images, [1, 1, 0, 1, 1], [0] * 5, PairRule())
    assert pairs == [Pair(0, 2, 1.0)]
    assert dropped == {"duplicates": 1, "ties": 1, "no contrast": 1}


def test_of_equally_correct_images_the_one_without_surplus_is_chosen() -> None:
    pairs, _ = make_pairs([0, 0, 0], IMAGES[:3], [1, 1, 1], [1, 0, 9], PairRule())
    assert pairs == [Pair(1, 2, pytest.approx(0.2))]
    correct_first, _ = make_pairs([0, 0], IMAGES[:2], [1, 0], [5, 0], PairRule())
    assert correct_first == [Pair(0, 1, pytest.approx(0.8))]  # surplus never outweighs being right


def test_all_pairs_over_the_margin() -> None:
    rule = PairRule(per_prompt=None, min_margin=0.5)
    pairs, dropped = make_pairs([0, 0, 0], IMAGES[:3], [1.0, 0.7, 0.0], [0] * 3, rule)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {(0, 2), (1, 2)}
    assert dropped["ties"] == 1


def test_tasks_weigh_the_same() -> None:
    weights = balance(["colors"] * 3 + ["position"], [1.0] * 4, 3.0)
    assert weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])


def test_no_pair_outweighs_a_handful_of_others() -> None:
    weights = balance(["colors"] * 299 + ["position"], [1.0] * 300, 3.0)
    assert weights[-1] == 3.0 and weights[0] == pytest.approx(150 / 299)


def test_margins_share_the_weight_of_their_task() -> None:
    weights = balance(["colors", "colors", "position"], [0.9, 0.3, 0.1], 3.0)
    assert weights == pytest.approx([1.125, 0.375, 1.5])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"per_prompt": 0}, "per_prompt must be at least 1, or null for all, not 0"),
        ({"min_margin": 0.0}, "min_margin must be above 0, not 0.0"),
        ({"max_weight": 0.5}, "max_weight must be at least 1, the average, not 0.5"),
    ],
)
def test_impossible_rules_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PairRule(**settings)


def test_log_probabilities_estimated_otherwise_are_stored_apart(tmp_path: Path) -> None:
    def folder(estimate: MaskEstimate, precision: str = "32-true") -> Path:
        data = PairsDataModule(str(tmp_path), 1, 1)
        module = SimpleNamespace(decoder=make_masked(estimate))
        strategy = SimpleNamespace(barrier=lambda: None)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            is_global_zero=True, strategy=strategy, lightning_module=module, precision=precision
        )
        return data._stored("pairs", {"the": "same"}, lambda: Dataset.from_dict({"x": [1]}))

    assert folder(MaskEstimate()) == folder(MaskEstimate()) != folder(MaskEstimate(n_masks=8))
    assert folder(MaskEstimate()) != folder(MaskEstimate(), "bf16-mixed")
