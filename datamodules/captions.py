"""Images with true and altered captions, for PARM's start: rendered ones, and ones that the decoder painted over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.images import as_pixels
from datamodules.shapes.caption_pairs import CaptionPair, labels
from datamodules.streams import Stream, StreamDataModule
from lightning_modules.backbone.decoder import Request, TokenDecoder
from lightning_modules.backbone.sampling import image_seed, uniform_noise
from lightning_modules.decoding.strategy import Strategy
from lightning_modules.rewards.geneval_reward import GenEvalReward, to_uint8
from lightning_modules.rewards.geneval_rules import Verdict


@dataclass(frozen=True)
class Repaint:
    """Decodes a part of each image again, which tears shapes as in the decoder's own images, and has it judged anew."""

    strategy: Strategy  # decodes what is not kept, with the first caption as its prompt
    reward: GenEvalReward  # its detector says what can be seen then
    shares: tuple[float, float]  # least and greatest fraction of the tokens decoded again; uniform in between
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.shares[0] <= self.shares[1] <= 1:
            raise ValueError(f"repaint.shares must rise within 0 to 1, not {list(self.shares)}")

    @torch.no_grad()
    def __call__(self, decoder: TokenDecoder, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of `CaptionsDataModule` with `tokens` instead of `image`, and their labels."""
        tokenizer = decoder.eval().image_tokenizer
        tokens = tokenizer.encode(batch["image"])
        copies = len(batch["prompt"]) // len(tokens)
        seeds = [image_seed(self.seed, index) for index in batch["group"][::copies].tolist()]
        noise = uniform_noise(seeds, 0, 1 + decoder.num_tokens)[:, 0].to(tokens.device)
        low, high = self.shares
        fixed = noise[:, 1:] >= low + (high - low) * noise[:, :1]
        rows = batch["metadata"]
        tokens = self.strategy.decode(decoder, {}, Request(rows[::copies], seeds, tokens, fixed)).tokens
        found = self.reward.detect(to_uint8(tokenizer.decode(tokens)))
        read = [labels(found[i // copies], row, decoder.max_words, tokenizer.grid) for i, row in enumerate(rows)]
        seen = _columns([verdict for verdict, _ in read], [grounding for _, grounding in read])
        kept = {name: batch[name] for name in ("prompt", "first_unverified", "group")}
        return kept | {"tokens": tokens} | {name: column.to(tokens.device) for name, column in seen.items()}


def _columns(verdicts: list[Verdict], grounding: list[np.ndarray]) -> dict[str, Tensor]:
    """Labels as `PARMModule` wants them."""
    return {
        "correct": torch.tensor([float(verdict.correct) for verdict in verdicts]),
        "clauses": torch.tensor([verdict.clauses for verdict in verdicts]),
        "grounding": torch.from_numpy(np.stack(grounding)),
    }


class CaptionsDataModule(StreamDataModule[CaptionPair]):
    """Batches of B images with two captions each, side by side; see `PARMModule` for the fields.

    Args:
        train, validation, train_images, validation_images, batch_size, num_workers: see `StreamDataModule`.
        repaint: changes the images of training batches; None leaves them as rendered.
    """

    def __init__(
        self,
        train: Stream[CaptionPair],
        validation: Stream[CaptionPair],
        train_images: int,
        validation_images: int,
        batch_size: int,
        num_workers: int,
        repaint: Repaint | None = None,
    ) -> None:
        super().__init__(train, validation, train_images, validation_images, batch_size, num_workers)
        self.repaint = repaint

    @staticmethod
    def collate(samples: list[tuple[int, CaptionPair]]) -> dict[str, Any]:
        pairs = [pair for _, pair in samples]
        captions = [caption for pair in pairs for caption in pair.captions]
        group = torch.tensor([index for index, _ in samples]).repeat_interleave(2)
        verdicts = [verdict for pair in pairs for verdict in pair.verdicts]
        return {
            "image": as_pixels([pair.image for pair in pairs]),
            "prompt": [caption["prompt"] for caption in captions],
            "metadata": captions,
            **_columns(verdicts, [found for pair in pairs for found in pair.grounding]),
            "first_unverified": torch.zeros_like(group),
            "group": group,
        }

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if self.repaint is None or not self.trainer.training:
            return batch
        module: Any = self.trainer.lightning_module
        return self.repaint(module.decoder, batch)
