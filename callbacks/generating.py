"""Generating: a folder of images in GenEval's layout, by any decoder and strategy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from PIL import Image

from callbacks.report import save_image
from datamodules.geneval import PromptsDataModule, sample_path
from datamodules.rollouts import RolloutSpec, open_folder, provenance
from lightning_modules.backbone.sampling import image_seed
from lightning_modules.decoding.strategy import Judges, Strategy
from lightning_modules.files import refuse_unwritable, write_text
from lightning_modules.rewards.geneval_reward import GenEvalReward, to_uint8
from lightning_modules.rewards.verifier import Reward


class Generating(LightningModule):
    """Decodes the images that are not there yet; each is the one that evaluation with the same seed would judge.

    It is a LightningModule so that the Trainer brings device, ranks and progress.

    Args:
        module: has the `decoder` and its `judges`.
        strategies: by name.
        strategy: the name of the one that decodes.
        reward: GenEval's, for strategies that choose by it; None needs no detector.
        rewards: further judges of finished images, by name.
        prompts: GenEval metadata.
        images_per_prompt: samples of each.
        seed: of all images.
        images: the folder. One that was made with other things, or by others, is refused.
        batch_size: images decoded at a time, per rank.
    """

    def __init__(
        self,
        module: Any,
        strategies: Mapping[str, Strategy],
        strategy: str,
        reward: GenEvalReward | None,
        rewards: Mapping[str, Reward],
        prompts: Sequence[dict[str, Any]],
        images_per_prompt: int,
        seed: int,
        images: str,
        batch_size: int,
    ) -> None:
        super().__init__()
        if strategy not in strategies:
            raise ValueError(f"generating.strategy is {strategy!r}; there are: {', '.join(strategies)}")
        self.module = module
        self.strategy = strategies[strategy]
        self.reward, self.rewards = reward, dict(rewards)
        self.data = PromptsDataModule(prompts, images_per_prompt, images, batch_size)
        self.seed = seed
        self.folder = Path(images)
        self.module.decoder.check_prompts([row["prompt"] for row in prompts])

    @property
    def judges(self) -> Judges:
        """What strategies can name."""
        truth = self.reward.kinds() if self.reward else {}
        return {**self.module.judges, **truth, **self.rewards}

    def run(self, trainer: Trainer) -> None:
        """Make what is missing."""
        trainer.predict(self, self.data, return_predictions=False)
        trainer.strategy.barrier("generated")
        if trainer.is_global_zero:
            print(f"{len(self.data.prompts) * self.data.images_per_prompt} images in {self.folder}")

    def setup(self, stage: str) -> None:
        """Write what makes the images, or make sure that it has made those that are there."""
        if self.reward:
            self.reward.prepare(self.trainer.strategy.root_device)
        if self.trainer.is_global_zero:
            spec = RolloutSpec(self.data.prompts, self.data.images_per_prompt, self.strategy)
            made_with = provenance(spec, self.module.decoder, self.judges, None, self.seed)
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
        """Where a prompt is written beside its images."""
        return self.folder / Path(sample_path(prompt, 0)).parents[1] / "metadata.jsonl"

    @torch.no_grad()
    def predict_step(self, batch: list[tuple[int, int, dict[str, Any]]], batch_idx: int) -> int:
        """Make and write some images; returns how many."""
        decoder, rows = self.module.decoder, [row for *_, row in batch]
        seeds = [image_seed(self.seed, i, j) for i, j, _ in batch]
        decoded = self.strategy.decode(decoder, self.judges, rows, seeds)
        for (i, j, row), image in zip(batch, to_uint8(decoder.image_tokenizer.decode(decoded.tokens)), strict=True):
            if not (about := self._metadata(i)).is_file():
                write_text(about, json.dumps(row) + "\n")
            save_image(Image.fromarray(image), self.folder / sample_path(i, j))
        return len(batch)
