"""Groups that the policy of this moment makes whenever training comes to the next round, in minibatches, for GRPO."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.groups import Columns, Curriculum, GroupCollector, GroupSpec
from datamodules.loaders import make_loader
from datamodules.round_sizes import refuse_uneven_round
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.strategy import judge_named
from lightning_modules.files import remove, whole
from lightning_modules.rewards.registry import JudgeRegistry
from lightning_modules.rewards.verifier import Ability


class _Minibatches(Dataset[Any]):
    """The rows of an epoch, of which a loader takes batches as the data module makes them."""

    def __init__(self, data: "GroupsDataModule") -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.rounds * self.data.rows_per_round

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return self.data.batch(indices)


class GroupsDataModule(LightningDataModule):
    """Groups of the LightningModule's own decoder, collected whenever training comes to the next round.

    A round collects groups once and learns from their images `inner_epochs` times, in minibatches. The loader asks for
    them batch by batch, so that a round's images are those of the policy of that moment; checkpoints hold the images of
    the round that they were saved in, and a resumed run goes on with them.

    Args:
        judges: of the run.
        spec: what the groups are made of.
        potentials: by the name of a reward, a judge such as PARM that values unfinished images as that reward values
            finished ones. Its values are taken from the reward, step by step; see `GRPOObjective.advantages`.
        rewards: weights of judges, such as `geneval` (all is right), `clauses` (the fraction of what the prompt asks
            that is), `strict` (and counts are exact) or `parm`; each is normalised by itself.
        independent_judges: names of judges whose scores are logged, and have no say.
        rounds: of an epoch, after which validation may come.
        inner_epochs: how often a round learns from each image.
        batch_size: images of a minibatch, per rank.
        collect_batch_size: images decoded at a time.
        seed: of all images.
        folder: where the images of each round, with what judges say, are kept as data sets, a folder a round; null
            keeps none.
    """

    gives = "groups"
    trains_sharded = False  # the policy decodes with whole weights
    trainer: Trainer

    def __init__(
        self,
        judges: JudgeRegistry,
        spec: GroupSpec,
        rewards: Mapping[str, float],
        potentials: Mapping[str, str],
        independent_judges: Sequence[str],
        rounds: int,
        inner_epochs: int,
        batch_size: int,
        collect_batch_size: int,
        seed: int,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.judges, self.spec, self.seed, self.folder = judges, spec, seed, folder
        self.rewards = {name: weight for name, weight in rewards.items() if weight}
        self.potentials, self.independent_judges = potentials, independent_judges
        self.rounds, self.inner_epochs = rounds, inner_epochs
        self.batch_size, self.collect_batch_size = batch_size, collect_batch_size
        for name in ("rounds", "inner_epochs", "batch_size", "collect_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if not self.rewards:
            raise ValueError("data.rewards names no judge with a weight other than 0: nothing to learn from")
        if both := {*independent_judges} & self._teachers:
            said = f"names {min(both)!r}, a judge that has a say in what is trained on"
            raise ValueError(f"data.independent_judges {said}")
        self._round, self._curriculum = -1, Curriculum()  # the round whose images are here; where the stream goes on
        self._columns: Columns = {}
        self._stats: dict[str, float] = {}

    @property
    def _teachers(self) -> set[str]:
        """Names of the judges that decide what is trained on."""
        return {*self.rewards, *self.potentials.values(), *self.spec.strategy.judge_names}

    @property
    def rows_per_round(self) -> int:
        """Images that a round learns from, each as often as it does."""
        return self.spec.groups * self.spec.samples * self.inner_epochs

    def state_dict(self) -> dict[str, Any]:
        place = {"round": self._round, "curriculum": asdict(self._curriculum)}
        return {**place, "columns": dict(self._columns), "stats": dict(self._stats)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._round, self._curriculum = state_dict["round"], Curriculum(**state_dict["curriculum"])
        self._columns, self._stats = state_dict["columns"], state_dict["stats"]

    def setup(self, stage: str) -> None:
        """Refuse unknown judges, and minibatches that do not divide a round, before any image is made."""
        named = {"data.rewards": self.rewards, "data.independent_judges": self.independent_judges}
        self.judges.refuse_unknown({**named, "data.spec.strategy": self.spec.strategy.judge_names})
        self._check_potentials()
        if stage != "fit":
            return
        self.judges.teachers |= self._teachers
        images, ranks = self.spec.groups * self.spec.samples, self.trainer.world_size
        refuse_uneven_round(images, self.batch_size, ranks, self.inner_epochs, self.trainer.accumulate_grad_batches)

    def _check_potentials(self) -> None:
        """Raise ValueError for values along the way that there are none of."""
        module: Any = self.trainer.lightning_module
        for name, by in self.potentials.items():
            if name not in self.rewards:
                raise ValueError(f"data.potentials.{name}: data.rewards has no {name!r}")
            judge = judge_named(self.judges, by, Ability.PREFIXES)
            judge.check_decoder(module.decoder)
            if not module.decoder.causal:
                raise ValueError("data.potentials are values of prefixes, and only next-token decoders decide these")

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the minibatch of these rows of an epoch, all of one round, whose images are made if need be."""
        number, first = divmod(indices[0], self.rows_per_round)
        number += self.trainer.current_epoch * self.rounds
        if number != self._round:
            self._columns, self._stats = self._collect()
            self._round = number
            self._keep()
        images = self.spec.groups * self.spec.samples
        shuffled = torch.Generator().manual_seed(image_seed(self.seed, number))
        order = torch.cat([torch.randperm(images, generator=shuffled) for _ in range(self.inner_epochs)])
        rows = order[[index - indices[0] + first for index in indices]]
        columns = {name: part[rows] for name, part in self._columns.items()}
        batch: dict[str, Any] = {
            "prompt": [self.spec.prompt(place)["prompt"] for place in columns["place"].tolist()],
            "tokens": columns["tokens"] if columns["tokens"].is_floating_point() else columns["tokens"].long(),
            "seed": [image_seed(self.seed, number, row) for row in rows.tolist()],
            "advantage": columns["advantage"].numpy(),
            "stats": self._stats,
        }
        labels = {name: part for name, part in columns.items() if name.startswith("label/")}
        if labels:
            batch["labels"] = {name.removeprefix("label/"): part.float() for name, part in labels.items()}
        if "recorded" in columns:
            batch["recorded"] = columns["recorded"].numpy()
        trajectory = {name: part for name, part in columns.items() if name.startswith("trajectory/")}
        if trajectory:
            batch["trajectory"] = {
                name.removeprefix("trajectory/"): part.numpy() if part.is_floating_point() else part.long()
                for name, part in trajectory.items()
            }
        return batch

    def _collect(self) -> tuple[Columns, dict[str, float]]:
        """Make the images of a round with the policy as it is; return them, and numbers about all that were made."""
        module: Any = self.trainer.lightning_module
        scores = [*self.rewards, *self.independent_judges]
        settings = scores, self.potentials, self.spec, self.seed, self.collect_batch_size, module.refit is not None
        collector = GroupCollector(module.decoder, self.judges, *settings)
        found: list[Columns] = []
        teaches = torch.zeros(0, dtype=torch.bool)
        precision = self.trainer.strategy.precision_plugin
        for _ in range(1 + self.spec.refills):
            missing = self.spec.groups - int(teaches.sum())
            if missing <= 0:
                break
            places = self._curriculum.take(self.spec, missing)
            with precision.forward_context():  # the same as in training
                found.append(collector.collect(places))
            taught = self._advantages(found[-1]).flatten(1).any(1)
            self._curriculum.learn(self.spec, places, taught.tolist())
            teaches = torch.cat([teaches, taught])
        columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        stats = self._describe(columns, teaches)
        groups = (~teaches).int().argsort(stable=True)[: self.spec.groups]  # those that teach first
        rows = (groups[:, None] * self.spec.samples + torch.arange(self.spec.samples)).flatten()
        kept = {name: part[rows] for name, part in columns.items()}
        kept["advantage"] = self._advantages(kept).flatten(0, 1)
        return kept, stats

    def _keep(self) -> None:
        """Write the images of this round into the folder, if there is one, in the place of any of that number."""
        if self.folder is None or not self.trainer.is_global_zero:
            return
        from datasets import Dataset  # takes a second, which most runs spare

        from datamodules.data_sets import as_column, write_rows

        prompts = [self.spec.prompt(place) for place in self._columns["place"].tolist()]
        names = ["tokens", "objects", "advantage", *(name for name in self._columns if name.startswith("score/"))]
        rows = {name: as_column(self._columns[name]) for name in names}
        rows |= {"prompt": [row["prompt"] for row in prompts], "metadata": [json.dumps(row) for row in prompts]}
        path = Path(self.folder) / f"round-{self._round:05d}"
        remove(path)
        with whole(path) as partial:
            write_rows(Dataset.from_dict(rows), partial)

    def _advantages(self, columns: Columns) -> Tensor:
        """The advantages of groups, [P, G, 1 or S]."""
        module: Any = self.trainer.lightning_module
        of_groups = {name: part.unflatten(0, (-1, self.spec.samples)) for name, part in columns.items()}
        rewards = {name: of_groups[f"score/{name}"] for name in self.rewards}
        potentials = {name: of_groups[f"potential/{name}"] for name in self.potentials}
        return module.advantages(rewards, self.rewards, potentials)

    def _describe(self, columns: Columns, teaches: Tensor) -> dict[str, float]:
        """Describe all groups that a round has made, those without a lesson included."""
        tasks = [self.spec.prompt(place)["tag"] for place in columns["place"].tolist()]
        stats = {"images_made": float(self._curriculum.taken * self.spec.samples)}  # since training began
        stats |= {"dropped": 1 - float(teaches.float().mean()), "objects": float(columns["objects"].float().mean())}
        if "recorded" in columns:  # nats a token, an estimate from what was drawn
            stats["entropy"] = -float(columns["recorded"].sum() / columns["tokens"].numel())
        for name in self.rewards:
            scores = columns[f"score/{name}"]
            stats[f"reward/{name}"] = float(scores.mean())
            stats[f"spread/{name}"] = float(scores.view(-1, self.spec.samples).std(1, correction=0).mean())
            for task in self.spec.per_round:
                of_task = torch.tensor([each == task for each in tasks])
                if of_task.any():
                    stats[f"reward/{name}/{task}"] = float(scores[of_task].mean())
        if self.spec.curriculum:
            stats |= {f"teaches/{task}": value for task, value in self._curriculum.teaches.items()}
        independent = {name: columns[f"score/{name}"].mean() for name in self.independent_judges}
        return stats | {f"independent/{name}": float(mean) for name, mean in independent.items()}

    def predict_dataloader(self) -> list[Any]:
        """Make the images of a round with the models as they are and describe them; no batches are left to predict."""
        self._round = 0
        self._columns, stats = self._collect()
        self._keep()
        for name, value in stats.items():
            rank_zero_info(f"{name}: {value:.3f}")
        return []

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return make_loader(_Minibatches(self), self.trainer, self.batch_size, _as_it_is, train=True)

    def val_dataloader(self) -> list[int]:
        """One empty batch: what is measured is measured by callbacks."""
        return [0]

    def test_dataloader(self) -> list[int]:
        return self.val_dataloader()


def _as_it_is(batch: Any) -> Any:
    return batch
