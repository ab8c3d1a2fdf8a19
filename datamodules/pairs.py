"""Preference pairs from scored rollouts: for one prompt, an image that was better and one that was worse."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class PairRule:
    """How rollouts of a prompt become pairs.

    Attributes:
        per_prompt: pairs of a prompt at most, widest margins first, no image twice; 1 is best against worst, null every
            pair over the margin.
        min_margin: pairs whose scores differ by less are not made.
        surplus_penalty: taken from the score for each object that the prompt does not ask for, at most twice. GenEval
            counts surplus only in its counting task, so a policy aligned to it alone learns to add objects.
        weigh_margins: the loss of a pair is weighed by its margin, beside the balance over tasks.
    """

    per_prompt: int | None = 1
    min_margin: float = 0.05
    surplus_penalty: float = 0.1
    weigh_margins: bool = False

    def __post_init__(self) -> None:
        if self.per_prompt is not None and self.per_prompt < 1:
            raise ValueError(f"data.rule.per_prompt must be at least 1, or null for all, not {self.per_prompt}")
        if self.min_margin <= 0:
            raise ValueError(f"data.rule.min_margin must be above 0, not {self.min_margin}: equal images teach nothing")


@dataclass(frozen=True)
class Pair:
    """Rows of the better and the worse rollout, and by how much their scores differ."""

    chosen: int
    rejected: int
    margin: float


def make_pairs(
    prompt_index: Sequence[int],
    tokens: Sequence[Sequence[int]],
    scores: Sequence[float],
    surplus: Sequence[int],
    rule: PairRule,
) -> tuple[list[Pair], Counter[str]]:
    """Pair the rollouts of each prompt, widest margins first.

    Args:
        prompt_index: which rollouts belong together.
        tokens: the images.
        scores: higher is better.
        surplus: objects that the prompt did not ask for.
        rule: how to pair.

    Returns:
        The pairs, and what was dropped: `duplicates` (rollouts), `ties` (pairs under the margin) and prompts with `no
        contrast`.
    """
    groups: defaultdict[int, list[int]] = defaultdict(list)
    dropped: Counter[str] = Counter()
    seen = set()
    for row, (prompt, image) in enumerate(zip(prompt_index, tokens, strict=True)):
        if (key := (prompt, tuple(image))) in seen:
            dropped["duplicates"] += 1
        else:
            seen.add(key)
            groups[prompt].append(row)
    pairs = []
    for rows in groups.values():
        total = {row: scores[row] - rule.surplus_penalty * min(surplus[row], 2) for row in rows}
        order = sorted(rows, key=lambda row: -total[row])
        ends = zip(order[: len(order) // 2], order[::-1], strict=False)
        considered = list(combinations(order, 2) if rule.per_prompt is None else ends)
        made = [Pair(a, b, total[a] - total[b]) for a, b in considered if total[a] - total[b] >= rule.min_margin]
        dropped["ties"] += len(considered) - len(made)
        dropped["no contrast"] += not made
        pairs += made[: rule.per_prompt]
    return pairs, dropped


def balance(tasks: Sequence[str], shares: Sequence[float]) -> list[float]:
    """Weights, 1 on average, that give each task that occurs the same total, divided within it by `shares`."""
    total: defaultdict[str, float] = defaultdict(float)
    for task, share in zip(tasks, shares, strict=True):
        total[task] += share
    return [len(tasks) * share / (len(total) * total[task]) for task, share in zip(tasks, shares, strict=True)]
