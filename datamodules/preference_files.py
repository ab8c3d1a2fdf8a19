"""Preferences from a file: prompts with a chosen and a rejected image, or with the tokens of both."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from datamodules.data_sets import load_rows
from datamodules.images import as_pixels
from datamodules.pairs import PairsDataModule
from datamodules.preference_rows import (
    Pair,
    PreferenceRows,
    Side,
    naming,
    refuse_equal,
    refuse_other_tokens,
    refuse_useless,
)
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.image_reader import fit_square, hash_image, read_image


class PreferenceFile(PreferenceRows):
    """Preferences whose images are read and encoded."""

    def _checked(self, decoder: TokenDecoder, doing: str) -> Iterator[tuple[str, Pair | None]]:
        """Read pairs as `_pairs` does; check all but their images, and at the end whether there is something to learn.

        Raises what `encode` does.
        """
        policy, weights, ties = "", [], 0
        for place, pair in tqdm(self.pairs(), desc=f"{doing} {self.path}", unit="pair", delay=1):
            if pair is None:
                ties += 1
            else:
                with naming(place):
                    policy = policy or (fingerprint(decoder) if pair.decoder else "")
                    if pair.decoder not in (None, policy):
                        raise ValueError("this pair was made for another decoder")
                    decoder.check_prompts([pair.prompt])
                    tokenizer = decoder.image_tokenizer
                    refuse_other_tokens(pair.sides, tokenizer.num_tokens, tokenizer.codebook_size)
                weights.append(pair.weight)
            yield place, pair
        refuse_useless(self.path, weights, ties)

    def check(self, decoder: TokenDecoder) -> str:
        """Check every row but for its images, and hash all that pairs are made of, bytes of images included.

        Returns the hash, in which order counts; raises what `encode` does.
        """
        digest = hashlib.sha256()
        for place, pair in self._checked(decoder, "Looking for changes in"):
            if pair is not None:
                with naming(place):
                    sides = [hash_image(*side) if isinstance(side, tuple) else side for side in pair.sides]
                digest.update(json.dumps([pair.prompt, *sides, pair.weight, pair.decoder]).encode())
        return digest.hexdigest()[:16]

    def encode(self, decoder: TokenDecoder, batch_size: int) -> Dataset:
        """Check every row and encode its images: `prompt`, `chosen`, `rejected` (tokens) and `weight`.

        Raises:
            ValueError: there are no rows, a row is not of the right form, has unknown words, an unreadable image or
                twice the same one, or was made for another decoder; the sentence names file and row.
        """
        tokenizer = decoder.image_tokenizer
        made: list[tuple[str, str, float]] = []  # place, prompt and weight
        tokens: list[list[int]] = []  # chosen and rejected in turn
        pending: list[list[int] | np.ndarray] = []
        ties = 0
        for place, pair in self._checked(decoder, "Reading"):
            if pair is None:
                ties += 1
                continue
            with naming(place):
                pending += [_content(side, tokenizer.image_size) for side in pair.sides]
            made.append((place, pair.prompt, pair.weight))
            if len(pending) >= batch_size:
                tokens += _encode(pending, tokenizer)
                pending = []
        tokens += _encode(pending, tokenizer)
        if ties:
            rank_zero_info(f"{self.path}: {ties} ties are left out, which leaves {len(made)} pairs")
        places, prompts, weights = zip(*made, strict=True)
        columns = {"prompt": prompts, "weight": weights, "chosen": tokens[::2], "rejected": tokens[1::2]}
        for place, *sides in zip(places, columns["chosen"], columns["rejected"], strict=True):
            with naming(place):
                refuse_equal(sides)
        return Dataset.from_dict(columns)


def _content(side: Side, image_size: int) -> list[int] | np.ndarray:
    """Read an image, uint8 [H, W, 3]; tokens stay as they are."""
    return fit_square(read_image(*side).pixels, image_size) if isinstance(side, tuple) else side


@torch.no_grad()
def _encode(sides: list[list[int] | np.ndarray], tokenizer: ImageTokenizer) -> list[list[int]]:
    """Replace pixels by tokens, all in one batch."""
    images = [side for side in sides if isinstance(side, np.ndarray)]
    device = next(tokenizer.parameters()).device
    encoded = iter(tokenizer.encode(as_pixels(images).to(device)).tolist() if images else ())
    return [next(encoded) if isinstance(side, np.ndarray) else side for side in sides]


class PreferenceFilesDataModule(PairsDataModule):
    """Pairs from files, encoded once; the reference is the decoder as it is before training."""

    has_labels = False  # of what GenEval's rules say, which PARM learns from

    def __init__(
        self, train: PreferenceFile, validation: PreferenceFile, folder: str, collect_batch_size: int, batch_size: int
    ) -> None:
        super().__init__(folder, batch_size, collect_batch_size)
        self.files = {"train": train, "validation": validation}
        self._made: dict[str, Dataset] = {}

    def setup(self, stage: str) -> None:
        """Read, check, encode and score everything before training starts; all is checked before anything is moved."""
        if self._made:
            return
        decoder: Any = self.trainer.lightning_module.decoder
        first = self.trainer.is_global_zero
        keys = {name: source.check(decoder) if first else "" for name, source in self.files.items()}
        keys, policy = self.trainer.strategy.broadcast(keys), decoder.cache_key()
        for name, source in self.files.items():
            made_with = {"file": keys[name], "decoder": policy}
            self._made[name] = load_rows(self._stored(f"{name}-pairs", made_with, partial(self._read, source, decoder)))

    def _read(self, source: PreferenceFile, decoder: TokenDecoder) -> Dataset:
        decoder.to(self.trainer.strategy.root_device)  # where Lightning puts it later anyway
        return self._with_reference(source.encode(decoder, self.collect_batch_size), decoder)

    def _pairs(self, name: str) -> Dataset:
        return self._made[name]
