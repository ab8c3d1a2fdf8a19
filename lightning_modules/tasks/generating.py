"""Generating: a folder of images in GenEval's layout, by any decoder and strategy."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from PIL import Image

from datamodules.geneval_prompts import sample_path
from datamodules.prompts import PromptsDataModule
from datamodules.rollouts import RolloutSpec, provenance
from lightning_modules.artifacts import open_folder
from lightning_modules.evaluator import Evaluator
from lightning_modules.files import refuse_unwritable, write_text
from lightning_modules.report.pictures import save_image


class Generating(LightningModule):
    """Decodes the images that are not there yet; each is the one that evaluation with the same seed would judge.

    Args:
        module: has the `decoder`.
        evaluator: decodes, with its seed, as many images of each prompt and as many at a time as it says.
        images: the folder. One that was made with other things, or by others, is refused.
    """

    def __init__(
        self, module: Any, evaluator: Evaluator, strategy: str, prompts: Sequence[dict[str, Any]], images: str
    ) -> None:
        super().__init__()
        if strategy not in evaluator.strategies:
            raise ValueError(f"generating.strategy is {strategy!r}; there are: {', '.join(evaluator.strategies)}")
        self.module, self.evaluator = module, evaluator
        self.strategy = evaluator.strategies[strategy]
        evaluator.judges.refuse_unknown({f"strategies.{strategy}": self.strategy.judge_names})
        self.data = PromptsDataModule(prompts, evaluator.images_per_prompt, images, evaluator.batch_size)
        self.folder = Path(images)
        self.module.decoder.check_prompts([row["prompt"] for row in prompts])

    def run(self, trainer: Trainer) -> None:
        """Make what is missing."""
        trainer.predict(self, self.data, return_predictions=False)
        trainer.strategy.barrier("generated")
        if trainer.is_global_zero:
            print(f"{len(self.data.prompts) * self.data.images_per_prompt} images in {self.folder}")

    def setup(self, stage: str) -> None:
        """Write what makes the images, or make sure that it has made those that are there."""
        self.evaluator.judges.prepare(self.trainer.strategy.root_device)
        if self.trainer.is_global_zero:
            spec = RolloutSpec(self.data.prompts, self.data.images_per_prompt, self.strategy)
            made_with = provenance(spec, self.module.decoder, self.evaluator.judges, None, self.evaluator.seed)
            open_folder(self.folder, made_with | {"prompt_count": len(self.data.prompts)})  # scoring looks for as many
            self._refuse_altered()
            if self.data.missing():
                refuse_unwritable(self.folder)
        self.trainer.strategy.barrier("opened")

    def _refuse_altered(self) -> None:
        """Raise ValueError for a prompt or an image in the folder that is not one of this run's."""
        own = {self.folder / sample_path(i, j) for i, j, _ in self.data.jobs()}
        for image in sorted(self.folder.glob("[0-9]*/samples/[0-9]*")):
            if image not in own or not image.is_file():
                raise ValueError(f"{image} was not made here: remove it, or name another folder")
        for i, row in enumerate(self.data.prompts):
            about = self._metadata(i)
            if about.is_file() and about.read_text(encoding="utf-8", errors="replace") != json.dumps(row) + "\n":
                raise ValueError(f"{about} is not the prompt {row['prompt']!r} any more: name another folder")

    def _metadata(self, prompt: int) -> Path:
        return self.folder / Path(sample_path(prompt, 0)).parents[1] / "metadata.jsonl"

    @torch.no_grad()
    def predict_step(self, batch: list[tuple[int, int, dict[str, Any]]], batch_idx: int) -> int:
        """Make and write some images; returns how many."""
        jobs, judges = [(i, j) for i, j, _ in batch], self.evaluator.judges
        _, images = self.evaluator.decode(self.module.decoder, self.strategy, judges, self.data.prompts, jobs)
        for (i, j, row), image in zip(batch, images, strict=True):
            if not (about := self._metadata(i)).is_file():
                write_text(about, json.dumps(row) + "\n")
            save_image(Image.fromarray(image), self.folder / sample_path(i, j))
        return len(batch)
