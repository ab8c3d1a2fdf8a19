"""Groups: images that the policy of this moment makes of each prompt, with their advantages, for GRPO."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from datamodules.loaders import make_loader
from lightning_modules.backbone.decoder import Request, TokenDecoder
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.strategy import Strategy, judge_named, judged
from lightning_modules.ranks import gather, rank, world_size
from lightning_modules.rewards.geneval_reward import to_uint8
from lightning_modules.rewards.registry import JudgeRegistry
from lightning_modules.rewards.verifier import Ability

Columns = dict[str, Tensor]  # by name, a row an image


@dataclass(frozen=True)
class GroupSpec:
    """An endless stream of prompts, and how groups of images are made of them.

    Attributes:
        prompts: GenEval metadata.
        strategy: decodes the images.
        per_step: groups of each task that a step takes from the stream, which mixes tasks evenly.
        samples: images of a group.
        refills: how often a step replaces groups that teach nothing (all of whose images are equally good) by those of
            the next prompts; what is still missing then is filled up with such groups.
    """

    prompts: Sequence[Mapping[str, Any]]
    strategy: Strategy
    per_step: Mapping[str, int]
    samples: int
    refills: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"data.spec.samples must be at least 1, not {self.samples}")
        if self.refills < 0:
            raise ValueError(f"data.spec.refills must be at least 0, not {self.refills}")
        if not self.per_step or min(self.per_step.values()) < 1:
            raise ValueError("data.spec.per_step must name at least one task, and at least 1 group of each")
        if missing := self.per_step.keys() - {row["tag"] for row in self.prompts}:
            raise ValueError(f"data.spec.per_step names {min(missing)!r}, a task of which there are no prompts")

    @property
    def groups(self) -> int:
        """Groups that a step learns from."""
        return sum(self.per_step.values())

    @cached_property
    def _cycle(self) -> list[tuple[str, int]]:
        """The task, and the number among those of its task, of each group of a step."""
        places = [((j + 0.5) / count, task, j) for task, count in self.per_step.items() for j in range(count)]
        return [(task, j) for _, task, j in sorted(places)]

    @cached_property
    def _pools(self) -> dict[str, list[Mapping[str, Any]]]:
        pools: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in self.prompts:
            pools[row["tag"]].append(row)
        return pools

    def prompt(self, place: int) -> Mapping[str, Any]:
        """Return the prompt at a place of the stream, which takes up each task where it left it."""
        cycles, position = divmod(place, self.groups)
        task, j = self._cycle[position]
        pool = self._pools[task]
        return pool[(cycles * self.per_step[task] + j) % len(pool)]


@dataclass(frozen=True)
class GroupCollector:
    """Decodes and judges groups, each rank its share of the images.

    The image of (place in the stream, sample) depends on the seed and the policy alone.
    """

    decoder: TokenDecoder
    judges: JudgeRegistry
    scores: Sequence[str]  # names of the judges that score the images
    potentials: Mapping[str, str]  # names of those that value what is there before each step, by reward
    spec: GroupSpec
    seed: int
    batch_size: int  # images decoded at a time

    def collect(self, places: Sequence[int]) -> Columns:
        """Return all images of the prompts at these places of the stream, those of a group one after the other."""
        jobs = [(place, j) for place in places for j in range(self.spec.samples)]
        shares = [range(number, len(jobs), world_size()) for number in range(world_size())]
        own = [jobs[i] for i in shares[rank()]]
        starts = range(0, len(own), self.batch_size)
        was_training = self.decoder.training
        self.decoder.eval()
        made = [self._decode(own[start : start + self.batch_size]) for start in starts]
        self.decoder.train(was_training)
        parts = [part for of_rank in gather(made) for part in of_rank]
        order = torch.tensor([i for share in shares for i in share]).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    @torch.no_grad()
    def _decode(self, jobs: Sequence[tuple[int, int]]) -> Columns:
        rows = [self.spec.prompt(place) for place, _ in jobs]
        seeds = [image_seed(self.seed, place, sample) for place, sample in jobs]
        decoded = self.spec.strategy.decode(self.decoder, self.judges, Request(rows, seeds))
        verdicts = self.judges.geneval.verdicts(rows, to_uint8(self.decoder.image_tokenizer.decode(decoded.tokens)))
        columns = {"tokens": decoded.tokens, "place": torch.tensor([place for place, _ in jobs])}
        if decoded.log_probs is not None:
            columns["recorded"] = decoded.log_probs.float()
        if (trajectory := decoded.trajectory) is not None:
            columns |= {f"trajectory/{name}": getattr(trajectory, name) for name in trajectory.policy_reads}
        for name in self.scores:
            judge = self.judges[name]
            if name in self.judges.oracles:
                values = judge.of_verdicts(verdicts)  # type: ignore[attr-defined]
            else:
                values = judged(judge, self.decoder, rows, decoded.tokens, decoded.features)
            columns[f"score/{name}"] = judge.as_probability(values).float()
        for name, by in self.potentials.items():
            assert decoded.features is not None  # `setup`
            prefixes = range(1, decoded.tokens.shape[1])
            values = self.judges[by].as_probability(self.judges[by].values(decoded.features, prefixes))
            columns[f"potential/{name}"] = F.pad(values.float(), (1, 0))  # before the first step it is that of all
        columns["objects"] = torch.tensor([sum(map(len, verdict.details.values())) for verdict in verdicts])
        small = {name: part.int() if part.dtype == torch.int64 else part for name, part in columns.items()}
        return {name: part.cpu() for name, part in small.items()}


def _wide(column: Tensor) -> Tensor:
    """Turn codes and numbers of steps, which are stored in 32 bits, into indices; vectors stay as they are."""
    return column if column.is_floating_point() else column.long()


class _Minibatches(Dataset[Any]):
    """The rows of an epoch, of which a loader takes batches as the data module makes them."""

    def __init__(self, data: "GroupsDataModule") -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps * self.data.rows_per_step

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return self.data.batch(indices)


class GroupsDataModule(LightningDataModule):
    """Groups of the LightningModule's own decoder, collected whenever training comes to the next step.

    A step collects groups once and learns from their images `inner_epochs` times, in minibatches. The loader asks for
    them batch by batch, so that a step's images are those of the policy of that moment; checkpoints hold the images of
    the step that they were saved in, and a resumed run goes on with them.

    Args:
        judges: of the run.
        spec: what the groups are made of.
        potentials: by the name of a reward, a judge such as PARM that values unfinished images as that reward values
            finished ones. Its values are taken from the reward, step by step; see `GRPOObjective.advantages`.
        rewards: weights of judges, such as `geneval` (all is right), `clauses` (the fraction of what the prompt asks
            that is), `strict` (and counts are exact) or `parm`; each is normalised by itself.
        held_out: names of judges whose scores are logged, and have no say.
        steps: of an epoch, after which validation may come.
        inner_epochs: how often a step learns from each image.
        batch_size: images of a minibatch, per rank.
        collect_batch_size: images decoded at a time.
        seed: of all images.
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
        held_out: Sequence[str],
        steps: int,
        inner_epochs: int,
        batch_size: int,
        collect_batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.judges, self.spec, self.seed = judges, spec, seed
        self.rewards = {name: weight for name, weight in rewards.items() if weight}
        self.potentials, self.held_out, self.steps, self.inner_epochs = potentials, held_out, steps, inner_epochs
        self.batch_size, self.collect_batch_size = batch_size, collect_batch_size
        for name in ("steps", "inner_epochs", "batch_size", "collect_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if not self.rewards:
            raise ValueError("data.rewards names no judge with a weight other than 0: nothing to learn from")
        if both := {*held_out} & {*self.rewards, *spec.strategy.judge_names}:
            raise ValueError(f"data.held_out names {min(both)!r}, a judge that has a say in what is trained on")
        self._step, self._next_place = -1, 0  # the step whose images are here; where the stream goes on
        self._columns: Columns = {}
        self._stats: dict[str, float] = {}

    @property
    def rows_per_step(self) -> int:
        """Images that a step learns from, each as often as it does."""
        return self.spec.groups * self.spec.samples * self.inner_epochs

    def state_dict(self) -> dict[str, Any]:
        place = {"step": self._step, "next_place": self._next_place}
        return {**place, "columns": dict(self._columns), "stats": dict(self._stats)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step, self._next_place = state_dict["step"], state_dict["next_place"]
        self._columns, self._stats = state_dict["columns"], state_dict["stats"]

    def setup(self, stage: str) -> None:
        """Refuse unknown judges, and minibatches that do not divide a step, before any image is made."""
        named = {"data.rewards": self.rewards, "data.held_out": self.held_out}
        self.judges.refuse_unknown({**named, "data.spec.strategy": self.spec.strategy.judge_names})
        self._check_potentials()
        if stage != "fit":
            return
        self.judges.teachers |= {*self.rewards, *self.spec.strategy.judge_names}
        images, together = self.spec.groups * self.spec.samples, self.batch_size * self.trainer.world_size
        if images % together:
            ranks = f" on each of {self.trainer.world_size} processes" if self.trainer.world_size > 1 else ""
            raise ValueError(f"data.batch_size={self.batch_size}{ranks} does not divide the {images} images of a step")
        minibatches, accumulated = images * self.inner_epochs // together, self.trainer.accumulate_grad_batches
        if minibatches % accumulated:
            said = f"does not divide the {minibatches} minibatches of a step: an update would mix two policies' images"
            raise ValueError(f"trainer.accumulate_grad_batches={accumulated} {said}")

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
        """Return the minibatch of these rows of an epoch, all of one step, whose images are made if need be."""
        step, first = divmod(indices[0], self.rows_per_step)
        step += self.trainer.current_epoch * self.steps
        if step != self._step:
            self._columns, self._stats = self._collect()
            self._step = step
        images = self.spec.groups * self.spec.samples
        shuffled = torch.Generator().manual_seed(image_seed(self.seed, step))
        order = torch.cat([torch.randperm(images, generator=shuffled) for _ in range(self.inner_epochs)])
        rows = order[[index - indices[0] + first for index in indices]]
        columns = {name: part[rows] for name, part in self._columns.items()}
        batch: dict[str, Any] = {
            "prompt": [self.spec.prompt(place)["prompt"] for place in columns["place"].tolist()],
            "tokens": _wide(columns["tokens"]),
            "advantage": columns["advantage"].numpy(),
            "stats": self._stats,
        }
        if "recorded" in columns:
            batch["recorded"] = columns["recorded"].numpy()
        trajectory = [name for name in columns if name.startswith("trajectory/")]
        if trajectory:
            batch["trajectory"] = {name.removeprefix("trajectory/"): _wide(columns[name]) for name in trajectory}
        return batch

    def _collect(self) -> tuple[Columns, dict[str, float]]:
        """Make the images of a step with the policy as it is now; return them, and numbers about all that were made."""
        module: Any = self.trainer.lightning_module
        scores = [*self.rewards, *self.held_out]
        settings = scores, self.potentials, self.spec, self.seed, self.collect_batch_size
        collector = GroupCollector(module.decoder, self.judges, *settings)
        found: list[Columns] = []
        teaches = torch.zeros(0, dtype=torch.bool)
        precision = self.trainer.strategy.precision_plugin
        for _ in range(1 + self.spec.refills):
            missing = self.spec.groups - int(teaches.sum())
            if missing <= 0:
                break
            with precision.forward_context():  # the same as in training
                found.append(collector.collect(range(self._next_place, self._next_place + missing)))
            self._next_place += missing
            teaches = torch.cat([teaches, self._advantages(found[-1]).flatten(1).any(1)])
        columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        stats = self._describe(columns, teaches)
        groups = (~teaches).int().argsort(stable=True)[: self.spec.groups]  # those that teach first
        rows = (groups[:, None] * self.spec.samples + torch.arange(self.spec.samples)).flatten()
        kept = {name: part[rows] for name, part in columns.items()}
        kept["advantage"] = self._advantages(kept).flatten(0, 1)
        return kept, stats

    def _advantages(self, columns: Columns) -> Tensor:
        """The advantages of groups, [P, G, 1 or S]."""
        module: Any = self.trainer.lightning_module
        of_groups = {name: part.unflatten(0, (-1, self.spec.samples)) for name, part in columns.items()}
        rewards = {name: of_groups[f"score/{name}"] for name in self.rewards}
        potentials = {name: of_groups[f"potential/{name}"] for name in self.potentials}
        return module.advantages(rewards, self.rewards, potentials)

    def _describe(self, columns: Columns, teaches: Tensor) -> dict[str, float]:
        """Describe all groups that a step has made, those without a lesson included."""
        tasks = [self.spec.prompt(place)["tag"] for place in columns["place"].tolist()]
        stats = {"dropped": 1 - float(teaches.float().mean()), "objects": float(columns["objects"].float().mean())}
        if "recorded" in columns:  # nats a token, an estimate from what was drawn
            stats["entropy"] = -float(columns["recorded"].sum() / columns["tokens"].numel())
        for name in self.rewards:
            scores = columns[f"score/{name}"]
            stats[f"reward/{name}"] = float(scores.mean())
            stats[f"spread/{name}"] = float(scores.view(-1, self.spec.samples).std(1, correction=0).mean())
            for task in self.spec.per_step:
                of_task = torch.tensor([each == task for each in tasks])
                if of_task.any():
                    stats[f"reward/{name}/{task}"] = float(scores[of_task].mean())
        return stats | {f"held_out/{name}": float(columns[f"score/{name}"].mean()) for name in self.held_out}

    def predict_dataloader(self) -> list[Any]:
        """Make the images of one step with the models as they are and describe them; no batches are left to predict."""
        for name, value in self._collect()[1].items():
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
