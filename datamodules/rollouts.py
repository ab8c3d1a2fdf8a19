"""Rollouts: images sampled from the decoder with GenEval's verdict, collected once, stored with `datasets`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from datamodules.data_sets import ArrowRows, StoredDataModule, as_column, get_rows, load_rows, numbers
from lightning_modules.artifacts import ArtifactCache, Key
from lightning_modules.backbone.decoder import Request, TokenDecoder
from lightning_modules.backbone.features import STATISTICS
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.cache_key import digest
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy
from lightning_modules.rewards.geneval_reward import GenEvalReward, to_uint8
from lightning_modules.rewards.geneval_rules import Detections
from lightning_modules.rewards.grounding import grounding
from lightning_modules.rewards.registry import JudgeRegistry

_HIDDEN = ("hidden", "unconditional_hidden")


@dataclass(frozen=True)
class RolloutSpec:
    """A set of rollouts: every prompt decoded `samples` times by a strategy."""

    prompts: Sequence[Mapping[str, Any]]  # GenEval metadata
    samples: int
    strategy: Strategy
    from_epoch: int = 0  # when they are collected, with the PARM of that moment, and join the training data
    per_round: Mapping[str, int] | None = None  # prompts of each task that a round of iterative DPO takes; None: all

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"rollouts need samples of at least 1 a prompt, not {self.samples}")
        if missing := set(self.per_round or ()) - {row["tag"] for row in self.prompts}:
            raise ValueError(f"per_round names {min(missing)!r}, a task of which there are no prompts")

    def of_round(self, round_index: int) -> "RolloutSpec":
        """Return what a round collects: each task's next prompts after those of the round before."""
        if self.per_round is None:
            return self
        prompts = []
        for task, count in self.per_round.items():
            pool = [row for row in self.prompts if row["tag"] == task]
            prompts += [pool[i % len(pool)] for i in range(round_index * count, (round_index + 1) * count)]
        return replace(self, prompts=prompts, per_round=None)


def provenance(
    spec: RolloutSpec,
    decoder: TokenDecoder,
    judges: Judges,
    labels: GenEvalReward | None,
    seed: int,
    store_features: bool = False,
) -> dict[str, Any]:
    """Return what makes a set of rollouts: equal provenance, equal rollouts."""
    named = sorted({*spec.strategy.judge_names} & {*judges})
    return {
        "decoder": decoder.cache_key(),
        "judges": {name: judges[name].cache_key() for name in named},
        "labels": labels and labels.verdict_key(),
        "strategy": spec.strategy.cache_key(),
        "prompts": digest(list(spec.prompts)),
        "samples": spec.samples,
        "seed": seed,
        "features": store_features,
    }


@dataclass(frozen=True)
class RolloutCollector:
    """Decodes prompts and labels the images.

    The image of (prompt, sample) depends on the seed alone, not on batch size, ranks or interruptions.

    """

    decoder: TokenDecoder
    judges: Judges
    labels: GenEvalReward  # judges the images
    seed: int
    batch_size: int  # images decoded at a time
    store_features: bool = False  # rows also hold what the decoder knew, so that PARM trains without decoder passes

    def key(self, spec: RolloutSpec) -> dict[str, Any]:
        """Return what makes a set, apart from the code."""
        return provenance(spec, self.decoder, self.judges, self.labels, self.seed, self.store_features)

    def parts(self, root: Path, name: str, spec: RolloutSpec) -> ArtifactCache:
        """Return where the batches of a set are stored, below a folder of rollouts."""
        return ArtifactCache(root, __name__).parts(name, self.key(spec))

    def is_whole(self, spec: RolloutSpec, folder: Path) -> bool:
        """Tell whether a folder holds all batches of a set."""
        return all(ArtifactCache(folder).path(*_part(rows)).is_dir() for rows in self._batches(spec))

    def collect(self, spec: RolloutSpec, parts: ArtifactCache, trainer: Trainer) -> Dataset:
        """Collect the batches that a set still lacks, together with the other ranks, and return all of its rows.

        Raises SIGTERMException between batches, once the Trainer has been asked to stop.
        """
        batches, rank = self._batches(spec), trainer.global_rank
        # Which batches are a rank's own must not depend on what the other ranks have finished by now.
        missing = [rows for rows in batches[rank :: trainer.world_size] if not parts.path(*_part(rows)).is_dir()]
        if missing:
            self.labels.prepare(next(self.decoder.parameters()).device)
        with tqdm(total=sum(map(len, missing)), desc="Rollouts", unit="image", disable=rank > 0 or not missing) as bar:
            for rows in missing:
                if trainer.received_sigterm:
                    raise SIGTERMException  # what is stored is kept
                get_rows(parts, *_part(rows), partial(self._decode, spec, rows))
                bar.update(len(rows))
        trainer.strategy.barrier("collected")
        return concatenate_datasets([load_rows(parts.path(*_part(rows))) for rows in batches])

    def _batches(self, spec: RolloutSpec) -> list[range]:
        """Return the rows of each batch; row r is sample r % samples of prompt r // samples."""
        rows = range(len(spec.prompts) * spec.samples)
        return [rows[start : start + self.batch_size] for start in rows[:: self.batch_size]]

    def _decode(self, spec: RolloutSpec, numbers: range) -> Dataset:
        """Decode and label the images of some rows; `objects` are those found in the image."""
        jobs = [divmod(number, spec.samples) for number in numbers]
        prompts = [spec.prompts[i] for i, _ in jobs]
        seeds = [image_seed(self.seed, i, j) for i, j in jobs]
        tokenizer = self.decoder.eval().image_tokenizer
        decoded = spec.strategy.decode(self.decoder, self.judges, Request(prompts, seeds))
        found = self.labels.detect(to_uint8(tokenizer.decode(decoded.tokens)))
        verdicts = self.labels.judge(prompts, found)
        columns = {
            "prompt": [row["prompt"] for row in prompts],
            "metadata": [json.dumps(row) for row in prompts],
            "tokens": as_column(decoded.tokens),
            "reward": [float(verdict.correct) for verdict in verdicts],
            "clauses": [[float(c) for c in verdict.clauses] for verdict in verdicts],
            "grounding": [ground(self.decoder, self.labels, *each) for each in zip(prompts, found, strict=True)],
            "first_unverified": decoded.first_unverified.long().tolist(),
            "objects": [sum(map(len, verdict.details.values())) for verdict in verdicts],
            "seed": seeds,
            "prompt_index": [i for i, _ in jobs],
            "sample": [j for _, j in jobs],
            "settings": [json.dumps(spec.strategy.cache_key())] * len(jobs),
        }
        return Dataset.from_dict(columns | self._features(decoded))

    def _features(self, decoded: Decoded) -> dict[str, Any]:
        """Return columns of what the decoder knew of the T tokens, and of how the image came about, if there are any.

        An image has 2 x T x F half-precision numbers of hidden features, or none if there is a trajectory.
        """
        columns: dict[str, Any] = {}
        if (trajectory := decoded.trajectory) is not None:
            columns = {name: as_column(getattr(trajectory, name)) for name in trajectory.verifier_reads}
        elif self.store_features:
            columns = {name: as_column(getattr(decoded.features, name)) for name in _HIDDEN}
        if self.store_features:
            columns |= {name: getattr(decoded.features, name).cpu().numpy() for name in STATISTICS}
        return columns


def _part(rows: range) -> tuple[str, Key]:
    """Return the name and the key of a batch among the parts of a set."""
    return f"part-{rows.start:06d}", {"rows": [rows.start, rows.stop]}


def collate(rows: pa.Table) -> dict[str, Any]:
    """Turn rollouts into a batch of `PARMModule`; tables of Arrow spare a Python object for each number."""
    column = partial(numbers, rows)

    def vectors(name: str) -> Tensor:
        """Half-precision numbers of the T tokens, [B, T, F]."""
        states = np.frombuffer(b"".join(rows[name].to_pylist()), np.float16)
        return torch.from_numpy(states.reshape(*shown.shape[:2], -1).astype(np.float32))

    shown = column("grounding").float()
    codes = not pa.types.is_binary(rows.schema.field("tokens").type)
    batch: dict[str, Any] = {
        "prompt": rows["prompt"].to_pylist(),
        "tokens": column("tokens").long() if codes else vectors("tokens"),
        "correct": column("reward").float(),
        "clauses": column("clauses").float(),
        "grounding": shown,
        "first_unverified": column("first_unverified"),
        "group": column("prompt_index"),
    }
    if STATISTICS[0] in rows.column_names:
        batch["features"] = {name: vectors(name) for name in _HIDDEN if name in rows.column_names}
        batch["features"] |= {name: column(name) for name in STATISTICS}
    if "previews" in rows.column_names:
        batch["trajectory"] = {name: column(name).long() for name in Trajectory.verifier_reads}
    elif "times" in rows.column_names:
        batch["trajectory"] = {"times": column("times")}
    return batch


def ground(
    decoder: TokenDecoder, labels: GenEvalReward, row: Mapping[str, Any], found: Detections
) -> NDArray[np.float32]:
    """Mark the words of a prompt that each token of its image shows, [T, max_words]; see `grounding`."""
    names, threshold = labels.detector.class_names, labels.rules.threshold
    sizes = decoder.max_words, decoder.image_tokenizer.grid, decoder.image_tokenizer.image_size
    return grounding(row, found, names, threshold, decoder.word_spans(row["prompt"]), *sizes)


class RolloutsDataModule(StoredDataModule):
    """Rollouts of the LightningModule's own decoder, collected when they are first needed; a resumed run keeps its own.

    Args:
        judges: of the run; its GenEval labels the images.
        train: sets that join the training data at their `from_epoch` (`reload_dataloaders_every_n_epochs: 1`).
        validation, test: rollouts of prompts that training does not use.
        folder, collect_batch_size, batch_size: see `StoredDataModule`.
        seed, store_features: see `RolloutCollector`.
    """

    gives = "rollouts"

    def __init__(
        self,
        judges: JudgeRegistry,
        train: Mapping[str, RolloutSpec],
        validation: RolloutSpec,
        test: RolloutSpec,
        folder: str,
        seed: int,
        store_features: bool,
        collect_batch_size: int,
        batch_size: int,
    ) -> None:
        super().__init__(folder, batch_size, collect_batch_size)
        self.judges, self.seed, self.store_features = judges, seed, store_features
        self.train, self.sets = train, {**train, "validation": validation, "test": test}
        self._collected: dict[str, Dataset] = {}

    def setup(self, stage: str) -> None:
        """Refuse unknown judges before any rollout is made."""
        asked = {f"data.{name}.strategy": spec.strategy.judge_names for name, spec in self.sets.items()}
        self.judges.refuse_unknown(asked)

    def _collect(self, name: str) -> Dataset:
        """Return a named set, collected with the models as they are when the run first asks for it."""
        if name not in self._collected:
            spec = self.sets[name]
            module: Any = self.trainer.lightning_module
            settings = self.seed, self.collect_batch_size, self.store_features
            collector = RolloutCollector(module.decoder, self.judges, self.judges.geneval, *settings)
            known = self._folders.get(name)
            # The models may have learned since a known set was collected.
            place = self.cache.find(known, partial(collector.is_whole, spec)) if known else None
            parts = ArtifactCache(place) if place else collector.parts(self.cache.root, name, spec)
            if known and parts.root.name != Path(known).name:
                raise self.cache.gone(known)
            self._collected[name] = collector.collect(spec, parts, self.trainer)
            self._folders[name] = str(parts.root.absolute())
        return self._collected[name]

    def _rollouts(self, names: Sequence[str], train: bool = False) -> DataLoader[dict[str, Any]]:
        rows = concatenate_datasets([self._collect(name) for name in names])
        return self._loader(ArrowRows(rows), collate, train)

    def predict_dataloader(self) -> list[Any]:
        """Collect every set with the models as they are and say how much is correct; no batches are left to predict."""
        for name in self.sets:
            rows = self._collect(name)
            rank_zero_info(f"{name}: {len(rows)} rollouts, {np.mean(rows['reward']):.3f} correct")
        return []

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        due = [name for name, spec in self.train.items() if spec.from_epoch <= self.trainer.current_epoch]
        return self._rollouts(due, train=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._rollouts(["validation"])

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._rollouts(["test"])
