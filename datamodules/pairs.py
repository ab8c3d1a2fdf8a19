"""Preference pairs: for one prompt an image that was better and one that was worse, with their reference."""

from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from tqdm import tqdm

from datamodules.data_sets import StoredDataModule, get_rows
from datamodules.preference_rows import SIDES
from lightning_modules.artifacts import Key
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.loading import fingerprint

LABELS = {"reward": "correct", "clauses": "clauses", "grounding": "grounding"}  # of rollouts -> of a batch of PARM


@dataclass(frozen=True)
class PairRule:
    """How rollouts of a prompt become pairs.

    Surplus objects cost something because GenEval counts them in one task only: a policy aligned to it alone learns to
    add objects. Weights are limited because a nearly mastered task has few pairs, which would drown all others.
    """

    per_prompt: int | None = 1  # at most, widest margins first, no image twice; None takes every pair over the margin
    min_margin: float = 0.05  # between the scores of a pair
    surplus_penalty: float = 0.1  # taken from the score for each object that the prompt does not ask for, at most twice
    weigh_margins: bool = False  # the loss of a pair is weighed by its margin, beside the balance over tasks
    max_weight: float = 3.0  # of a pair, where the average is 1

    def __post_init__(self) -> None:
        if self.per_prompt is not None and self.per_prompt < 1:
            raise ValueError(f"data.rule.per_prompt must be at least 1, or null for all, not {self.per_prompt}")
        if self.min_margin <= 0:
            raise ValueError(f"data.rule.min_margin must be above 0, not {self.min_margin}: equal images teach nothing")
        if self.max_weight < 1:
            raise ValueError(f"data.rule.max_weight must be at least 1, the average, not {self.max_weight}")


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
    """Pair the rollouts of each prompt by their scores and numbers of surplus objects, widest margins first.

    Returns the pairs, and how many `duplicates` (rollouts), `ties` (pairs under the margin) and prompts with `no
    contrast` were dropped.
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


def balance(tasks: Sequence[str], shares: Sequence[float], limit: float) -> list[float]:
    """Weigh pairs, 1 on average, so that tasks have equal totals, divided by `shares`; then limit each weight."""
    total: defaultdict[str, float] = defaultdict(float)
    for task, share in zip(tasks, shares, strict=True):
        total[task] += share
    mean = len(tasks) / len(total)
    return [min(mean * share / total[task], limit) for task, share in zip(tasks, shares, strict=True)]


@torch.no_grad()
def reference_log_probs(decoder: TokenDecoder, pairs: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """Return log p of the `chosen` and of the `rejected` images."""
    device = next(decoder.parameters()).device
    chosen, rejected = (torch.tensor(pairs[side], device=device) for side in SIDES)
    chosen, rejected = decoder.pair_log_probs(pairs["prompt"], chosen, rejected, pairs["seed"])
    return {"chosen": chosen.tolist(), "rejected": rejected.tolist()}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Turn pairs into a batch of `DPOModule`; what is known of both sides comes as [2B, ...], chosen ones first."""
    lists = ("prompt", "seed", "ref_chosen", "ref_rejected")
    batch: dict[str, Any] = {name: [row[name] for row in rows] for name in lists}
    for name in SIDES:
        batch[name] = torch.tensor([row[name] for row in rows])
    batch["weight"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
    for name in LABELS.values():
        if f"chosen_{name}" in rows[0]:
            batch[name] = torch.tensor([row[f"{side}_{name}"] for side in SIDES for row in rows], dtype=torch.float32)
    return batch


class PairsDataModule(StoredDataModule):
    """Pairs with the log-probabilities that the reference gives them, stored and made once."""

    gives = "pairs"

    @abstractmethod
    def _pairs(self, name: str) -> Dataset:
        """Return the pairs of `train` (of this epoch) or `validation`, with reference log-probabilities."""

    def _stored(self, name: str, key: Key, make: Callable[[], Dataset]) -> Path:
        """Return the folder of pairs that `key` determines; rank 0 makes them if they are not there yet."""
        decoder: Any = self.trainer.lightning_module.decoder
        key = {**key, "precision": str(self.trainer.precision), "likelihood": decoder.likelihood_key}
        if self.trainer.is_global_zero:
            get_rows(self.cache, name, key, make)
        self.trainer.strategy.barrier()
        return self.cache.path(name, key)

    def _with_reference(self, pairs: Dataset, decoder: TokenDecoder) -> Dataset:
        """Add `ref_chosen` and `ref_rejected`, each side's log-probability under `decoder`, and which decoder it is.

        Device and precision are those of training: a policy that is the reference gives the same to the last bit.
        """
        made_for = [fingerprint(decoder)] * len(pairs)
        pairs = pairs.add_column("seed", list(range(len(pairs)))).add_column("decoder", made_for)
        strategy = self.trainer.strategy
        strategy.precision_plugin.convert_module(decoder.eval().to(strategy.root_device))
        size = self.collect_batch_size
        batches = tqdm(pairs.iter(size), "Reference log-probabilities", -(-len(pairs) // size), unit="batch")
        with strategy.precision_plugin.forward_context():
            parts = [reference_log_probs(decoder, batch) for batch in batches]
        for side in SIDES:
            pairs = pairs.add_column(f"ref_{side}", [value for part in parts for value in part[side]])
        return pairs

    def predict_dataloader(self) -> list[Any]:
        """Make the pairs with the models as they are, and say how many and where; no batches are left to predict."""
        for name in ("train", "validation"):
            pairs = self._pairs(name)
            rank_zero_info(f"{name}: {len(pairs)} pairs in {Path(pairs.cache_files[0]['filename']).parent}")
        return []

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        self._pairs("validation")  # against the policy as it is before training
        return self._loader(self._pairs("train"), collate, train=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self._pairs("validation"), collate, train=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.val_dataloader()
