"""Within-prompt AUC, choosing among k, calibration."""

import pytest
import torch

from lightning_modules.rewards.ranking import RankingMetric, tenths


def test_only_images_of_one_prompt_are_compared() -> None:
    metric = RankingMetric()
    values = torch.tensor([-1.0, -2.0, -9.0, -8.0, -0.5])[:, None].expand(-1, 2)
    correct = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    metric.update(values[:2], correct[:2], torch.tensor([0, 0]))
    metric.update(values[2:], correct[2:], torch.tensor([1, 1, 2]))
    result = metric.compute()
    assert result["auc"].tolist() == [0.5, 0.5]  # prompt 0 right, prompt 1 wrong, prompt 2 has nothing to compare
    assert result["chosen"].tolist() == pytest.approx([2 / 3, 2 / 3])


def test_ties_count_half_and_columns_are_ranked_apart() -> None:
    metric = RankingMetric()
    values = torch.tensor([[-1.0, -1.0], [-1.0, -3.0]])
    metric.update(values, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    assert metric.compute()["auc"].tolist() == [0.5, 1.0]
    assert metric.compute()["chosen"].tolist() == [0.5, 1.0]


def test_without_a_pair_to_compare_there_is_no_auc() -> None:
    metric = RankingMetric()
    metric.update(-torch.rand(4, 2), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1]))
    assert metric.compute()["auc"].isnan().all()


def test_calibration_error_of_a_sure_and_wrong_verifier() -> None:
    metric = RankingMetric()
    metric.update(torch.zeros(10, 1), torch.tensor([1.0] * 3 + [0.0] * 7), torch.zeros(10))
    assert metric.compute()["ece"].item() == pytest.approx(0.7, abs=1e-5)


def test_two_ranks_give_the_result_of_one() -> None:
    torch.manual_seed(0)
    values, correct, group = torch.randn(60, 3), torch.randint(0, 2, (60,)).float(), torch.arange(60) % 7
    whole, half, other = RankingMetric(), RankingMetric(), RankingMetric()
    whole.update(values, correct, group)
    half.update(values[::2], correct[::2], group[::2])
    other.update(values[1::2], correct[1::2], group[1::2])
    half.merge_state(other)
    for name, value in whole.compute().items():
        torch.testing.assert_close(half.compute()[name], value)


def test_tenths_of_64_tokens() -> None:
    assert tenths(64) == [6, 13, 19, 26, 32, 38, 45, 51, 58, 64]
