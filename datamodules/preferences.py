"""Preference pairs: for one prompt, an image that was better and one that was worse."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loaders import make_loader
from datamodules.rollouts import RolloutSpec, collect, provenance, store
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.rewards.geneval_reward import GenEvalReward


@dataclass(frozen=True)
class PairRule:
    """How rollouts of a prompt become pairs.

    Attributes:
        per_prompt: pairs of a prompt at most, widest margins first, no image twice on the same side; 1 is best against
            worst.
        min_margin: pairs whose scores differ by less are not made.
        surplus_penalty: taken from the score for each object that the prompt does not ask for, at most twice. GenEval
            counts surplus only in its counting task, so a policy aligned to it alone learns to add objects.
    """

    per_prompt: int = 1
    min_margin: float = 0.05
    surplus_penalty: float = 0.1

    def __post_init__(self) -> None:
        if self.per_prompt < 1:
            raise ValueError(f"pairs need per_prompt of at least 1, not {self.per_prompt}")
        if self.min_margin <= 0:
            raise ValueError(f"pairs need a min_margin above 0, not {self.min_margin}: equal images teach nothing")


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
        The pairs, and how many `duplicates` (rollouts) and prompts with `no contrast` were dropped.
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
        made = [Pair(a, b, total[a] - total[b]) for a, b in ends if total[a] - total[b] >= rule.min_margin]
        dropped["no contrast"] += not made
        pairs += made[: rule.per_prompt]
    return pairs, dropped


def balance(tasks: Sequence[str]) -> list[float]:
    """Weights, 1 on average, that give each task that occurs the same share."""
    count = Counter(tasks)
    return [len(tasks) / (len(count) * count[task]) for task in tasks]


@torch.no_grad()
def sequence_log_probs(decoder: NextTokenDecoder, prompts: Sequence[str], tokens: Tensor, batch_size: int) -> Tensor:
    """log p of whole images [N, T] given their prompts, [N], without gradient."""
    parts = [
        decoder.log_probs(decoder.word_ids(prompts[i : i + batch_size]), part.to(decoder.rows.device)).sum(1).cpu()
        for i, part in zip(range(0, len(tokens), batch_size), tokens.split(batch_size), strict=True)
    ]
    return torch.cat(parts)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Some pairs -> a batch of `DPOModule`."""
    batch: dict[str, Any] = {"prompt": [row["prompt"] for row in rows]}
    for name in ("chosen", "rejected"):
        batch[name] = torch.tensor([row[name] for row in rows])
    for name in ("ref_chosen", "ref_rejected", "weight"):
        batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
    return batch


class PreferencesDataModule(LightningDataModule):
    """Pairs of the LightningModule's own decoder, with the log-probabilities that it gives them at the start.

    Rollouts, pairs and reference log-probabilities are stored, keyed by what made them, and made once.

    Args:
        reward: scores the images.
        train, validation: rollouts that become pairs; of prompts that are not evaluated on.
        rule: how.
        folder: where rollouts and pairs are kept.
        seed: of all images.
        collect_batch_size: images decoded at a time.
        batch_size: pairs a training batch, per rank.
    """

    def __init__(
        self,
        reward: GenEvalReward,
        train: RolloutSpec,
        validation: RolloutSpec,
        rule: PairRule,
        folder: str,
        seed: int,
        collect_batch_size: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.reward = reward
        self.specs = {"train": train, "validation": validation}
        self.rule = rule
        self.folder = Path(folder)
        self.seed = seed
        self.collect_batch_size = collect_batch_size
        self.batch_size = batch_size
        self.pairs: dict[str, Dataset] = {}

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        if not self.pairs:
            module = self.trainer.lightning_module
            self.pairs = {name: self._pairs(name, spec, module) for name, spec in self.specs.items()}

    def _pairs(self, name: str, spec: RolloutSpec, module: Any) -> Dataset:
        """The stored pairs of a set of rollouts, made if they are not there yet."""
        assert self.trainer is not None
        made_with = {**provenance(spec, module.decoder, module.judges, self.seed, False), "rule": asdict(self.rule)}
        key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]
        stored = self.folder / f"{name}-pairs-{key}"
        if not stored.is_dir():
            ranks = self.trainer.global_rank, self.trainer.world_size
            rollouts = collect(
                spec,
                self.folder / f"{name}-rollouts-{key}",
                module.decoder,
                module.judges,
                self.reward,
                self.seed,
                self.collect_batch_size,
                False,
                *ranks,
            )
            if self.trainer.is_global_zero:
                store(self._make(name, rollouts, module.decoder), stored)
            self.trainer.strategy.barrier()
        return datasets.load_from_disk(str(stored))

    def _make(self, name: str, rollouts: Dataset, decoder: NextTokenDecoder) -> Dataset:
        columns: Mapping[str, list[Any]] = rollouts.to_dict()
        metadata = [json.loads(text) for text in columns["metadata"]]
        asked = [sum(clause["count"] for clause in row["include"]) for row in metadata]
        surplus = [max(0, found - wanted) for found, wanted in zip(columns["objects"], asked, strict=True)]
        pairs, dropped = make_pairs(columns["prompt_index"], columns["tokens"], columns["reward"], surplus, self.rule)
        if not pairs:
            raise ValueError(f"data.{name}: no prompt has two rollouts whose scores differ; nothing to learn from")
        rank_zero_info(f"{name}: {len(pairs)} pairs; dropped: {dict(dropped)}")
        better, worse = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        prompts = [columns["prompt"][row] for row in better]
        tokens = torch.from_numpy(np.array(columns["tokens"]))
        decoder.eval()
        reference = {
            side: sequence_log_probs(decoder, prompts, tokens[rows], self.collect_batch_size).tolist()
            for side, rows in (("ref_chosen", better), ("ref_rejected", worse))
        }
        return Dataset.from_dict(
            {
                "prompt": prompts,
                "chosen": tokens[better].tolist(),
                "rejected": tokens[worse].tolist(),
                "margin": [pair.margin for pair in pairs],
                "weight": balance([metadata[row]["tag"] for row in better]),
                "chosen_seed": [columns["seed"][row] for row in better],
                "rejected_seed": [columns["seed"][row] for row in worse],
                **reference,
            }
        )

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        return make_loader(self.pairs["train"], self.trainer, self.batch_size, collate, train=True, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        return make_loader(self.pairs["validation"], self.trainer, self.collect_batch_size, collate, train=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.val_dataloader()
