"""Preference pairs for DPO from the decoder's own rollouts, round after round."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.pairs import LABELS, SIDES, PairRule, PairsDataModule, balance, make_pairs
from datamodules.rollouts import RolloutSpec, collect, identity, provenance
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.strategy import Judges, judged, judges_of
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.verifier import Reward, Verifier

# What rollouts are labelled with anyway: whether all is right, and the share of what the prompt asks that is.
_LABELS = {"geneval": "reward", "clauses": "clauses"}


@torch.no_grad()
def ensemble(
    decoder: TokenDecoder, judges: Judges, weights: Mapping[str, float], rollouts: Dataset, batch_size: int
) -> np.ndarray:
    """Weighted sum of what judges say of finished rollouts, [N]; a verifier's value counts as a probability."""
    wanted = ["prompt", "metadata", "tokens", *_LABELS.values()]
    columns: Mapping[str, list[Any]] = rollouts.select_columns(wanted).to_dict()
    metadata = [json.loads(text) for text in columns["metadata"]]
    tokens = torch.tensor(columns["tokens"], device=next(decoder.parameters()).device)
    scores = np.zeros(len(tokens))
    for name, weight in weights.items():
        if name in _LABELS:
            label = np.array(columns[_LABELS[name]]).reshape(len(tokens), -1)
            scores += weight * np.nanmean(label, axis=1)
            continue
        judge = judges[name]
        for start in range(0, len(tokens), batch_size):
            part = slice(start, start + batch_size)
            evidence = decoder.evidence(columns["prompt"][part], tokens[part])
            values = judged(judge, decoder, metadata[part], tokens[part], evidence)
            scores[part] += weight * (values.exp() if isinstance(judge, Verifier) else values).cpu().numpy()
    return scores


class PreferencesDataModule(PairsDataModule):
    """Pairs of the LightningModule's own decoder's rollouts.

    In iterative DPO a new round of rollouts comes from the policy as it then is. A resumed run goes on with the pairs
    that it had.

    Args:
        reward: labels the images (`geneval`).
        rewards: further judges of finished images, by name.
        scores: what makes one image better than another: weights of `geneval` (all is right), of `clauses` (the share
            of what the prompt asks that is), of `strict` (and counts are exact), of `rewards` and of the
            LightningModule's own judges (`parm`); a verifier's value counts as a probability.
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

    @property
    def teachers(self) -> set[str]:
        """Names of the judges that have a say in what is trained on."""
        proposing = {name for spec in self.train.values() for name in judges_of(spec.strategy)}
        return {name for name, weight in self.scores.items() if weight} | proposing

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
        return {**self.reward.kinds(), **self.rewards, **own}

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
        trainer = self.trainer
        decoder: Any = trainer.lightning_module.decoder
        judges = self._judges()
        seed = image_seed(self.seed, turn) if turn else self.seed
        sets, made_with = [], []
        for set_name, whole in specs.items():
            spec = whole.of_round(turn)
            made_with.append(provenance(spec, decoder, judges, self.reward, seed))
            digest = hashlib.sha256(json.dumps(made_with[-1], sort_keys=True).encode()).hexdigest()[:12]
            run = self.trainer.global_rank, self.trainer.world_size, lambda: trainer.received_sigterm
            folder = self.folder / f"{set_name}-{digest}"
            sets.append(collect(spec, folder, decoder, judges, self.reward, seed, self.collect_batch_size, False, *run))
        scored_by = {name: identity(judges[name]) for name in self.scores if name not in _LABELS}
        about: list[Any] = [made_with, asdict(self.rule), dict(self.scores), scored_by]
        if self._start is not None:
            about.append(self._start_key)
        return self._stored(f"{name}-pairs", about, lambda: self._pair(name, concatenate_datasets(sets), decoder))

    def _pair(self, name: str, rollouts: Dataset, decoder: TokenDecoder) -> Dataset:
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
            "weight": balance([metadata[row]["tag"] for row in rows["chosen"]], shares, self.rule.max_weight),
        }
        for side in SIDES:
            made[side] = [columns["tokens"][row] for row in rows[side]]
            for source, label in LABELS.items():
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
