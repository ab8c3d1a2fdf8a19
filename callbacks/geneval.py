"""GenEvalCallback: decodes the prompts by every strategy, judges the images, logs, and leaves the results on disk."""

import copy
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from tqdm import tqdm

from datamodules.geneval import OFFICIAL_IMAGES, sample_path, unofficial
from datamodules.preferences import PreferencesDataModule
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.cache_key import digest
from lightning_modules.decoding.strategy import Judges, Strategy, judged
from lightning_modules.optim import trainable
from lightning_modules.report.drawing import stories
from lightning_modules.report.media import log_images, log_page
from lightning_modules.report.page import write_page
from lightning_modules.report.tables import (
    BEFORE_TRAINING,
    StrategyResult,
    print_table,
    result_row,
    spread,
    write_report,
)
from lightning_modules.rewards.fid import FID
from lightning_modules.rewards.geneval import CLASS_NAMES
from lightning_modules.rewards.geneval_metric import GenEvalMetric
from lightning_modules.rewards.geneval_reward import GenEvalReward, to_uint8
from lightning_modules.rewards.verifier import Reward
from lightning_modules.runs.checkpoints import code
from lightning_modules.shares import Share, ShareStore, combine


class GenEvalCallback(Callback):
    """GenEval at validation epoch ends (on validation prompts) and in testing (on evaluation prompts).

    Prompts are split over ranks without padding; no collective runs while decoding. The image of (prompt, sample)
    depends on the seed alone. In validation `val/geneval` is the score of `monitor`, for ModelCheckpoint; in an epoch
    without evaluation the latest score is logged again, so that the key is always there. A test that is killed goes on
    where it was, unless it measures FID, which is of all images together.

    Args:
        reward: judges the images.
        strategies: by name.
        validation_strategies: the names that validation decodes.
        test_strategies: the names that testing decodes; null: all of them.
        monitor: the strategy whose score is `val/geneval`.
        before_training: the test that ends training shows strategies that ask a trained verifier a second time, with
            that verifier as it was before: what training has added.
        validation_prompts, test_prompts: GenEval metadata.
        images_per_prompt: samples of each prompt.
        batch_size: images decoded at a time, candidates included in none of it.
        every_n_epochs: how often validation runs it.
        seed: of all images.
        folder: where results go.
        unfinished: where the batches of a test are kept until its results are written.
        sheet_prompts: prompts on the contact sheets and on the page.
        independent_judges: names of judges whose mean score is logged beside GenEval (a verifier's value as a
            probability), as are objects per image: what training does not optimise tells whether it has found a way to
            cheat. A strategy that chooses by one of them is not judged by it.
        rewards: further judges of finished images, by name, for strategies and `independent_judges`.
        fid: distance to reference images, logged beside GenEval as `independent_judges` is.
    """

    def __init__(
        self,
        reward: GenEvalReward,
        strategies: Mapping[str, Strategy],
        validation_strategies: Sequence[str],
        test_strategies: Sequence[str] | None,
        monitor: str,
        before_training: bool,
        validation_prompts: Sequence[Mapping[str, Any]],
        test_prompts: Sequence[Mapping[str, Any]],
        images_per_prompt: int,
        batch_size: int,
        every_n_epochs: int,
        seed: int,
        folder: str,
        unfinished: str,
        sheet_prompts: int,
        independent_judges: Sequence[str],
        rewards: Mapping[str, Reward],
        fid: FID | None = None,
    ) -> None:
        self.test_strategies = list(strategies if test_strategies is None else test_strategies)
        named = {"validation_strategies": validation_strategies, "test_strategies": self.test_strategies}
        for key, names in {**named, "monitor": [monitor]}.items():
            if unknown := [name for name in names if name not in strategies]:
                known = ", ".join(strategies)
                raise ValueError(f"callbacks.geneval.{key} names the strategy {unknown[0]!r}; there are: {known}")
        if monitor not in validation_strategies:
            raise ValueError(f"callbacks.geneval.monitor {monitor!r} is not among validation_strategies")
        if images_per_prompt < 1:
            raise ValueError(f"callbacks.geneval.images_per_prompt must be at least 1, not {images_per_prompt}")
        self.reward = reward
        self.strategies = dict(strategies)
        self.validation_strategies = list(validation_strategies)
        self.monitor = monitor
        self.before_training = before_training
        self.validation_prompts, self.test_prompts = validation_prompts, test_prompts
        self.images_per_prompt = images_per_prompt
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self.folder, self.unfinished = Path(folder), Path(unfinished)
        self.sheet_prompts = sheet_prompts
        self.independent_judges = list(independent_judges)
        self.rewards = rewards
        self.fid = fid
        self._untrained: Judges = {}
        self._latest: dict[str, float] = {}
        self._store: ShareStore | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"latest": dict(self._latest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest = dict(state_dict["latest"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse prompts with unknown words, judges that do not exist and blind detectors before any work starts."""
        judges = self._judges(pl_module)
        named: dict[str, Sequence[str]] = {"callbacks.geneval.independent_judges": self.independent_judges}
        named |= {f"strategies.{key}": strategy.judge_names for key, strategy in self.strategies.items()}
        for key, names in named.items():
            for name in names:
                if name not in judges:
                    raise ValueError(f"{key} names the judge {name!r}; there are: {', '.join(judges)}")
        for strategy in self.strategies.values():
            strategy.cache_key()  # one that cannot say it is refused now, and not after training
        data = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, PreferencesDataModule):
            for name in self.independent_judges:
                if name in data.teachers:
                    raise ValueError(f"callbacks.geneval.independent_judges: {name!r} decides what is trained on")
        if stage == "fit" and self.before_training:  # a checkpoint is restored after this
            own: Judges = pl_module.judges  # type: ignore[assignment]
            learning = {name: judge for name, judge in own.items() if isinstance(judge, nn.Module) and trainable(judge)}
            self._untrained = copy.deepcopy(learning)
        prompts = self.test_prompts if stage == "test" else self.validation_prompts
        pl_module.decoder.check_prompts([row["prompt"] for row in prompts])  # type: ignore[operator, union-attr]
        self.reward.prepare(trainer.strategy.root_device)

    def _judges(self, pl_module: LightningModule) -> Judges:
        """All judges, by name."""
        return {**pl_module.judges, **self.reward.kinds(), **self.rewards}  # type: ignore[dict-item]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if not self._latest or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            judges = self._judges(pl_module)
            runs = {name: (self.strategies[name], judges) for name in self.validation_strategies}
            results = self._evaluate(trainer, pl_module, self.validation_prompts, runs)
            self._latest = _scores("val", results)
            for name, result in results.items():
                self._latest[f"val/objects/{name}"] = result.objects
                self._latest |= {
                    f"val/independent/{judge}/{name}": value for judge, value in result.independent.items()
                }
            self._latest["val/geneval"] = results[self.monitor].overall
            log_images(trainer, "val", results)
        pl_module.log_dict(self._latest, prog_bar=False, sync_dist=True)  # all ranks have the same, or Lightning warns

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        results = self.test(trainer, pl_module)
        pl_module.log_dict(_scores("test", results), sync_dist=True)
        if trainer.is_global_zero:
            self.write(self.folder, pl_module, results)
            print_table(results)
            log_images(trainer, "test", results)
            log_page(trainer, self.folder / "page.html")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._store is not None:
            self._store.release()

    def test(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, StrategyResult]:
        """What every strategy makes of the evaluation prompts, the same on all ranks."""
        if self.fid is None:
            self._store = self._store_of(trainer, pl_module)
        return self._evaluate(trainer, pl_module, self.test_prompts, self._tested(pl_module))

    def _tested(self, pl_module: LightningModule) -> dict[str, tuple[Strategy, Judges]]:
        """Strategies with their judges; before the first that asks a trained one, all such with the untrained one."""
        judges = self._judges(pl_module)
        trained = {name: (self.strategies[name], judges) for name in self.test_strategies}
        asking = [name for name in trained if self._untrained.keys() & set(self.strategies[name].judge_names)]
        if not asking:
            return trained
        untrained = {
            name: judge.to(pl_module.device) if isinstance(judge, nn.Module) else judge
            for name, judge in self._untrained.items()
        }
        first = list(trained).index(asking[0])
        before = {name + BEFORE_TRAINING: (self.strategies[name], {**judges, **untrained}) for name in asking}
        ordered = list(trained.items())
        return dict([*ordered[:first], *before.items(), *ordered[first:]])

    def write(self, folder: Path, pl_module: LightningModule, results: Mapping[str, StrategyResult]) -> None:
        """Leave results of a test in a folder, and say what makes them incomparable."""
        notes = self._incomparable()
        about = {
            "decoder": type(pl_module.decoder).__name__,
            "judged_by": self.reward.judged_by,
            "seed": self.seed,
            "prompts": len(self.test_prompts),
            "images_per_prompt": self.images_per_prompt,
            "notes": notes,
        }
        write_report(folder, about, results)
        write_page(folder / "page.html", about, results)
        for sentence in notes:
            print(sentence)
        if self._store is not None:
            self._store.clear()

    def test_key(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What decides the results of a test."""
        strategies = {name: self.strategies[name] for name in self.test_strategies}
        judges = self._judges(pl_module)
        asked = {
            *self.independent_judges,
            *(judge for strategy in strategies.values() for judge in strategy.judge_names),
        }
        decoder: Any = pl_module.decoder
        return {
            "decoder": decoder.cache_key(),
            "precision": str(trainer.precision),
            "strategies": {name: strategy.cache_key() for name, strategy in strategies.items()},
            "judges": {name: judges[name].cache_key() for name in asked},
            "before_training": {name: judge.cache_key() for name, judge in self._untrained.items()},
            "verdicts": self.reward.verdict_key(),
            "independent_judges": self.independent_judges,
            "fid": self.fid and self.fid.cache_key(),
            "prompts": list(self.test_prompts),
            "images_per_prompt": self.images_per_prompt,
            "seed": self.seed,
        }

    def _store_of(self, trainer: Trainer, pl_module: LightningModule) -> ShareStore:
        """Where the batches of a test are kept: whatever else decides what is in them, code included, has another."""
        batches = self.sheet_prompts, self.batch_size, trainer.world_size
        name = f"unfinished-{digest([code(), self.test_key(trainer, pl_module), *batches])}"
        store = ShareStore(self.unfinished / name, trainer)
        if trainer.is_global_zero and (count := store.count):
            print(f"The evaluation goes on; batches decoded and judged before: {count} ({store.folder})")
        if trainer.is_global_zero and store.access == "read":
            print(f"scores_dir: nothing can be written to {self.unfinished}, so no batch of this evaluation is kept")
        return store

    def _incomparable(self) -> list[str]:
        """Why scores are ceilings, or (with COCO's classes) not those of the official benchmark, a sentence each."""
        truth = set(self.reward.kinds())
        oracles = [name for name in self.test_strategies if truth.intersection(self.strategies[name].judge_names)]
        notes = [f"{name} chooses by what it is measured by: it is a ceiling" for name in oracles]
        if tuple(self.reward.detector.class_names) != CLASS_NAMES:
            return notes
        if self.images_per_prompt != OFFICIAL_IMAGES:
            notes.append(f"{self.images_per_prompt} images of each prompt instead of the official {OFFICIAL_IMAGES}")
        return notes + unofficial(self.test_prompts)

    def _held_out(self, strategy: Strategy) -> list[str]:
        """The judges of `independent_judges` that do not choose what the strategy makes."""
        return [name for name in self.independent_judges if name not in strategy.judge_names]

    @torch.no_grad()
    def _evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prompts: Sequence[Mapping[str, Any]],
        runs: Mapping[str, tuple[Strategy, Judges]],
    ) -> dict[str, StrategyResult]:
        """Decode and judge this rank's share by each strategy and its judges, then put the shares together."""
        pl_module.eval()
        rank, world_size = trainer.global_rank, trainer.world_size
        kept = self._store if trainer.testing else None
        jobs = [(i, j) for i in range(rank, len(prompts), world_size) for j in range(self.images_per_prompt)]
        results = {}
        for name, (strategy, judges) in runs.items():
            share = Share()
            if self.fid is not None:
                self.fid.start(pl_module.device, rank, world_size)
            with tqdm(total=len(jobs), desc=f"GenEval {name}", unit="image", disable=rank > 0) as bar:
                for start in range(0, len(jobs), self.batch_size):
                    if trainer.received_sigterm:
                        if kept and rank == 0:
                            bar.write(f"The evaluation stops, and the same command goes on with it ({kept.folder})")
                        raise SIGTERMException
                    batch = jobs[start : start + self.batch_size]
                    judge = partial(self._decode, pl_module, judges, strategy, prompts, batch, trainer.testing)
                    share.add(kept.get(f"{name}-{start}", judge) if kept else judge())
                    bar.update(len(batch))
            metric = GenEvalMetric().to(pl_module.device)
            correct = torch.tensor([row["correct"] for row in share.rows], device=pl_module.device)
            metric.update([row["tag"] for row in share.rows], correct)
            scores = {task: float(score) for task, score in metric.compute().items()}
            results[name] = combine(name, share, scores)
            if self.fid is not None:
                results[name].independent["fid"] = self.fid.compute()
        return results

    def _decode(
        self,
        pl_module: LightningModule,
        judges: Judges,
        strategy: Strategy,
        prompts: Sequence[Mapping[str, Any]],
        jobs: Sequence[tuple[int, int]],
        tell: bool,
    ) -> Share:
        """Decode and judge one batch; `tell` how images were made as well."""
        share = Share()
        decoder: Any = pl_module.decoder
        rows = [prompts[i] for i, _ in jobs]
        start = time.perf_counter()
        decoded = strategy.decode(decoder, judges, Request(rows, [image_seed(self.seed, i, j) for i, j in jobs]))
        images = to_uint8(decoder.image_tokenizer.decode(decoded.tokens))
        share.seconds = time.perf_counter() - start
        share.cost = decoded.cost
        for name, note in decoded.stats.items():
            share.stats[name] = float(note.sum())
        verdicts = self.reward.verdicts(rows, images)
        if self.fid is not None:
            self.fid.update(images)
        share.objects = sum(len(found) for verdict in verdicts for found in verdict.details.values())
        for name in self._held_out(strategy):
            judge = judges[name]
            values = judged(judge, decoder, rows, decoded.tokens, decoded.features)
            share.independent[name] = float(judge.as_probability(values).sum())
        for (i, j), row, verdict in zip(jobs, rows, verdicts, strict=True):
            share.rows.append(result_row(sample_path(i, j), row, verdict))
        on_sheet = spread(len(prompts), self.sheet_prompts)
        shown = [place for place, (i, j) in enumerate(jobs) if j == 0 and i in on_sheet]
        share.thumbnails = {jobs[place][0]: images[place] for place in shown}
        if shown:
            names = self.test_strategies if tell else self.validation_strategies
            choosing = (judge for name in names for judge in self.strategies[name].judge_names)
            asked = list(dict.fromkeys([*self.independent_judges, *choosing]))
            chosen = decoded.select(torch.tensor(shown, device=decoded.tokens.device))
            told = stories(decoder, judges, asked, [rows[place] for place in shown], chosen, tell)
            share.stories = {jobs[place][0]: story for place, story in zip(shown, told, strict=True)}
        return share


def _scores(stage: str, results: Mapping[str, StrategyResult]) -> dict[str, float]:
    """Scores of every strategy, overall and in each task, by the names under which they are logged."""
    scores = {}
    for name, result in results.items():
        scores[f"{stage}/geneval/{name}"] = result.overall
        scores |= {f"{stage}/geneval/{name}/{task}": score for task, score in result.tasks.items()}
    return scores
