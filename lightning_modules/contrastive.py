"""ContrastiveModule: trains an open_clip model on images, and patches of them, with captions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from lightning_modules.optim import OptimizerFactory, TrainedModule
from lightning_modules.rewards.clip_score import TextTokenizer, cells, image_features


class ContrastiveModule(TrainedModule):
    """CLIP's loss (arXiv 2103.00020) on whole images and a patch of each, with a minimally altered caption beside.

    A patch goes with its image's caption: what is learned is log p(caption | patch) / p(caption), which is what
    reflection asks of a patch. Background, which says nothing, comes out in the middle, what is denied below it.

    Batches have `image` [B, 3, H, W] in [0, 1], `prompt` (2B strings, a true and an altered caption of each image) and
    `correct` [2B]. A patch is a cell of an M x M grid, M drawn from `grids`; for the rest see `TrainedModule`.
    """

    exported_parts = ("clip",)

    def __init__(
        self, clip: Module, tokenizer: TextTokenizer, optimizer: OptimizerFactory, warmup_steps: int, grids: list[int]
    ) -> None:
        super().__init__(optimizer, warmup_steps)
        self.clip, self.tokenizer, self.grids = clip, tokenizer, grids
        size: Any = clip.visual.image_size  # type: ignore[union-attr]
        side = size if isinstance(size, int) else size[0]  # of a ResNet a number, of others height and width
        if wrong := [grid for grid in grids if grid < 1 or side % grid]:
            raise ValueError(f"module.grids: images of {side} pixels cannot be cut into {wrong[0]}x{wrong[0]} patches")

    def _similarities(self, batch: dict[str, Any], views: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines of V views with the batch's distinct captions [V, U], and the column of each caption [2B]."""
        texts = list(dict.fromkeys(batch["prompt"]))
        columns = torch.tensor([texts.index(prompt) for prompt in batch["prompt"]], device=views.device)
        features = self.clip.encode_text(self.tokenizer(texts).to(views.device), normalize=True)  # type: ignore[operator]
        scale = self.clip.logit_scale.exp().clamp(max=100)  # type: ignore[operator]
        return scale * image_features(self.clip, views) @ features.T, columns

    def _views(self, images: Tensor) -> Tensor:
        """The images and a patch of each, a random cell at the images' size, [2B, 3, H, W]."""
        grid = self.grids[int(torch.randint(len(self.grids), ()))]
        cut = cells(images, grid)
        drawn = cut[torch.arange(len(cut)), torch.randint(grid**2, (len(cut),))]
        patches = F.interpolate(drawn, images.shape[-2:], mode="bicubic", antialias=True)
        return torch.cat([images, patches.clamp(0, 1)])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits, columns = self._similarities(batch, self._views(batch["image"]))
        own = columns[::2]
        known_true = batch["correct"][1::2].bool()  # altered captions that hold all the same are no negatives
        banned = torch.zeros_like(logits, dtype=torch.bool)
        for part in banned.chunk(2):
            part[known_true.nonzero().squeeze(1), columns[1::2][known_true]] = True
        logits = logits.float().masked_fill(banned, -torch.inf)
        losses = {}
        for name, part in zip(("image", "patch"), logits.chunk(2), strict=True):
            to_text = F.cross_entropy(part, own)
            to_image = -part.log_softmax(0)[torch.arange(len(own)), own].mean()
            losses[f"train/{name}_loss"] = (to_text + to_image) / 2
        self.log_dict(losses, prog_bar=True)
        return torch.stack(list(losses.values())).sum()

    def measure(self, batch: dict[str, Any], stage: str) -> None:
        """Shares: true above altered caption (image; mean of patches), the image's caption above all of the batch."""
        images = batch["image"]
        altered_false = ~batch["correct"][1::2].bool()
        logits, columns = self._similarities(batch, images)
        rows, true, altered = torch.arange(len(images), device=images.device), columns[::2], columns[1::2]
        scores = {"accuracy": logits}
        for grid in self.grids:
            patches, _ = self._similarities(batch, cells(images, grid).flatten(0, 1))
            scores[f"accuracy_{grid}x{grid}"] = patches.view(len(images), grid**2, -1).mean(1)
        metrics = {f"{stage}/retrieval": (logits.argmax(1) == true).float().mean()}
        for name, score in scores.items():
            right = (score[rows, true] > score[rows, altered])[altered_false]
            metrics[f"{stage}/{name}"] = right.float().mean()
        self.log_dict(metrics, prog_bar=True, sync_dist=True, batch_size=len(images))
