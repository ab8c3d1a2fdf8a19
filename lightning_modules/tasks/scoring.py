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
from datamodules.image_folder import ImageFolderDataModule, Images, PromptFolder, ScoreStore, read, scan, unnumbered
from lightning_modules.broken_files import read_json
from lightning_modules.evaluator import Evaluator
from lightning_modules.files import write_text
from lightning_modules.report.pictures import pick_prompt_indices, save_image
from lightning_modules.report.results import StrategyResult, result_line, result_row
from lightning_modules.report.sheets import contact_sheet
from lightning_modules.report.tables import print_table
from lightning_modules.rewards.fid import FID
from lightning_modules.rewards.geneval_metric import Summary, summarize
from lightning_modules.rewards.geneval_reward import by_size
from lightning_modules.rewards.geneval_rules import CLASS_NAMES, TASKS


class Scoring(LightningModule):
    """Judges the images of a folder in GenEval's layout, and writes results.jsonl, geneval.json and a contact sheet.

    It is a LightningModule so that the Trainer brings device, ranks and progress. Prompts are split over ranks, the
    result of each is kept in a file of its own, and what has one is not judged again.

    Args:
        images: the folder.
        evaluator: judges the images. Each of its `independent_judges` becomes a column of results.jsonl and a mean in
            geneval.json, and its `fid` of all images a number there.
        results: where results of single prompts are kept.
        folder: where the report goes.
        batch_size: prompts a batch, per rank.
        num_workers: processes that read images.

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
        fid = self.evaluator.fid
        distance = {"fid": self._distance(fid, trainer)} if fid is not None else {}
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
        judged = [
            {
                "row": result_row(name, row, verdict) | {judge: values[k] for judge, values in scores.items()},
                "size": list(image.shape[1::-1]),
            }
            for k, (name, row, image, verdict) in enumerate(zip(names, rows, pixels, verdicts, strict=True))
        ]
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

    def _distance(self, fid: FID, trainer: Trainer) -> float:
        """FID of all images. It is of the whole set, so it is not kept prompt by prompt; it takes one pass."""
        rank, world_size = trainer.global_rank, trainer.world_size
        fid.start(trainer.strategy.root_device, rank, world_size)
        for folder in tqdm(self.folders[rank::world_size], desc="FID", unit="prompt", disable=rank > 0):
            pixels = read(folder, self.geneval.detector.image_size).pixels
            for indices in by_size(pixels):
                fid.update(np.stack([pixels[k] for k in indices]))
        return fid.compute()

    def _report(self, trainer: Trainer, distance: Mapping[str, float]) -> None:
        results = [self._load(folder) for folder in self.folders]
        judged = [image for result in results for image in result["judged"]]
        left_out = [f"{name} has no name like 00000" for name in unnumbered(self.images)]
        left_out += [sentence for result in results for sentence in result["left_out"]]
        if not judged:
            raise ValueError(f"images: none of the images of {self.images} can be judged; {left_out[0]}")
        summary = summarize([image["row"] for image in judged])
        result = self._result([image["row"] for image in judged], summary, distance)
        warnings = [*self._incomplete(results), *_absent(summary), *_sizes(judged)]
        warnings += [sentence for each in results for sentence in each["warnings"]]
        self._write(result, summary, {"left_out": left_out, "warnings": warnings})
        for sentence in [*(f"Left out: {sentence}" for sentence in left_out), *warnings]:
            print(sentence)
        print(summary)
        print_table({result.name: result})
        scores = {**result.tasks, "overall": result.overall, **result.independent}
        for logger in trainer.loggers:
            logger.log_metrics({f"score/{name}": value for name, value in scores.items()})

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
        report = {
            "benchmark": "GenEval",
            "images": self.images,
            "judged_by": self.judged_by,
            "made_with": self.made_with,
            "overall": result.overall,
            "interval_95": list(result.interval()),
            "tasks": {task: vars(score) | {"score": score.score} for task, score in summary.tasks.items()},
            "total_images": summary.total_images,
            "total_prompts": summary.total_prompts,
            "correct_images": summary.correct_images,
            "correct_prompts": summary.correct_prompts,
            "objects_per_image": result.objects,
            "independent": result.independent,
            **said,
        }
        lines = [result_line(row | {"filename": f"{self.images}/{row['filename']}"}) for row in result.rows]
        write_text(self.folder / "results.jsonl", "\n".join(lines) + "\n")
        write_text(self.folder / "geneval.json", json.dumps(report, indent=2) + "\n")
        if result.thumbnails:
            save_image(contact_sheet(result, self.images), self.folder / "sheet.png")

    def _load(self, folder: PromptFolder) -> dict[str, Any]:
        result = self.store.load(folder)
        if result is None:
            raise ValueError(f"images: {folder.path} has changed while it was scored")
        return result

    def _incomplete(self, results: Sequence[Mapping[str, Any]]) -> list[str]:
        """What keeps the score from being comparable: prompts or images that are missing or repeated, a phrase each."""
        prompts = [folder.metadata for folder in self.folders]
        found = repeated(prompts)
        if tuple(self.geneval.detector.class_names) == CLASS_NAMES:
            found = unofficial(prompts)
            wanted = OFFICIAL_IMAGES
        else:
            wanted = Counter(len(folder.files) for folder in self.folders).most_common(1)[0][0]
        promised = (self.made_with or {}).get("prompt_count")
        if isinstance(promised, int) and len(prompts) < promised:
            found.append(f"{len(prompts)} of {promised} prompts have images: they were not made to the end")
        names = [folder.path.name for folder in self.folders]
        numbers = range(int(names[0]), int(names[-1]))
        if gaps := sorted(set(numbers) - set(map(int, names))):
            found.append(
                f"from {names[0]} to {names[-1]} the folders of {len(gaps)} numbers are missing, {gaps[0]:05d} first"
            )
        return found + [
            f"{folder.path.name} has {len(result['judged'])} images instead of {wanted}"
            for folder, result in zip(self.folders, results, strict=True)
            if len(result["judged"]) != wanted
        ]

    def _thumbnails(self) -> dict[int, np.ndarray]:
        """The first images of some prompts, no larger than a contact sheet has use for."""
        shown = {}
        for index in sorted(pick_prompt_indices(len(self.folders), self.evaluator.sheet_prompts)):
            images = read(self.folders[index], self.geneval.detector.image_size)
            if images.pixels:
                shown[int(self.folders[index].path.name)] = images.pixels[0]
        return shown


def _absent(summary: Summary) -> list[str]:
    """A sentence if the overall score is not that of all tasks."""
    absent = [task for task in TASKS if task not in summary.tasks]
    return [f"no image of {', '.join(absent)} was judged: the overall score leaves that out"] if absent else []


def _sizes(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each image whose size is not that of most."""
    common = Counter(tuple(image["size"]) for image in judged).most_common(1)[0][0]
    others = [image for image in judged if tuple(image["size"]) != common]
    names = [(image["row"]["filename"], image["size"]) for image in others]
    return [f"{name} has {w}x{h} pixels, where most have {common[0]}x{common[1]}" for name, (w, h) in names]
