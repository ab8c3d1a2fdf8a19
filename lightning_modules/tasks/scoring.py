"""Scoring: GenEval of a folder of images, whoever made them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from tqdm import tqdm

from datamodules.geneval_prompts import OFFICIAL_IMAGES, repeated, unofficial
from datamodules.image_folder import ImageFolderDataModule, Images, ScoreStore, read
from datamodules.prompt_folders import scan, unnumbered
from lightning_modules.broken_files import read_json
from lightning_modules.evaluator import Evaluator
from lightning_modules.files import write_text
from lightning_modules.report.pictures import pick_prompt_indices, save_image
from lightning_modules.report.results import StrategyResult, result_line, result_row, write_report_json
from lightning_modules.report.sheets import contact_sheet
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES, TASKS
from lightning_modules.rewards.geneval_metric import Summary, summarize
from lightning_modules.rewards.geneval_reward import by_size


class Scoring(LightningModule):
    """Judges the images of a folder in GenEval's layout, and writes results.jsonl, geneval.json and a contact sheet.

    The Trainer brings device, ranks and progress. Prompts are split over ranks; one with a result is not judged again.

    Args:
        evaluator: judges the images. Each of its `independent_judges` becomes a column of results.jsonl and a mean in
            geneval.json, and its `fid` of all images a number there.
        results: where results are kept, a file a prompt.
        folder: where the report goes.
        batch_size: prompts a batch, per rank.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be scored; the sentence names the file.
    """

    def __init__(
        self, images: str, evaluator: Evaluator, results: str, folder: str, batch_size: int, num_workers: int
    ) -> None:
        super().__init__()
        self.images = images.rstrip("/")
        self.evaluator, self.geneval = evaluator, evaluator.judges.geneval
        evaluator.judges.refuse_unknown({"evaluator.independent_judges": evaluator.independent_judges})
        further = evaluator.judges.keys_of(evaluator.independent_judges)
        self.judged_by = {**self.geneval.judged_by, "independent_judges": further}
        self.folders = scan(images, self.geneval.detector.class_names)
        if evaluator.fid is not None and sum(len(folder.files) for folder in self.folders) < 2:
            raise ValueError("fid: a distance needs at least two images")
        self.store = ScoreStore(results, {**self.geneval.verdict_key(), "independent_judges": further}, __name__)
        made_with = Path(images) / "provenance.json"
        found = read_json(made_with) if made_with.is_file() else None
        self.made_with = found if isinstance(found, dict) else None  # another tool may call its own file so
        self.folder = Path(folder)
        self.batch_size, self.num_workers = batch_size, num_workers

    def run(self, trainer: Trainer) -> None:
        """Judge what has no result yet, then write the report."""
        size = self.geneval.detector.image_size
        data = ImageFolderDataModule(self.folders, size, self.store, self.batch_size, self.num_workers)
        kept = sum(self.store.load(folder) is not None for folder in self.folders)
        if trainer.is_global_zero and kept:
            print(f"{kept} of {len(self.folders)} prompts were judged before and have not changed: {self.store.folder}")
        if kept < len(self.folders):
            self.store.open()
        trainer.predict(self, data, return_predictions=False)
        trainer.strategy.barrier("scored")
        distance = self._distance(trainer)
        if trainer.is_global_zero:
            self._report(trainer, distance)

    def setup(self, stage: str) -> None:
        self.geneval.prepare(self.trainer.strategy.root_device)

    @torch.no_grad()
    def predict_step(self, batch: list[Images], batch_idx: int) -> int:
        """Judge the images of some prompts and keep the results; returns how many images there were."""
        rows = [images.folder.metadata for images in batch for _ in images.files]
        names = [images.folder.name(file) for images in batch for file in images.files]
        pixels = [image for images in batch for image in images.pixels]
        verdicts = self.geneval.verdicts(rows, pixels, names) if pixels else []
        scores = {name: self._scores(name, rows, pixels) for name in self.evaluator.independent_judges}
        judged = []
        for k, (name, row, image, verdict) in enumerate(zip(names, rows, pixels, verdicts, strict=True)):
            further = {judge: values[k] for judge, values in scores.items()}
            judged.append({"row": result_row(name, row, verdict) | further, "size": list(image.shape[1::-1])})
        for images in batch:
            own, judged = judged[: len(images.files)], judged[len(images.files) :]
            self.store.save(images.folder, {"judged": own, "warnings": images.notes, "left_out": images.left_out})
        return len(names)

    def _scores(self, name: str, rows: Sequence[Mapping[str, Any]], pixels: Sequence[np.ndarray]) -> list[float]:
        """Return what a further judge says of images, uint8 [H, W, 3]; those of one size are judged together."""
        judge, scores = self.evaluator.judges[name], [0.0] * len(pixels)
        for indices in by_size(pixels):
            images = torch.from_numpy(np.stack([pixels[k] for k in indices])).to(self.device).permute(0, 3, 1, 2)
            values = judge.of_finished([rows[k] for k in indices], None, (images.float() / 255).clone)
            for k, value in zip(indices, values.tolist(), strict=True):
                scores[k] = value
        return scores

    def _distance(self, trainer: Trainer) -> dict[str, float]:
        """Measure the FID, if wanted, which is of all images and so not kept prompt by prompt."""
        rank, world_size, fid = trainer.global_rank, trainer.world_size, self.evaluator.fid
        if fid is None:
            return {}
        fid.start(trainer.strategy.root_device, rank, world_size)
        for folder in tqdm(self.folders[rank::world_size], desc="FID", unit="prompt", disable=rank > 0):
            pixels = read(folder, self.geneval.detector.image_size).pixels
            for indices in by_size(pixels):
                fid.update(np.stack([pixels[k] for k in indices]))
        return {"fid": fid.compute()}

    def _report(self, trainer: Trainer, distance: Mapping[str, float]) -> None:
        results = []
        for folder in self.folders:
            if (kept := self.store.load(folder)) is None:
                raise ValueError(f"images: {folder.path} has changed while it was scored")
            results.append(kept)
        rows = [image["row"] for each in results for image in each["judged"]]
        left_out = [f"{name} has no name like 00000" for name in unnumbered(self.images)]
        left_out += [sentence for each in results for sentence in each["left_out"]]
        if not rows:
            raise ValueError(f"images: none of the images of {self.images} can be judged; {left_out[0]}")
        summary = summarize(rows)
        result = self._result(rows, summary, distance)
        warnings = self._warnings(results, summary)
        self._write(result, summary, {"left_out": left_out, "warnings": warnings})
        low, high = result.interval()
        further = [f"{name}: {value:.3f}" for name, value in result.independent.items()]
        print(*(f"Left out: {sentence}" for sentence in left_out), *warnings, summary, sep="\n", end="")
        print(f"95 % interval: {low:.3f}-{high:.3f}", *further, sep="\n")
        scores = {**result.tasks, "overall": result.overall, **result.independent}
        for logger in trainer.loggers:
            logger.log_metrics({f"score/{name}": value for name, value in scores.items()})
            logger.save()  # here no training does it

    def _result(self, rows: list[dict[str, Any]], summary: Summary, distance: Mapping[str, float]) -> StrategyResult:
        means = {name: float(np.mean([row[name] for row in rows])) for name in self.evaluator.independent_judges}
        return StrategyResult(
            name=Path(self.images).resolve().name,  # of `.` as well
            overall=summary.overall,
            tasks={task: score.score for task, score in summary.tasks.items()},
            rows=rows,
            thumbnails=self._thumbnails(),
            decoder_passes=0,
            verifier_calls=0,
            seconds=0,
            objects=float(np.mean([sum(map(len, json.loads(row["details"]).values())) for row in rows])),
            independent={**means, **distance},
        )

    def _write(self, result: StrategyResult, summary: Summary, said: Mapping[str, Any]) -> None:
        about = {"images": self.images, "judged_by": self.judged_by, "made_with": self.made_with}
        report = {
            "benchmark": "GenEval",
            **about,
            "overall": result.overall,
            "interval_95": list(result.interval()),
            **vars(summary),
            "tasks": {task: vars(score) | {"score": score.score} for task, score in summary.tasks.items()},
            "objects_per_image": result.objects,
            "independent": result.independent,
            **said,
        }
        lines = [result_line(row | {"filename": f"{self.images}/{row['filename']}"}) for row in result.rows]
        write_text(self.folder / "results.jsonl", "\n".join(lines) + "\n")
        write_report_json(self.folder / "geneval.json", report)
        if result.thumbnails:
            save_image(contact_sheet(result, self.images), self.folder / "sheet.png")

    def _warnings(self, results: Sequence[Mapping[str, Any]], summary: Summary) -> list[str]:
        """Say what keeps the score from being comparable: what is missing, repeated, or not as the others are."""
        prompts = [folder.metadata for folder in self.folders]
        found, wanted = repeated(prompts), Counter(len(folder.files) for folder in self.folders).most_common(1)[0][0]
        if tuple(self.geneval.detector.class_names) == CLASS_NAMES:
            found, wanted = unofficial(prompts), OFFICIAL_IMAGES
        promised = (self.made_with or {}).get("prompt_count")
        if isinstance(promised, int) and len(prompts) < promised:
            found.append(f"{len(prompts)} of {promised} prompts have images: they were not made to the end")
        first, last = (self.folders[i].path.name for i in (0, -1))
        if gaps := sorted({*range(int(first), int(last))} - {int(folder.path.name) for folder in self.folders}):
            found.append(f"from {first} to {last} the folders of {len(gaps)} numbers are missing, {gaps[0]:05d} first")
        for folder, result in zip(self.folders, results, strict=True):
            if (count := len(result["judged"])) != wanted:
                found.append(f"{folder.path.name} has {count} images instead of {wanted}")
        if absent := [task for task in TASKS if task not in summary.tasks]:
            found.append(f"no image of {', '.join(absent)} was judged: the overall score leaves that out")
        sizes = {image["row"]["filename"]: tuple(image["size"]) for result in results for image in result["judged"]}
        common = Counter(sizes.values()).most_common(1)[0][0]
        for name, (w, h) in sizes.items():
            if (w, h) != common:
                found.append(f"{name} has {w}x{h} pixels, where most have {common[0]}x{common[1]}")
        return found + [sentence for result in results for sentence in result["warnings"]]

    def _thumbnails(self) -> dict[int, np.ndarray]:
        """Read the first images of the prompts on the contact sheet."""
        indices = sorted(pick_prompt_indices(len(self.folders), self.evaluator.sheet_prompts))
        images = [read(self.folders[i], self.geneval.detector.image_size) for i in indices]
        return {int(each.folder.path.name): each.pixels[0] for each in images if each.pixels}
