"""Preference pairs for DPO from the decoder's own rollouts, round after round."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.data_sets import load_rows
from datamodules.pairs import LABELS, PairRule, PairsDataModule, balance, make_pairs
from datamodules.preference_rows import SIDES
from datamodules.rollouts import RolloutCollector, RolloutSpec
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.cache_key import key_of
from lightning_modules.decoding.strategy import Judges, judged
from lightning_modules.rewards.registry import JudgeRegistry

# What rollouts are labelled with anyway: whether all is right, and the share of what the prompt asks that is.
_LABELS = {"geneval": "reward", "clauses": "clauses"}


@torch.no_grad()
def ensemble(
    decoder: TokenDecoder,
    judges: Judges,
    weights: Mapping[str, float],
    columns: Mapping[str, list[Any]],
    batch_size: int,
) -> np.ndarray:
    """Sum what judges say of finished rollouts by their weights, [N]; a verifier's value counts as a probability."""
    metadata = [json.loads(text) for text in columns["metadata"]]
    tokens = torch.tensor(columns["tokens"], device=next(decoder.parameters()).device)
    scores = np.zeros(len(tokens))
    for name, weight in weights.items():
        if name in _LABELS:
            label = np.array(columns[_LABELS[name]]).reshape(len(tokens), -1)
            scores += weight * np.nanmean(label, axis=1)
            continue
        for start in range(0, len(tokens), batch_size):
            part = slice(start, start + batch_size)
            # Judges of pixels need none.
            features = decoder.features(columns["prompt"][part], tokens[part]) if decoder.feature_layers else None
            values = judged(judges[name], decoder, metadata[part], tokens[part], features)
            scores[part] += weight * judges[name].as_probability(values).cpu().numpy()
    return scores


class PreferencesDataModule(PairsDataModule):
    """Pairs of the LightningModule's own decoder's rollouts.

    Iterative DPO makes new rollouts, with the policy as it then is, whenever the Trainer reloads its data
    (`reload_dataloaders_every_n_epochs`; 0: never). A resumed run keeps the pairs that it had.

    Args:
        judges: of the run.
        scores: what makes an image better than another: weights of judges, such as `geneval` (all is right), `clauses`
            (the fraction of what the prompt asks that is), `strict` (and counts are exact) or `parm`.
        train: sets of rollouts, by name, over the same prompts; images of one prompt are paired whatever their set.
        validation: rollouts of prompts that are neither trained nor evaluated on.
        rule: how rollouts become pairs.
        reference: the policy at the start of the `round` or of the `run`.
        seed: of all images.
        folder, collect_batch_size, batch_size: see `StoredDataModule`.
    """

    trains_sharded = False  # the policy decodes its rollouts with whole weights

    def __init__(
        self,
        judges: JudgeRegistry,
        scores: Mapping[str, float],
        train: Mapping[str, RolloutSpec],
        validation: RolloutSpec,
        rule: PairRule,
        reference: Literal["round", "run"],
        seed: int,
        folder: str,
        collect_batch_size: int,
        batch_size: int,
    ) -> None:
        super().__init__(folder, batch_size, collect_batch_size)
        if reference not in ("round", "run"):
            raise ValueError(f"data.reference must be 'round' or 'run', not {reference!r}")
        self.judges, self.scores, self.rule = judges, scores, rule
        self.train, self.validation, self.reference, self.seed = train, validation, reference, seed
        self._start: dict[str, Tensor] | None = None  # all weights before training, where they are needed again
        self._start_key = ""

    def setup(self, stage: str) -> None:
        """Refuse scores of unknown judges; keep the weights before training, if they are a reference.

        Lightning restores checkpoints after this, so a resumed run has the same reference, and a checkpoint can be
        tested on the validation pairs of its run where these are gone.
        """
        asked = {f"data.train.{name}.strategy": spec.strategy.judge_names for name, spec in self.train.items()}
        self.judges.refuse_unknown({"data.scores": self.scores, **asked})
        if stage == "fit":
            scoring = {name for name, weight in self.scores.items() if weight}
            self.judges.teachers |= scoring.union(*(spec.strategy.judge_names for spec in self.train.values()))
        restored = stage == "test" and not self._folders  # a checkpoint may follow
        if restored or (self.reference == "run" and stage == "fit"):
            module: Any = self.trainer.lightning_module
            self._start = {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
            self._start_key = fingerprint(module.decoder)

    def _pairs(self, name: str) -> Dataset:
        epochs: int = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        round_index = self.trainer.current_epoch // epochs if epochs and name == "train" else 0
        key = f"{name}-{round_index}"
        known = self._folders.get(key)
        folder = self.cache.find(known) if known else None
        if folder is None:
            if known and (round_index or self._start is None):
                raise self.cache.gone(known)
            with self._before_training() if known else nullcontext():
                folder = self._make(name, round_index)
        self._folders[key] = str(folder.absolute())
        return load_rows(folder)

    @contextmanager
    def _before_training(self) -> Iterator[None]:
        """Replace the weights by those before training, for a time: one model is in memory."""
        assert self._start is not None
        module = self.trainer.lightning_module
        present = {key: value.clone() for key, value in module.state_dict().items()}
        module.load_state_dict(self._start)
        try:
            yield
        finally:
            module.load_state_dict(present)

    def _make(self, name: str, round_index: int) -> Path:
        """Collect rollouts with the policy of this moment, pair them, and give them their reference."""
        decoder: Any = self.trainer.lightning_module.decoder
        seed = image_seed(self.seed, round_index) if round_index else self.seed
        collector = RolloutCollector(decoder, self.judges, self.judges.geneval, seed, self.collect_batch_size)
        specs = self.train if name == "train" else {"plain": self.validation}
        sets = {set_name: spec.of_round(round_index) for set_name, spec in specs.items()}
        parts = {set_name: collector.parts(self.cache.root, set_name, spec) for set_name, spec in sets.items()}
        rollouts = concatenate_datasets([collector.collect(sets[key], parts[key], self.trainer) for key in sets])
        made_with = {
            "rollouts": [collector.key(spec) for spec in sets.values()],
            "rule": key_of(self.rule),
            "scores": key_of(self.scores),
            "judges": self.judges.keys_of(name for name in self.scores if name not in _LABELS),
            "reference": self._start_key if self._refers_to_start else None,
        }
        return self._stored(f"{name}-pairs", made_with, lambda: self._pair(name, rollouts, decoder))

    def _pair(self, name: str, rollouts: Dataset, decoder: TokenDecoder) -> Dataset:
        columns: Mapping[str, list[Any]] = rollouts.to_dict()
        metadata = [json.loads(text) for text in columns["metadata"]]
        asked = [sum(clause["count"] for clause in row["include"]) for row in metadata]
        surplus = [max(0, found - wanted) for found, wanted in zip(columns["objects"], asked, strict=True)]
        scores = ensemble(decoder.eval(), self.judges, self.scores, columns, self.collect_batch_size)
        pairs, dropped = make_pairs(columns["prompt_index"], columns["tokens"], scores.tolist(), surplus, self.rule)
        if not pairs:
            advice = f"take more data.{name}.samples or prompts, or add another judge to data.scores"
            raise ValueError(f"data.{name}: no prompt has two rollouts whose scores differ: {advice}")
        rank_zero_info(f"{name}: {len(pairs)} pairs; dropped: {dict(dropped)}")
        rows = {side: [getattr(pair, side) for pair in pairs] for side in SIDES}
        shares = [pair.margin if self.rule.weigh_margins else 1.0 for pair in pairs]
        made = {
            "prompt": [columns["prompt"][row] for row in rows["chosen"]],
            "margin": [pair.margin for pair in pairs],
            "weight": balance([metadata[row]["tag"] for row in rows["chosen"]], shares, self.rule.max_weight),
        }
        for side in SIDES:
            made[side] = [columns["tokens"][row] for row in rows[side]]
            for source, label in {**LABELS, "settings": "settings", "seed": "seed"}.items():
                made[f"{side}_{label}"] = [columns[source][row] for row in rows[side]]
        with self._before_training() if self._refers_to_start else nullcontext():
            return self._with_reference(Dataset.from_dict(made), decoder)

    @property
    def _refers_to_start(self) -> bool:
        return self.reference == "run" and self._start is not None
