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
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy, judged
from lightning_modules.partial_results import KeptBatches, PartialResult, gather_results
from lightning_modules.ranks import rank, world_size
from lightning_modules.report.drawing import trace_views
from lightning_modules.report.pictures import pick_prompt_indices
from lightning_modules.report.results import BEFORE_TRAINING, EvaluationResult, StrategyResult, result_row
from lightning_modules.rewards.fid import FID
from lightning_modules.rewards.geneval_metric import GenEvalMetric
from lightning_modules.rewards.geneval_reward import to_uint8
from lightning_modules.rewards.geneval_rules import CLASS_NAMES, Verdict
from lightning_modules.rewards.registry import JudgeRegistry

Prompts = Sequence[Mapping[str, Any]]
Jobs = Sequence[tuple[int, int]]  # the number of a prompt, and that of its sample


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Attributes:
        decoder: makes the images.
        device: of the decoder.
        prompts: GenEval metadata.
        strategies: names of those that decode.
        untrained: verifiers as they were before training, by name. Strategies that choose by one of them are evaluated
            a second time, by these.
        with_trace: tell how the images of the contact sheets were made.
    """

    decoder: Decoder
    device: torch.device
    prompts: Prompts
    strategies: Sequence[str]
    untrained: Mapping[str, Any]
    with_trace: bool = True


class Evaluator:
    """Decodes and judges each rank's share of the prompts; the result is the same on all ranks.

    Prompts are split over ranks without padding; no collective runs while decoding. The image of (prompt, sample)
    depends on the seed alone.

    Args:
        judges: of the run.
        strategies: by name.
        images_per_prompt: samples of each prompt.
        batch_size: images decoded at a time, candidates not counted.
        seed: of all images.
        sheet_prompts: prompts on the contact sheets and on the page.
        independent_judges: names of judges whose mean score stands beside GenEval (a verifier's value as a
            probability): what training does not optimise tells whether it has found a way to cheat. A strategy that
            chooses by one of them is not judged by it.
        fid: distance to reference images, which stands beside them.
        unfinished: folder where batches are kept until their evaluation is complete.
    """

    def __init__(
        self,
        judges: JudgeRegistry,
        strategies: Mapping[str, Strategy],
        images_per_prompt: int,
        batch_size: int,
        seed: int,
        sheet_prompts: int,
        independent_judges: Sequence[str],
        fid: FID | None,
        unfinished: str,
    ) -> None:
        if images_per_prompt < 1:
            raise ValueError(f"evaluator.images_per_prompt must be at least 1, not {images_per_prompt}")
        self.judges = judges
        self.strategies = dict(strategies)
        self.images_per_prompt = images_per_prompt
        self.batch_size = batch_size
        self.seed = seed
        self.sheet_prompts = sheet_prompts
        self.independent_judges = list(independent_judges)
        self.fid = fid
        self.unfinished = unfinished

    def refuse_unfit_judges(self) -> None:
        """Raise ValueError, naming the key, for judges that do not exist or cannot do what a strategy asks of them."""
        named: dict[str, Sequence[str]] = {"evaluator.independent_judges": self.independent_judges}
        named |= {f"strategies.{key}": strategy.judge_names for key, strategy in self.strategies.items()}
        self.judges.refuse_unknown(named)
        for key, strategy in self.strategies.items():
            try:
                strategy.check_judges(self.judges)
            except ValueError as error:
                raise ValueError(f"strategies.{key}: {error}") from None

    def prepare(self, evaluation: Evaluation) -> None:
        """Refuse unknown judges and words, and detectors that fail their test, before any work starts."""
        self.refuse_unfit_judges()
        for strategy in self.strategies.values():
            strategy.cache_key()  # one that cannot say it is refused now, and not after training
        evaluation.decoder.check_prompts([row["prompt"] for row in evaluation.prompts])
        self.judges.prepare(evaluation.device)

    def runs(self, evaluation: Evaluation) -> dict[str, tuple[Strategy, Judges]]:
        """Return strategies with their judges; those with untrained verifiers come before the first that asks one."""
        judges = {**self.judges, **{name: judge.to(evaluation.device) for name, judge in evaluation.untrained.items()}}
        trained: list[tuple[str, tuple[Strategy, Judges]]] = []
        untrained: list[tuple[str, tuple[Strategy, Judges]]] = []
        first = len(evaluation.strategies)
        for name in evaluation.strategies:
            strategy = self.strategies[name]
            if evaluation.untrained.keys() & set(strategy.judge_names):
                first = min(first, len(trained))
                untrained.append((name + BEFORE_TRAINING, (strategy, judges)))
            trained.append((name, (strategy, self.judges)))
        return dict(trained[:first] + untrained + trained[first:])

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

        Args:
            evaluation: what is evaluated.
            kept: where batches are kept, and read if they are there.
            asked_to_stop: says between batches whether to raise SIGTERMException.
        """
        own = range(rank(), len(evaluation.prompts), world_size())
        jobs = [(i, j) for i in own for j in range(self.images_per_prompt)]
        results = {}
        for name, (strategy, judges) in self.runs(evaluation).items():
            total = PartialResult()
            if self.fid is not None:
                self.fid.start(evaluation.device, rank(), world_size())
            with tqdm(total=len(jobs), desc=f"GenEval {name}", unit="image", disable=rank() > 0) as bar:
                for start in range(0, len(jobs), self.batch_size):
                    if asked_to_stop():
                        if kept and kept.access == "all" and rank() == 0:
                            bar.write(f"The evaluation stops; the same command resumes it ({kept.folder})")
                        raise SIGTERMException
                    batch = jobs[start : start + self.batch_size]
                    make = partial(self._evaluate_batch, evaluation, strategy, judges, batch)
                    with _as_weights_are():
                        total.add(kept.get({"strategy": name, "images": batch}, make) if kept else make())
                    bar.update(len(batch))
            results[name] = self._gather(name, total, evaluation.device)
        settings, ceilings = self._settings(evaluation), self._ceilings(results)
        return EvaluationResult(settings, self._warnings(evaluation, ceilings), results, ceilings)

    def decode(
        self, decoder: Decoder, strategy: Strategy, judges: Judges, prompts: Prompts, jobs: Jobs
    ) -> tuple[Decoded, np.ndarray]:
        """Decode some images; return them with their pixels, uint8 [B, H, W, 3]."""
        request = Request([prompts[i] for i, _ in jobs], [image_seed(self.seed, i, j) for i, j in jobs])
        with _as_weights_are():
            decoded = strategy.decode(decoder, judges, request)
            return decoded, to_uint8(decoder.image_tokenizer.decode(decoded.tokens))

    def _evaluate_batch(self, evaluation: Evaluation, strategy: Strategy, judges: Judges, jobs: Jobs) -> PartialResult:
        start, decoder, prompts = time.perf_counter(), evaluation.decoder, evaluation.prompts
        decoded, images = self.decode(decoder, strategy, judges, prompts, jobs)
        seconds = time.perf_counter() - start
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
        return PartialResult(
            rows=[result_row(*each) for each in zip(files, rows, verdicts, strict=True)],
            thumbnails={i: torch.from_numpy(images[place]) for i, place in shown.items()},
            traces=self._traces(evaluation, judges, decoded, shown),
            cost=decoded.cost,
            seconds=seconds,
            objects=sum(map(_objects, verdicts)),
            independent=independent,
            stats={name: float(values.sum()) for name, values in decoded.stats.items()},
        )

    def _traces(
        self, evaluation: Evaluation, judges: Judges, decoded: Decoded, shown: Mapping[int, int]
    ) -> dict[int, Any]:
        """Return how images were made, by prompt, from their places in the batch."""
        if not shown:
            return {}
        choosing = (judge for name in evaluation.strategies for judge in self.strategies[name].judge_names)
        asked = list(dict.fromkeys([*self.independent_judges, *choosing]))
        chosen = decoded.select(torch.tensor([*shown.values()], device=decoded.tokens.device))
        rows = [evaluation.prompts[i] for i in shown]
        views = trace_views(evaluation.decoder, judges, asked, rows, chosen, evaluation.with_trace)
        return dict(zip(shown, views, strict=True))

    def _gather(self, name: str, own: PartialResult, device: torch.device) -> StrategyResult:
        metric = GenEvalMetric().to(device)
        metric.update([row["tag"] for row in own.rows], [row["correct"] for row in own.rows])
        result = gather_results(name, own, {task: float(score) for task, score in metric.compute().items()})
        if self.fid is not None:
            result.independent["fid"] = self.fid.compute()
        return result

    def _settings(self, evaluation: Evaluation) -> dict[str, Any]:
        return {
            "decoder": type(evaluation.decoder).__name__,
            "judged_by": self.judges.geneval.judged_by,
            "seed": self.seed,
            "prompts": len(evaluation.prompts),
            "images_per_prompt": self.images_per_prompt,
        }

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


@contextmanager
def _as_weights_are() -> Iterator[None]:
    """Compute in the precision of the weights: some tasks are called within the Trainer's autocast, others without."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def _objects(verdict: Verdict) -> int:
    return sum(map(len, verdict.details.values()))
