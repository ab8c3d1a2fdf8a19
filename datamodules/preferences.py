"""Preference pairs for DPO: made from rollouts, round after round, or read from a file."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loaders import make_loader
from datamodules.pairs import PairRule, balance, make_pairs
from datamodules.preference_files import PreferenceFile
from datamodules.rollouts import RolloutSpec, collect, provenance, store
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.strategy import Judges, judged
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.verifier import Reward, Verifier

SIDES = ("chosen", "rejected")
_LABELS = {"reward": "correct", "clauses": "clauses", "grounding": "grounding"}  # of rollouts -> of a batch of PARM


@torch.no_grad()
def sequence_log_probs(decoder: NextTokenDecoder, prompts: Sequence[str], tokens: Tensor, batch_size: int) -> Tensor:
    """log p of whole images [N, T] given their prompts, [N], without gradient."""
    decoder.eval()
    parts = [
        decoder.log_probs(decoder.word_ids(prompts[i : i + batch_size]), part.to(decoder.rows.device)).sum(1).cpu()
        for i, part in zip(range(0, len(tokens), batch_size), tokens.split(batch_size), strict=True)
    ]
    return torch.cat(parts)


@torch.no_grad()
def ensemble(
    decoder: NextTokenDecoder, judges: Judges, weights: Mapping[str, float], rollouts: Dataset, batch_size: int
) -> np.ndarray:
    """Weighted sum of what judges say of finished rollouts, [N]; a verifier's value counts as a probability."""
    columns: Mapping[str, list[Any]] = rollouts.select_columns(["prompt", "metadata", "tokens", "reward"]).to_dict()
    metadata = [json.loads(text) for text in columns["metadata"]]
    tokens = torch.tensor(columns["tokens"], device=decoder.rows.device)
    scores = np.zeros(len(tokens))
    for name, weight in weights.items():
        if name == "geneval":  # the label that rollouts have anyway
            scores += weight * np.array(columns["reward"])
            continue
        judge = judges[name]
        for start in range(0, len(tokens), batch_size):
            part = slice(start, start + batch_size)
            evidence = decoder.evidence(decoder.word_ids(columns["prompt"][part]), tokens[part])
            values = judged(judge, decoder, metadata[part], tokens[part], evidence)
            scores[part] += weight * (values.exp() if isinstance(judge, Verifier) else values).cpu().numpy()
    return scores


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Some pairs -> a batch of `DPOModule`; what is known of both sides comes as [2B, ...], chosen ones first."""
    batch: dict[str, Any] = {"prompt": [row["prompt"] for row in rows]}
    for name in SIDES:
        batch[name] = torch.tensor([row[name] for row in rows])
    for name in ("ref_chosen", "ref_rejected", "weight"):
        batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
    for name in _LABELS.values():
        if f"chosen_{name}" in rows[0]:
            batch[name] = torch.tensor([row[f"{side}_{name}"] for side in SIDES for row in rows], dtype=torch.float32)
    return batch


class PairsDataModule(LightningDataModule):
    """Pairs with the log-probabilities that the reference gives them, stored by what made them and made once.

    Args:
        folder: where rollouts, pairs and log-probabilities are kept.
        batch_size: pairs a training batch, per rank.
        collect_batch_size: images decoded, encoded or scored at a time.
    """

    def __init__(self, folder: str, batch_size: int, collect_batch_size: int) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.collect_batch_size = collect_batch_size

    @abstractmethod
    def _pairs(self, name: str) -> Dataset:
        """The pairs of `train` (of this epoch) or `validation`, with reference log-probabilities."""

    def _stored(self, name: str, about: Any, make: Callable[[], Dataset]) -> Path:
        """The folder of a data set that `about` determines; rank 0 makes it if it is not there yet."""
        assert self.trainer is not None
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.folder / f"{name}-{digest}"
        if self.trainer.is_global_zero and not folder.is_dir():
            store(make(), folder)
        self.trainer.strategy.barrier()
        return folder

    def _with_reference(self, pairs: Dataset, decoder: NextTokenDecoder) -> Dataset:
        """Add `ref_chosen` and `ref_rejected`, each side's log-probability under `decoder`, and which decoder it is."""
        prompts: list[str] = list(pairs["prompt"])
        for side in SIDES:
            tokens = torch.tensor(pairs[side][:])
            reference = sequence_log_probs(decoder, prompts, tokens, self.collect_batch_size)
            pairs = pairs.add_column(f"ref_{side}", reference.tolist())
        return pairs.add_column("decoder", [fingerprint(decoder)] * len(pairs))

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        self._pairs("validation")  # against the policy as it is before training
        return make_loader(self._pairs("train"), self.trainer, self.batch_size, collate, train=True, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        return make_loader(self._pairs("validation"), self.trainer, self.collect_batch_size, collate, train=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.val_dataloader()


class PreferencesDataModule(PairsDataModule):
    """Pairs of the LightningModule's own decoder's rollouts.

    In iterative DPO a new round of rollouts comes from the policy as it then is. A resumed run goes on with the pairs
    that it had.

    Args:
        reward: labels the images (`geneval`).
        rewards: further judges of finished images, by name.
        scores: what makes one image better than another: weights of judges, of `geneval`, of `rewards` and of the
            LightningModule's own (`parm`); a verifier's value counts as a probability.
        train: sets of rollouts, by name, over the same prompts; images of one prompt are paired whatever their set, so
            that a set of verified ones proposes what is chosen.
        validation: rollouts of prompts that are neither trained nor evaluated on.
        rule: how rollouts become pairs.
        reference: whose log-probabilities pairs are given: the policy's at the start of the `round` or of the `run`.
        epochs_per_round: epochs after which new rollouts are made (the Trainer's
            `reload_dataloaders_every_n_epochs`); null for one round.
        seed: of all images.
        folder, collect_batch_size, batch_size: see `PairsDataModule`.
    """

    def __init__(
        self,
        reward: GenEvalReward,
        rewards: Mapping[str, Reward],
        scores: Mapping[str, float],
        train: Mapping[str, RolloutSpec],
        validation: RolloutSpec,
        rule: PairRule,
        reference: Literal["round", "run"],
        epochs_per_round: int | None,
        seed: int,
        folder: str,
        collect_batch_size: int,
        batch_size: int,
    ) -> None:
        super().__init__(folder, batch_size, collect_batch_size)
        if reference not in ("round", "run"):
            raise ValueError(f"data.reference must be 'round' or 'run', not {reference!r}")
        self.reward = reward
        self.rewards = rewards
        self.scores = scores
        self.train = train
        self.validation = validation
        self.rule = rule
        self.reference = reference
        self.epochs_per_round = epochs_per_round
        self.seed = seed
        self._folders: dict[str, str] = {}
        self._start: dict[str, Tensor] | None = None  # the reference's weights, where it is the run's
        self._start_key = ""

    def state_dict(self) -> dict[str, Any]:
        return {"folders": dict(self._folders)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._folders = dict(state_dict["folders"])

    def setup(self, stage: str) -> None:
        """Refuse scores of unknown judges; keep the weights that a reference of the run needs.

        Lightning calls this before it restores a checkpoint, so that a resumed run has the same reference.
        """
        known = self._judges()
        for name in self.scores:
            if name not in known:
                raise ValueError(f"data.scores names the judge {name!r}; there are: {', '.join(known)}")
        if self.reference == "run" and stage == "fit":
            assert self.trainer is not None
            weights: Mapping[str, Tensor] = self.trainer.lightning_module.decoder.state_dict()  # type: ignore[union-attr]
            self._start = {key: value.detach().cpu().clone() for key, value in weights.items()}
            self._start_key = fingerprint(self.trainer.lightning_module.decoder)  # type: ignore[arg-type]

    def _judges(self) -> dict[str, Any]:
        assert self.trainer is not None
        own: Any = self.trainer.lightning_module.judges
        return {"geneval": self.reward, **self.rewards, **own}

    def _pairs(self, name: str) -> Dataset:
        assert self.trainer is not None
        round_length = self.epochs_per_round if name == "train" else None
        turn = self.trainer.current_epoch // round_length if round_length else 0
        key = f"{name}-{turn}"
        if key not in self._folders:
            specs = self.train if name == "train" else {"plain": self.validation}
            self._folders[key] = str(self._make(name, specs, turn))
        return datasets.load_from_disk(self._folders[key])

    def _make(self, name: str, specs: Mapping[str, RolloutSpec], turn: int) -> Path:
        """Collect rollouts with the policy of this moment, pair them, and give them their reference."""
        assert self.trainer is not None
        decoder: Any = self.trainer.lightning_module.decoder
        judges = self._judges()
        seed = image_seed(self.seed, turn) if turn else self.seed
        sets, made_with = [], []
        for set_name, spec in specs.items():
            made_with.append(provenance(spec, decoder, judges, seed, False))
            digest = hashlib.sha256(json.dumps(made_with[-1], sort_keys=True).encode()).hexdigest()[:12]
            ranks = self.trainer.global_rank, self.trainer.world_size
            folder = self.folder / f"{set_name}-{digest}"
            sets.append(
                collect(spec, folder, decoder, judges, self.reward, seed, self.collect_batch_size, False, *ranks)
            )
        verifiers = {
            judge: fingerprint(judges[judge]) for judge in self.scores if isinstance(judges[judge], torch.nn.Module)
        }
        about: list[Any] = [made_with, asdict(self.rule), dict(self.scores), verifiers]
        if self._start is not None:
            about.append(self._start_key)
        return self._stored(f"{name}-pairs", about, lambda: self._pair(name, concatenate_datasets(sets), decoder))

    def _pair(self, name: str, rollouts: Dataset, decoder: NextTokenDecoder) -> Dataset:
        columns: Mapping[str, list[Any]] = rollouts.to_dict()
        metadata = [json.loads(text) for text in columns["metadata"]]
        asked = [sum(clause["count"] for clause in row["include"]) for row in metadata]
        surplus = [max(0, found - wanted) for found, wanted in zip(columns["objects"], asked, strict=True)]
        scores = ensemble(decoder.eval(), self._judges(), self.scores, rollouts, self.collect_batch_size)
        pairs, dropped = make_pairs(columns["prompt_index"], columns["tokens"], scores.tolist(), surplus, self.rule)
        if not pairs:
            raise ValueError(f"data.{name}: no prompt has two rollouts whose scores differ; nothing to learn from")
        rank_zero_info(f"{name}: {len(pairs)} pairs; dropped: {dict(dropped)}")
        rows = {"chosen": [pair.chosen for pair in pairs], "rejected": [pair.rejected for pair in pairs]}
        shares = [pair.margin if self.rule.weigh_margins else 1.0 for pair in pairs]
        made = {
            "prompt": [columns["prompt"][row] for row in rows["chosen"]],
            "margin": [pair.margin for pair in pairs],
            "weight": balance([metadata[row]["tag"] for row in rows["chosen"]], shares),
        }
        for side in SIDES:
            made[side] = [columns["tokens"][row] for row in rows[side]]
            for source, label in _LABELS.items():
                made[f"{side}_{label}"] = [columns[source][row] for row in rows[side]]
            for source in ("settings", "seed"):
                made[f"{side}_{source}"] = [columns[source][row] for row in rows[side]]
        policy = None
        if self._start is not None:  # the reference borrows the policy's place: there is one model in memory
            policy = {key: value.clone() for key, value in decoder.state_dict().items()}
            decoder.load_state_dict(self._start)
        try:
            return self._with_reference(Dataset.from_dict(made), decoder)
        finally:
            if policy is not None:
                decoder.load_state_dict(policy)


class PreferenceFilesDataModule(PairsDataModule):
    """Pairs from files; the reference is the decoder as it is before training.

    Args:
        train, validation: where they are; images are encoded once.
        folder, collect_batch_size, batch_size: see `PairsDataModule`.
    """

    def __init__(
        self, train: PreferenceFile, validation: PreferenceFile, folder: str, collect_batch_size: int, batch_size: int
    ) -> None:
        super().__init__(folder, batch_size, collect_batch_size)
        self.files = {"train": train, "validation": validation}
        self._made: dict[str, Dataset] = {}

    def setup(self, stage: str) -> None:
        """Read, check, encode and score everything before training starts."""
        assert self.trainer is not None
        decoder: Any = self.trainer.lightning_module.decoder
        for name in self.files.keys() - self._made.keys():
            source = self.files[name]
            about = [source.digest(), dict(source.columns), fingerprint(decoder.image_tokenizer)]
            encoded = self._stored(f"{name}-encoded", about, partial(source.encode, decoder, self.collect_batch_size))
            rows = datasets.load_from_disk(str(encoded))
            about.append(fingerprint(decoder))
            pairs = self._stored(f"{name}-pairs", about, partial(self._with_reference, rows, decoder))
            self._made[name] = datasets.load_from_disk(str(pairs))

    def _pairs(self, name: str) -> Dataset:
        return self._made[name]
