"""Rollouts: images sampled from the decoder with GenEval's verdict, collected once, stored with `datasets`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from datamodules.data_sets import load_rows
from datamodules.loaders import make_loader
from lightning_modules.backbone.decoder import Request, TokenDecoder
from lightning_modules.backbone.features import STATISTICS
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.broken_files import read_json
from lightning_modules.cache_key import digest
from lightning_modules.decoding.strategy import Judges, Strategy
from lightning_modules.files import make_once
from lightning_modules.rewards.geneval_reward import GenEvalReward, to_uint8
from lightning_modules.rewards.grounding import grounding
from lightning_modules.rewards.registry import JudgeRegistry

_FORMAT = 2  # of the stored rows; another one when columns change, so that older rollouts are not taken for new ones
_HIDDEN = ("hidden", "unconditional_hidden")
_TRAJECTORY = ("previews", "fixed_at")
_NAMED = 3  # things in a folder that an error names


@dataclass(frozen=True)
class RolloutSpec:
    """A set of rollouts: every prompt decoded `samples` times by a strategy.

    Attributes:
        prompts: GenEval metadata, one row a prompt.
        samples: images a prompt.
        strategy: how they are decoded.
        from_epoch: the epoch from which training uses them; they are collected then, with the PARM of that moment.
        per_round: prompts of each task that a round of iterative DPO takes; None takes all, every round.
    """

    prompts: Sequence[Mapping[str, Any]]
    samples: int
    strategy: Strategy
    from_epoch: int = 0
    per_round: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"rollouts need samples of at least 1 a prompt, not {self.samples}")
        if missing := set(self.per_round or ()) - {row["tag"] for row in self.prompts}:
            raise ValueError(f"per_round names {min(missing)!r}, a task of which there are no prompts")

    def of_round(self, round_index: int) -> "RolloutSpec":
        """What round `round_index` collects: it takes up each task's prompts where the round before left them."""
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
    """What makes a set of rollouts: equal provenance, equal rollouts."""
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
        "format": _FORMAT,
    }


def refuse_unmarked(folder: Path) -> None:
    """Raise ValueError if a folder holds more than hidden files, and no provenance.json that says what made them."""
    found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    # In this order: another process may be opening it at this moment.
    if found and not (folder / "provenance.json").is_file():
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ValueError(
            f"{folder} holds {', '.join(found[:_NAMED])}{more}, and no provenance.json that says it was made here: "
            "name another folder"
        )


def open_folder(folder: Path, made_with: Mapping[str, Any]) -> None:
    """Create a folder of rollouts or images, or make sure that an existing one was made with the same things.

    What these were is written there before anything else is, so a folder that does not say so is another's.

    Raises:
        OSError: it cannot be created; the error names it.
        ValueError: it was made with other things, or by others; the sentence names what differs, or what is there.
    """
    refuse_unmarked(folder)
    about = folder / "provenance.json"
    make_once(about, lambda partial: partial.write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8"))
    if not isinstance(stored := read_json(about), dict) or not made_with.keys() <= stored.keys():
        raise ValueError(f"{about} is not of this project, or of another version: name another folder")
    if different := [key for key in made_with if stored[key] != json.loads(json.dumps(made_with[key]))]:
        others = " and another ".join(different)
        raise ValueError(f"what is in {folder} was made with another {others}: name another folder")


def _parts(spec: RolloutSpec, folder: Path, batch_size: int) -> dict[Path, list[tuple[int, int]]]:
    """The batches in which a set of rollouts is stored: folder -> (prompt, sample) of its rows."""
    jobs = [(i, j) for i in range(len(spec.prompts)) for j in range(spec.samples)]
    starts = range(0, len(jobs), batch_size)
    return {folder / f"part-{batch_size}-{n:05d}": jobs[start : start + batch_size] for n, start in enumerate(starts)}


def load(spec: RolloutSpec, folder: Path, batch_size: int) -> Dataset:
    """A set of rollouts that was collected before."""
    return concatenate_datasets([load_rows(part) for part in _parts(spec, folder, batch_size)])


def find(known: str, folder: Path, is_whole: Callable[[Path], bool] = Path.is_dir) -> Path | None:
    """TokenScorer for what a checkpoint knows by its name: in a folder, then where it was; None if it is in neither.

    Args:
        known: where it was; the last part of the path is its name.
        folder: where such things are kept now.
        is_whole: says whether all of it is at a path.
    """
    return next((path for path in (folder / Path(known).name, Path(known)) if is_whole(path)), None)


def gone(known: str, folder: Path) -> FileNotFoundError:
    """Return the error for what is in neither place, and cannot be made again."""
    name, before = Path(known).name, Path(known).parent
    return FileNotFoundError(
        f"{name}, on which the run of this checkpoint was trained, is neither in {folder} nor in {before}, and the "
        "models that made it have changed since: set rollouts_dir to the folder where it is now"
    )


def collect(
    spec: RolloutSpec,
    folder: Path,
    decoder: TokenDecoder,
    judges: Judges,
    reward: GenEvalReward,
    seed: int,
    batch_size: int,
    store_features: bool = False,
    rank: int = 0,
    world_size: int = 1,
    asked_to_stop: Callable[[], bool] = bool,
) -> Dataset:
    """Collect what is still missing of a set of rollouts, and return all of it.

    Batches are stored one by one, each whole or not at all, so that a killed collection goes on where it was.
    The image of (prompt, sample) depends on the seed alone, not on batch size, ranks or interruptions.
    Between batches SIGTERMException is raised once `asked_to_stop` says so.

    With `store_features` rows also hold what the decoder knew of each token: PARM trains without decoder passes. That
    is 2 x T x F half-precision numbers an image, 74 kB for the shapes decoder. Mask-token decoders store how the
    grid was filled, and the log-probabilities.

    Returns:
        Rows with prompt, metadata (JSON), tokens, reward, clauses, grounding, first_unverified, objects (found in the
        image), seed, prompt_index, sample, settings.
    """
    made_with = provenance(spec, decoder, judges, reward, seed, store_features)
    reward.prepare(next(decoder.parameters()).device)
    if rank == 0:
        open_folder(folder, made_with)
    if world_size > 1:
        torch.distributed.barrier()  # the others must not write the same file at the same moment
    # Which parts are a rank's own must not depend on what the other ranks have finished by now.
    own = list(_parts(spec, folder, batch_size).items())[rank::world_size]
    missing = [(part, chunk) for part, chunk in own if not part.is_dir()]
    settings = json.dumps(made_with["strategy"])
    tokenizer = decoder.eval().image_tokenizer
    ground = partial(
        grounding,
        class_names=reward.detector.class_names,
        threshold=reward.rules.threshold,
        max_words=decoder.max_words,
        grid=tokenizer.grid,
        image_size=tokenizer.image_size,
    )

    def decoded_rows(chunk: Sequence[tuple[int, int]]) -> Dataset:
        rows = [spec.prompts[i] for i, _ in chunk]
        seeds = [image_seed(seed, i, j) for i, j in chunk]
        decoded = spec.strategy.decode(decoder, judges, Request(rows, seeds))
        images = to_uint8(tokenizer.decode(decoded.tokens))
        found = reward.detect(images)
        verdicts = reward.judge(rows, found)
        columns = {
            "prompt": [row["prompt"] for row in rows],
            "metadata": [json.dumps(row) for row in rows],
            "tokens": decoded.tokens.cpu().numpy().astype("int32"),
            "reward": [float(verdict.correct) for verdict in verdicts],
            "clauses": [[float(c) for c in verdict.clauses] for verdict in verdicts],
            "grounding": [
                ground(row, detections, words=decoder.word_spans(row["prompt"]))
                for row, detections in zip(rows, found, strict=True)
            ],
            "first_unverified": decoded.first_unverified.long().tolist(),
            "objects": [sum(map(len, verdict.details.values())) for verdict in verdicts],
            "seed": seeds,
            "prompt_index": [i for i, _ in chunk],
            "sample": [j for _, j in chunk],
            "settings": [settings] * len(chunk),
        }
        if decoded.trajectory is not None:
            for name in _TRAJECTORY:
                columns[name] = getattr(decoded.trajectory, name).cpu().numpy().astype("int32")
        elif store_features:
            for name in _HIDDEN:
                stored = getattr(decoded.features, name).half().cpu().numpy()
                columns[name] = [row.tobytes() for row in stored]
        if store_features:
            columns |= {name: getattr(decoded.features, name).cpu().numpy() for name in STATISTICS}
        return Dataset.from_dict(columns)

    with tqdm(total=sum(len(chunk) for _, chunk in missing), desc="Rollouts", unit="image",
              disable=rank > 0 or not missing) as bar:  # fmt: skip
        for part, chunk in missing:
            if asked_to_stop():
                raise SIGTERMException  # what is stored is kept
            store(part, partial(decoded_rows, chunk))
            bar.update(len(chunk))
    if world_size > 1:
        torch.distributed.barrier()
    return load(spec, folder, batch_size)


def store(folder: Path, make: Callable[[], Dataset]) -> None:
    """Write the data set that `make` gives to a folder, whole or not at all, unless it is there.

    Of several runs that want the same one at the same moment, one makes it and the others wait.

    Raises:
        OSError: it cannot be written; the error names the folder.
    """

    def write(partial: Path) -> None:
        rows = make()
        datasets.disable_progress_bars()  # one for every part would drown the one of the collection
        rows.save_to_disk(str(partial))

    make_once(folder, write)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Some rollouts -> a batch of `PARMModule`."""

    def column(name: str) -> Tensor:
        return torch.from_numpy(np.stack([row[name] for row in rows]))

    def hidden(name: str) -> Tensor:
        states = [np.frombuffer(row[name], np.float16).reshape(len(row["tokens"]), -1) for row in rows]
        return torch.from_numpy(np.stack(states)).float()

    more: dict[str, Any] = {}
    if STATISTICS[0] in rows[0]:
        more["features"] = {name: hidden(name) for name in _HIDDEN if name in rows[0]}
        more["features"] |= {name: column(name) for name in STATISTICS}
    if "previews" in rows[0]:
        more["trajectory"] = {name: column(name).long() for name in _TRAJECTORY}
    return {
        **more,
        "prompt": [row["prompt"] for row in rows],
        "tokens": column("tokens").long(),
        "correct": column("reward").float(),
        "clauses": column("clauses").float(),
        "grounding": column("grounding").float(),
        "first_unverified": column("first_unverified"),
        "group": column("prompt_index"),
    }


class RolloutsDataModule(LightningDataModule):
    """Rollouts of the LightningModule's own decoder, collected when they are first needed; a resumed run keeps its own.

    Args:
        judges: of the run; its GenEval labels the images.
        train: sets of rollouts; set by set they join the training data at their `from_epoch` (with the Trainer's
            `reload_dataloaders_every_n_epochs: 1`).
        validation, test: rollouts of prompts that training does not use.
        folder: where rollouts are kept; each set has a sub-folder named by what made it.
        seed: of all images.
        store_features: store what the decoder knew of each token with it; see `collect`.
        collect_batch_size: images decoded at a time.
        batch_size: rollouts a training batch, per rank.
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
        super().__init__()
        self.judges = judges
        self.train, self.validation, self.test = train, validation, test
        self.folder = Path(folder)
        self.seed = seed
        self.store_features = store_features
        self.collect_batch_size = collect_batch_size
        self.batch_size = batch_size
        self._folders: dict[str, str] = {}  # where each set is or was; the last part of the path says what made it
        self._collected: dict[str, Dataset] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"folders": dict(self._folders)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._folders = dict(state_dict["folders"])

    def _collect(self, name: str, spec: RolloutSpec) -> Dataset:
        """A named set of rollouts, collected with the models as they are when the run first asks for it."""
        if name not in self._collected:
            known = self._folders.get(name)
            place = find(known, self.folder, lambda folder: self._is_whole(spec, folder)) if known else None
            if place:  # the models may have learned since
                rows = load(spec, place, self.collect_batch_size)
            else:
                place = self._named(name, spec)
                if known and place.name != Path(known).name:
                    raise gone(known, self.folder)
                rows = self._collect_now(spec, place)
            self._folders[name] = str(place.absolute())
            self._collected[name] = rows
        return self._collected[name]

    def _is_whole(self, spec: RolloutSpec, folder: Path) -> bool:
        return all(part.is_dir() for part in _parts(spec, folder, self.collect_batch_size))

    def _named(self, name: str, spec: RolloutSpec) -> Path:
        """The folder of a set that the models as they are would make."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        made_with = provenance(spec, module.decoder, self.judges, self.judges.geneval, self.seed, self.store_features)
        return self.folder / f"{name}-{digest(made_with)}"

    def _collect_now(self, spec: RolloutSpec, folder: Path) -> Dataset:
        trainer = self.trainer
        assert trainer is not None
        module: Any = trainer.lightning_module
        return collect(
            spec,
            folder,
            module.decoder,
            self.judges,
            self.judges.geneval,
            self.seed,
            self.collect_batch_size,
            self.store_features,
            trainer.global_rank,
            trainer.world_size,
            lambda: trainer.received_sigterm,
        )

    def _loader(self, rows: Dataset, batch_size: int, train: bool) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        arrays = ["tokens", "clauses", "grounding", "reward", "first_unverified", "prompt_index"]
        arrays += [name for name in (*STATISTICS, *_TRAJECTORY) if name in rows.column_names]
        rows = rows.with_format("numpy", columns=arrays, output_all_columns=True)
        return make_loader(rows, self.trainer, batch_size, collate, train=train, shuffle=train)

    def predict_dataloader(self) -> list[Any]:
        """Collect every set with the models as they are and say how much is correct; no batches are left to predict."""
        for name, spec in {**self.train, "validation": self.validation, "test": self.test}.items():
            rows = self._collect(name, spec)
            rank_zero_info(f"{name}: {len(rows)} rollouts, {np.mean(rows['reward']):.3f} correct")
        return []

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        due = [(name, spec) for name, spec in self.train.items() if spec.from_epoch <= self.trainer.current_epoch]
        rows = concatenate_datasets([self._collect(name, spec) for name, spec in due])
        return self._loader(rows, self.batch_size, train=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self._collect("validation", self.validation), self.collect_batch_size, train=False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self._collect("test", self.test), self.collect_batch_size, train=False)
