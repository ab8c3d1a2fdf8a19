"""Groups: which prompts come next, and how a policy's images of each are made and judged."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.rollouts import ground
from lightning_modules.backbone.decoder import Request, TokenDecoder
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.strategy import Strategy, judged
from lightning_modules.ranks import gather, rank, world_size
from lightning_modules.rewards.geneval_reward import to_uint8
from lightning_modules.rewards.registry import JudgeRegistry

Columns = dict[str, Tensor]  # by name, a row an image
_LEAST_WEIGHT = 0.1  # of a task: now and then it is tried again


@dataclass(frozen=True)
class GroupSpec:
    """An endless stream of prompts, and how groups of images are made of them.

    Attributes:
        prompts: GenEval metadata.
        strategy: decodes the images.
        per_round: groups of each task that a round takes from the stream, which mixes tasks evenly; 0: none.
        samples: images of a group.
        refills: how often a round replaces groups that teach nothing (all of whose images are equally good) by those of
            the next prompts; what is still missing then is filled up with such groups.
        curriculum: how fast the weights of tasks follow the fraction of their groups that teach: each group counts this
            much against all before it. 0: all tasks come as `per_round` says.
    """

    prompts: Sequence[Mapping[str, Any]]
    strategy: Strategy
    per_round: Mapping[str, int]
    samples: int
    refills: int
    curriculum: float = 0.0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"data.spec.samples must be at least 1, not {self.samples}")
        if self.refills < 0:
            raise ValueError(f"data.spec.refills must be at least 0, not {self.refills}")
        if not 0 <= self.curriculum < 1:
            raise ValueError(f"data.spec.curriculum must be at least 0 and below 1, not {self.curriculum}")
        if min(self.per_round.values(), default=0) < 0 or not self.groups:
            raise ValueError("data.spec.per_round must have at least 1 group, and of no task fewer than 0")
        if missing := {task for task, count in self.per_round.items() if count} - {row["tag"] for row in self.prompts}:
            raise ValueError(f"data.spec.per_round names {min(missing)!r}, a task of which there are no prompts")

    @property
    def groups(self) -> int:
        """Groups that a round learns from."""
        return sum(self.per_round.values())

    @cached_property
    def _cycle(self) -> list[tuple[str, int]]:
        """The task, and the number among those of its task, of each group of a round."""
        places = [((j + 0.5) / count, task, j) for task, count in self.per_round.items() for j in range(count)]
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
        return pool[(cycles * self.per_round[task] + j) % len(pool)]


@dataclass
class Curriculum:
    """Where a stream of prompts goes on, and which of them are passed over, because groups of their task seldom teach.

    A task of which every other group teaches gets half as many groups, against `per_round`, as one of which all do.
    """

    next_place: int = 0
    taken: int = 0  # places so far, less those that were passed over
    teaches: dict[str, float] = field(default_factory=dict)  # fraction of a task's groups, the latest counting most
    credit: dict[str, float] = field(default_factory=dict)  # of a task; a group costs 1

    def take(self, spec: GroupSpec, count: int) -> list[int]:
        """Take the next places of the stream, less those that are passed over."""
        places: list[int] = []
        while len(places) < count:
            task = spec.prompt(self.next_place)["tag"]
            best = max(self.teaches.values(), default=1.0)
            weight = self.teaches.get(task, 1.0) / best if best else 1.0  # of a dead policy nothing tells tasks apart
            self.credit[task] = self.credit.get(task, 0.0) + max(weight, _LEAST_WEIGHT)
            if self.credit[task] >= 1:
                self.credit[task] -= 1
                places.append(self.next_place)
            self.next_place += 1
        self.taken += count
        return places

    def learn(self, spec: GroupSpec, places: Sequence[int], taught: Sequence[bool]) -> None:
        """Take into account which of these groups have taught something."""
        for place, value in zip(places, taught, strict=True):
            task = spec.prompt(place)["tag"]
            before = self.teaches.get(task, 1.0)
            self.teaches[task] = before + spec.curriculum * (value - before)


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
    labelled: bool  # with what PARM learns from; see `PARMObjective.losses`

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
        with torch.autocast("cpu", enabled=False):  # which joins no numbers of half precision
            return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    @torch.no_grad()
    def _decode(self, jobs: Sequence[tuple[int, int]]) -> Columns:
        rows = [self.spec.prompt(place) for place, _ in jobs]
        seeds = [image_seed(self.seed, place, sample) for place, sample in jobs]
        decoded = self.spec.strategy.decode(self.decoder, self.judges, Request(rows, seeds))
        geneval = self.judges.geneval
        found = geneval.detect(to_uint8(self.decoder.image_tokenizer.decode(decoded.tokens)))
        verdicts = geneval.judge(rows, found)
        columns = {"tokens": decoded.tokens, "place": torch.tensor([place for place, _ in jobs])}
        if decoded.log_probs is not None:
            columns["recorded"] = decoded.log_probs.float()
        if (trajectory := decoded.trajectory) is not None:
            read = {name: getattr(trajectory, name) for name in trajectory.policy_reads}
            columns |= {f"trajectory/{name}": part for name, part in read.items() if part is not None}
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
        if self.labelled:
            grounds = [ground(self.decoder, geneval, *each) for each in zip(rows, found, strict=True)]
            columns["label/grounding"] = torch.from_numpy(np.stack(grounds)).half()  # 0, 1 and NaN
            columns["label/clauses"] = torch.tensor([[*map(float, verdict.clauses)] for verdict in verdicts])
            columns["label/correct"] = torch.tensor([float(verdict.correct) for verdict in verdicts])
            columns["label/first_unverified"] = decoded.first_unverified
        small = {name: part.int() if part.dtype == torch.int64 else part for name, part in columns.items()}
        return {name: part.cpu() for name, part in small.items()}
