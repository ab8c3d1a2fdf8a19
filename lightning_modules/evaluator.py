"""The Evaluator: decodes prompts by some strategies, judges the images, and scores every strategy."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from datamodules.geneval_prompts import OFFICIAL_IMAGES, sample_path, unofficial
from lightning_modules.artifacts import ArtifactCache
from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.remembered import Runs, remembering
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, judged
from lightning_modules.partial_results import KeptBatches, PartialResult, gather_results
from lightning_modules.ranks import rank, world_size
from lightning_modules.report.drawing import trace_views
from lightning_modules.report.pictures import pick_prompt_indices
from lightning_modules.report.results import (
    BEFORE_TRAINING,
    SIDE_BY_SIDE,
    EvaluationResult,
    StrategyResult,
    result_row,
)
from lightning_modules.rewards.fid import FID
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES
from lightning_modules.rewards.geneval_reward import to_uint8
from lightning_modules.rewards.registry import JudgeRegistry

Prompts = Sequence[Mapping[str, Any]]
_LONGEST = 255  # bytes of a file name
Jobs = Sequence[tuple[int, int]]  # the number of a prompt, and that of its sample


@contextmanager
def _as_weights_are() -> Iterator[None]:
    """Compute in the precision of the weights: some tasks are called within the Trainer's autocast, others without."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated: GenEval's `prompts`, by the strategies of these names."""

    decoder: Decoder
    device: torch.device
    prompts: Prompts
    strategies: Sequence[str]
    untrained: Mapping[str, Any]  # verifiers as they were before training; strategies that ask one run with it as well
    with_trace: bool = True  # tell how the images of the contact sheets were made
    key: str = "geneval.test_prompts"  # of the config, which says the prompts


@dataclass(eq=False)
class Evaluator:
    """Decodes and judges each rank's share of the prompts; the result is the same on all ranks.

    Prompts are split over ranks without padding; no collective runs while decoding. The image of (prompt, sample)
    depends on the seed alone.

    Attributes:
        batch_size: images decoded at a time, candidates not counted.
        sheet_prompts: prompts on the contact sheets and on the page.
        independent_judges: names of judges whose mean score stands beside GenEval (a verifier's as a probability), to
            tell whether training cheats. A strategy that chooses by one is not judged by it.
        fid: distance to reference images, which stands beside them.
        unfinished: folder where batches are kept until their evaluation is complete.
    """

    judges: JudgeRegistry
    strategies: dict[str, Strategy]
    images_per_prompt: int
    batch_size: int
    seed: int
    sheet_prompts: int
    independent_judges: list[str]
    fid: FID | None
    unfinished: str

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(f"evaluator.images_per_prompt must be at least 1, not {self.images_per_prompt}")
        for name, strategy in self.strategies.items():  # a sheet of images is called after each
            if not isinstance(strategy, Strategy):
                raise ValueError(f"strategies.{name} is no Strategy, but a {type(strategy).__name__}")
            if name == SIDE_BY_SIDE:
                raise ValueError(f"strategies.{name}: this is what the sheet of all is called; give it another name")
            if "/" in name or len(f"{name}{BEFORE_TRAINING}.png".encode()) > _LONGEST:
                raise ValueError(f"strategies: {name!r} cannot be the name of a file: give it a shorter one, without /")

    def refuse_unfit_strategies(self, decoder: Decoder, training: bool = False) -> None:
        """Raise ValueError, naming the key, for unknown judges and for strategies that these or the decoder cannot do.

        In `training`, neither what is trained nor what decides what is trained on is independent.
        """
        named: dict[str, Sequence[str]] = {"evaluator.independent_judges": self.independent_judges}
        named |= {f"strategies.{key}": strategy.judge_names for key, strategy in self.strategies.items()}
        self.judges.refuse_unknown(named)
        taught = dict.fromkeys(self.judges.copy_trained() if training else (), "is trained")
        taught |= dict.fromkeys(self.judges.teachers if training else (), "decides what is trained on")
        for name in self.independent_judges:
            if name in taught:
                raise ValueError(f"evaluator.independent_judges: {name!r} {taught[name]}")
        for key, strategy in self.strategies.items():
            try:
                strategy.check_judges(self.judges)
                strategy.check_decoder(decoder)
            except ValueError as error:
                raise ValueError(f"strategies.{key}: {error}") from None

    def prepare(self, evaluation: Evaluation, training: bool = False) -> None:
        """Refuse unknown judges and words, and detectors that fail their test, before any work starts."""
        self.refuse_unfit_strategies(evaluation.decoder, training)
        for strategy in self.strategies.values():
            strategy.cache_key()  # one that cannot say it is refused now, and not after training
        try:
            evaluation.decoder.check_prompts([row["prompt"] for row in evaluation.prompts])
        except ValueError as error:
            raise ValueError(f"{evaluation.key}: {error}") from None
        self.judges.prepare(evaluation.device)

    def runs(self, evaluation: Evaluation) -> Runs:
        """Return strategies with their judges; those with untrained verifiers come before the first that asks one."""
        judges = {**self.judges, **{name: judge.to(evaluation.device) for name, judge in evaluation.untrained.items()}}
        chosen = {name: self.strategies[name] for name in evaluation.strategies}
        asking = [name for name in chosen if evaluation.untrained.keys() & {*chosen[name].judge_names}]
        runs: dict[str, tuple[Strategy, Judges]] = {}
        for name, strategy in chosen.items():
            if name in asking[:1]:
                runs |= {other + BEFORE_TRAINING: (chosen[other], judges) for other in asking}
            runs[name] = strategy, self.judges
        return runs

    def cache_key(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return all that decides the result but the code."""
        strategies = {name: self.strategies[name] for name in evaluation.strategies}
        choosing = {judge for strategy in strategies.values() for judge in strategy.judge_names}
        return {
            "decoder": evaluation.decoder.cache_key(),
            "precision": sorted({str(weight.dtype) for weight in evaluation.decoder.parameters()}),
            "strategies": {name: strategy.cache_key() for name, strategy in strategies.items()},
            "judges": self.judges.keys_of(choosing.union(self.independent_judges)),
            "before_training": {name: judge.cache_key() for name, judge in evaluation.untrained.items()},
            "verdicts": self.judges.geneval.verdict_key(),
            "independent_judges": self.independent_judges,
            "fid": self.fid and self.fid.cache_key(),
            "prompts": list(evaluation.prompts),
            "images_per_prompt": self.images_per_prompt,
            "seed": self.seed,
        }

    @contextmanager
    def resumed(self, evaluation: Evaluation, asked_to_stop: Callable[[], bool]) -> Iterator[EvaluationResult]:
        """Evaluate, and forget the single batches when the `with` block, which uses the result, has ended.

        An evaluation that is killed resumes where it was, unless it measures FID, which is of all images together.
        """
        key = {**self.cache_key(evaluation), "sheet_prompts": self.sheet_prompts}
        parts = ArtifactCache(self.unfinished, __name__).parts("unfinished", key)
        with KeptBatches(parts) if self.fid is None else nullcontext() as kept:
            yield self.evaluate(evaluation, kept, asked_to_stop)

    @torch.no_grad()
    def evaluate(
        self, evaluation: Evaluation, kept: KeptBatches | None = None, asked_to_stop: Callable[[], bool] = bool
    ) -> EvaluationResult:
        """Decode and judge this rank's share by each strategy, then gather the results.

        Batches are kept in `kept`, and read if they are there. `asked_to_stop` says between them whether to raise
        SIGTERMException.
        """
        own = range(rank(), len(evaluation.prompts), world_size())
        jobs = [(i, j) for i in own for j in range(self.images_per_prompt)]
        runs, results = self.runs(evaluation), dict[str, StrategyResult]()
        # FID's sums are of one strategy at a time; others go side by side, so that they share images.
        groups = [runs] if self.fid is None else [{name: run} for name, run in runs.items()]
        settings: dict[str, Any] = {"leave": evaluation.with_trace, "disable": rank() > 0, "dynamic_ncols": True}
        images = len(runs) * len(evaluation.prompts) * self.images_per_prompt
        with tqdm(total=images, desc="GenEval", unit="image", **settings) as bar:
            for group in groups:
                results |= self._measure(evaluation, group, jobs, kept, asked_to_stop, bar)
        made = {"decoder": type(evaluation.decoder).__name__, "judged_by": self.judges.geneval.judged_by}
        asked = {"seed": self.seed, "prompts": len(evaluation.prompts), "images_per_prompt": self.images_per_prompt}
        ceilings = self._ceilings(results)
        return EvaluationResult({**made, **asked}, self._warnings(evaluation, ceilings), results, ceilings)

    def _measure(
        self,
        evaluation: Evaluation,
        runs: Runs,
        jobs: Jobs,
        kept: KeptBatches | None,
        asked_to_stop: Callable[[], bool],
        bar: "tqdm[None]",
    ) -> dict[str, StrategyResult]:
        """Decode and judge images by strategies side by side, batch by batch, then gather the results."""
        totals = {name: PartialResult() for name in runs}
        if self.fid is not None:
            self.fid.start(evaluation.device, rank(), world_size())
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            for name, (strategy, judges) in remembering(runs).items():
                if asked_to_stop():
                    if kept and kept.access == "all" and rank() == 0:
                        bar.write(f"The evaluation stops; the same command resumes it ({kept.folder})")
                    raise SIGTERMException
                bar.set_postfix_str(name)
                make = partial(self._evaluate_batch, evaluation, strategy, judges, batch)
                totals[name].add(kept.get({"strategy": name, "images": batch}, make) if kept else make())
                bar.update(min(len(batch) * world_size(), bar.total - bar.n))  # the other ranks keep step
        results = {name: gather_results(name, total) for name, total in totals.items()}
        if self.fid is not None:
            for result in results.values():
                result.independent["fid"] = self.fid.compute()
        return results

    @_as_weights_are()
    def decode(
        self, decoder: Decoder, strategy: Strategy, judges: Judges, prompts: Prompts, jobs: Jobs
    ) -> tuple[Decoded, np.ndarray]:
        """Decode some images; return them with their pixels, uint8 [B, H, W, 3]."""
        request = Request([prompts[i] for i, _ in jobs], [image_seed(self.seed, i, j) for i, j in jobs])
        decoded = strategy.decode(decoder, judges, request)
        return decoded, to_uint8(decoder.image_tokenizer.decode(decoded.tokens))

    @_as_weights_are()
    def _evaluate_batch(self, evaluation: Evaluation, strategy: Strategy, judges: Judges, jobs: Jobs) -> PartialResult:
        start, decoder, prompts = time.perf_counter(), evaluation.decoder, evaluation.prompts
        decoded, images = self.decode(decoder, strategy, judges, prompts, jobs)
        seconds = time.perf_counter() - start + decoded.cost.seconds
        rows = [prompts[i] for i, _ in jobs]
        verdicts = self.judges.geneval.verdicts(rows, images)
        if self.fid is not None:
            self.fid.update(images)
        independent = {}
        for name in self.independent_judges:
            if name not in strategy.judge_names:
                values = judged(judges[name], decoder, rows, decoded.tokens, decoded.features)
                independent[name] = float(judges[name].as_probability(values).sum())
        files = [sample_path(i, j) for i, j in jobs]
        on_sheet = pick_prompt_indices(len(prompts), self.sheet_prompts)
        shown = {i: place for place, (i, j) in enumerate(jobs) if j == 0 and i in on_sheet}
        views = []
        if shown:
            choosing = (judge for name in evaluation.strategies for judge in self.strategies[name].judge_names)
            asked = list(dict.fromkeys([*self.independent_judges, *choosing]))
            drawn = decoded.select(torch.tensor([*shown.values()], device=decoded.tokens.device))
            views = trace_views(decoder, judges, asked, [prompts[i] for i in shown], drawn, evaluation.with_trace)
        return PartialResult(
            rows=[result_row(*each) for each in zip(files, rows, verdicts, strict=True)],
            thumbnails={i: torch.from_numpy(images[place]) for i, place in shown.items()},
            traces=dict(zip(shown, views, strict=True)),
            cost=decoded.cost,
            seconds=seconds,
            objects=sum(len(found) for verdict in verdicts for found in verdict.details.values()),
            independent=independent,
            stats={name: float(values.sum()) for name, values in decoded.stats.items()},
        )

    def _ceilings(self, names: Iterable[str]) -> list[str]:
        """Return the strategies that choose by what they are measured by."""
        strategies = {name: self.strategies[name.removesuffix(BEFORE_TRAINING)] for name in names}
        return [name for name, strategy in strategies.items() if self.judges.oracles & {*strategy.judge_names}]

    def _warnings(self, evaluation: Evaluation, ceilings: Sequence[str]) -> list[str]:
        """Return why scores are ceilings, or (with COCO's classes) not those of the official benchmark."""
        found = [f"{name} chooses by what it is measured by: it is a ceiling" for name in ceilings]
        if tuple(self.judges.geneval.detector.class_names) != CLASS_NAMES:
            return found
        if self.images_per_prompt != OFFICIAL_IMAGES:
            found.append(f"{self.images_per_prompt} images of each prompt instead of the official {OFFICIAL_IMAGES}")
        return found + unofficial(evaluation.prompts)
