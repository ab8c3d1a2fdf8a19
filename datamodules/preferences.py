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
from datasets import Dataset, concatenate_datasets
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loaders import make_loader
from datamodules.rollouts import RolloutSpec, collect, provenance, store
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.parm import PARM


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
    """Pairs of the LightningModule's own decoder, with the log-probabilities that it gives them when they are made.

    Rollouts, pairs and reference log-probabilities are stored, keyed by what made them, and made once; a resumed run
    goes on with the pairs that it had. In iterative DPO a new round of rollouts comes from the policy as it then is,
    which is also the round's reference.

    Args:
        reward: scores the images.
        train: sets of rollouts, by name, over the same prompts; images of one prompt are paired whatever their set, so
            that a set of verified ones proposes what is chosen.
        validation: rollouts of prompts that are neither trained nor evaluated on.
        rule: how rollouts become pairs.
        parm_weight: of the probability that PARM gives a finished image, added to its score.
        epochs_per_round: epochs after which new rollouts are made (the Trainer's
            `reload_dataloaders_every_n_epochs`); null for one round.
        folder: where rollouts and pairs are kept.
        seed: of all images.
        collect_batch_size: images decoded at a time.
        batch_size: pairs a training batch, per rank.
    """

    def __init__(
        self,
        reward: GenEvalReward,
        train: Mapping[str, RolloutSpec],
        validation: RolloutSpec,
        rule: PairRule,
        parm_weight: float,
        epochs_per_round: int | None,
        folder: str,
        seed: int,
        collect_batch_size: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.reward = reward
        self.train = train
        self.validation = validation
        self.rule = rule
        self.parm_weight = parm_weight
        self.epochs_per_round = epochs_per_round
        self.folder = Path(folder)
        self.seed = seed
        self.collect_batch_size = collect_batch_size
        self.batch_size = batch_size
        self._folders: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"folders": dict(self._folders)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._folders = dict(state_dict["folders"])

    def _pairs(self, name: str, specs: Mapping[str, RolloutSpec], turn: int = 0) -> Dataset:
        """The pairs of round `turn`; made with the policy of this moment if they are not there yet."""
        assert self.trainer is not None
        key = f"{name}-{turn}"
        if key not in self._folders:
            module, ranks = self.trainer.lightning_module, (self.trainer.global_rank, self.trainer.world_size)
            decoder: Any = module.decoder
            parm: Any = module.parm
            seed = image_seed(self.seed, turn) if turn else self.seed
            made_with = [provenance(spec, decoder, module.judges, seed, False) for spec in specs.values()]  # type: ignore[arg-type]
            about = [made_with, asdict(self.rule), self.parm_weight, fingerprint(parm) if self.parm_weight else None]
            digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
            stored = self.folder / f"{name}-pairs-{digest}"
            sets = [
                collect(
                    spec,
                    self.folder / f"{name}-{set_name}-{digest}",
                    decoder,
                    module.judges,  # type: ignore[arg-type]
                    self.reward,
                    seed,
                    self.collect_batch_size,
                    False,
                    *ranks,
                )
                for set_name, spec in specs.items()
                if not stored.is_dir()
            ]
            if sets and self.trainer.is_global_zero:
                store(self._make(name, concatenate_datasets(sets), decoder, parm), stored)
            self.trainer.strategy.barrier()
            self._folders[key] = str(stored)
        return datasets.load_from_disk(self._folders[key])

    def _make(self, name: str, rollouts: Dataset, decoder: NextTokenDecoder, parm: PARM) -> Dataset:
        columns: Mapping[str, list[Any]] = rollouts.to_dict()
        metadata = [json.loads(text) for text in columns["metadata"]]
        asked = [sum(clause["count"] for clause in row["include"]) for row in metadata]
        surplus = [max(0, found - wanted) for found, wanted in zip(columns["objects"], asked, strict=True)]
        tokens = torch.tensor(columns["tokens"])
        decoder.eval()
        scores = np.array(columns["reward"])
        if self.parm_weight:
            scores = scores + self.parm_weight * self._values(decoder, parm, columns["prompt"], tokens).exp().numpy()
        pairs, dropped = make_pairs(columns["prompt_index"], columns["tokens"], scores.tolist(), surplus, self.rule)
        if not pairs:
            raise ValueError(f"data.{name}: no prompt has two rollouts whose scores differ; nothing to learn from")
        rank_zero_info(f"{name}: {len(pairs)} pairs; dropped: {dict(dropped)}")
        better, worse = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        prompts = [columns["prompt"][row] for row in better]
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
                "chosen_settings": [columns["settings"][row] for row in better],
                "chosen_seed": [columns["seed"][row] for row in better],
                "rejected_seed": [columns["seed"][row] for row in worse],
                **reference,
            }
        )

    def _values(self, decoder: NextTokenDecoder, parm: PARM, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """PARM's log-value of finished images, [N]."""
        size, device = self.collect_batch_size, decoder.rows.device
        parts = [
            parm.values(decoder.evidence(decoder.word_ids(prompts[i : i + size]), part.to(device)), [part.shape[1]])
            for i, part in zip(range(0, len(tokens), size), tokens.split(size), strict=True)
        ]
        return torch.cat(parts)[:, 0].cpu()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        turn = self.trainer.current_epoch // self.epochs_per_round if self.epochs_per_round else 0
        pairs = self._pairs("train", self.train, turn)
        self._pairs("validation", {"plain": self.validation})  # against the policy as it is before training
        return make_loader(pairs, self.trainer, self.batch_size, collate, train=True, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        pairs = self._pairs("validation", {"plain": self.validation})
        return make_loader(pairs, self.trainer, self.collect_batch_size, collate, train=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.val_dataloader()
