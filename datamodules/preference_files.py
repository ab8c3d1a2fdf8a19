"""Preferences from a file: prompts with a chosen and a rejected image, or with the tokens of both."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from datamodules.data_sets import load_split
from datamodules.pairs import SIDES, PairsDataModule
from datamodules.stored import load_rows
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.image_reader import ImageSource, UnreadableImage, fit_square, hash_image, read_image
from lightning_modules.jsonl import read_jsonl

_LARGEST_WEIGHT = 1e6  # what is larger is a mistake, and overflows sooner or later
_FIRST_IS_CHOSEN = {1: True, 0: False, 0.5: None}  # by the label


@dataclass(frozen=True)
class _Image:
    """An image that has yet to be read, and what sentences call it."""

    source: ImageSource
    name: str


@dataclass(frozen=True)
class _Pair:
    """A row whose form is right; what it holds has yet to be looked at. `place` is where it stands."""

    place: str
    prompt: str
    chosen: _Image | list[int]
    rejected: _Image | list[int]
    weight: float
    decoder: str | None


@dataclass(frozen=True)
class PreferenceFile:
    """A JSONL file, a folder written by `datasets`, or a data set on the Hugging Face hub.

    Images are paths (relative to the JSONL file), image columns of `datasets`, or columns of encoded images (`binary`);
    where a value is a list of numbers instead, these are image tokens. A column `weight` says how much each pair
    counts; without it all count alike.

    Attributes:
        path: of the file or folder, or name on the hub.
        split: of a data set with several.
        columns: names of the columns for `prompt`, `chosen` and `rejected`. One for `label`, if it is named, says which
            image is chosen: 1 the one of the column `chosen`, 0 that of `rejected`, .5 neither (a tie, left out).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a column is not named, or the file is not JSONL.
    """

    path: str
    split: str
    columns: Mapping[str, str | None]

    def __post_init__(self) -> None:
        needed = ("prompt", *SIDES)
        for name in needed:
            if not self.columns.get(name):
                raise ValueError(f"data.columns must name the column for {name!r}")
        if unknown := set(self.columns) - {*needed, "label"}:
            raise ValueError(f"data.columns: {min(unknown)!r} is none of {', '.join(needed)}, label")
        path = Path(self.path)
        on_hub = not self._is_jsonl and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.path)
        if not on_hub and not path.exists():
            raise FileNotFoundError(f"there is no preference file or folder {self.path}")
        if path.is_file() and not self._is_jsonl:
            raise ValueError(f"{self.path} is no .jsonl file; preferences are one JSON object a line, or a data set")

    @property
    def _is_jsonl(self) -> bool:
        return self.path.endswith(".jsonl")

    @property
    def _named(self) -> dict[str, str]:
        """Columns that rows must have, by what they hold."""
        return {name: column for name, column in self.columns.items() if column is not None}

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Rows with the place where they stand, for sentences about them."""
        if self._is_jsonl:
            yield from read_jsonl(self.path)
            return
        rows = load_split(self.path, self.split)
        for column in self._named.values():
            if column not in rows.column_names:
                raise ValueError(
                    f"{self.path}: there is no {column!r}; the columns are: {', '.join(rows.column_names)}"
                )
        used = {*self._named.values(), "weight", "decoder"}
        rows = rows.select_columns([name for name in rows.column_names if name in used])
        # Undecoded, so that a broken image is found here, with its row.
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        for number, row in enumerate(rows):
            yield f"{self.path}, row {number}", row

    def _pairs(self, doing: str) -> Iterator[_Pair | None]:
        """Rows of the right form; None for a tie. Says how far it is with what it is `doing`."""
        for place, row in tqdm(self._rows(), desc=f"{doing} {self.path}", unit="pair", delay=1):
            if not isinstance(row, Mapping):
                raise ValueError(f"{place}: not an object but {short(row)}")
            for column in self._named.values():
                if row.get(column) is None:
                    raise ValueError(f"{place}: there is no {column!r}; the row has: {', '.join(row)}")
            first, second = (self._image(place, row, self._named[side]) for side in SIDES)
            prompt, decoder = self._prompt(place, row[self._named["prompt"]]), row.get("decoder")
            weight, in_order = self._weight(place, row.get("weight", 1.0)), self._in_order(place, row)
            if in_order is None:
                yield None
            else:
                chosen, rejected = (first, second) if in_order else (second, first)
                yield _Pair(place, prompt, chosen, rejected, weight, decoder)

    def cache_key(self) -> str:
        """A hash of all that pairs are made of: prompts, the bytes of images, tokens, weights, and their order.

        Raises:
            ValueError: see `encode`.
        """
        digest = hashlib.sha256()
        for pair in self._pairs("Looking for changes in"):
            if pair is not None:
                sides = [self._key(pair.place, side) for side in (pair.chosen, pair.rejected)]
                digest.update(json.dumps([pair.prompt, *sides, pair.weight, pair.decoder]).encode())
        return digest.hexdigest()[:16]

    def _key(self, place: str, side: _Image | list[int]) -> str | list[int]:
        if isinstance(side, list):
            return side
        try:
            return hash_image(side.source, side.name)
        except UnreadableImage as error:
            raise ValueError(f"{place}: {error}") from None

    def encode(self, decoder: TokenDecoder, batch_size: int) -> Dataset:
        """Check every row and encode its images: `prompt`, `chosen`, `rejected` (tokens) and `weight`.

        Raises:
            ValueError: no rows, or a row with a missing column, a prompt that is no text or has unknown words, an
                unreadable image, tokens that are out of range or too few or many, an unknown label, twice the same
                image, or made for another decoder; it names file and row.
        """
        tokenizer = decoder.image_tokenizer
        made: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": [], "weight": []}
        policy = fingerprint(decoder)
        places: list[str] = []
        pending: list[list[int] | np.ndarray] = []
        ties = 0
        for pair in self._pairs("Reading"):
            if pair is None:
                ties += 1
                continue
            if pair.decoder not in (None, policy):
                raise ValueError(f"{pair.place}: this pair was made for another decoder")
            try:
                decoder.check_prompts([pair.prompt])
            except ValueError as error:
                raise ValueError(f"{pair.place}: {error}") from None
            made["prompt"].append(pair.prompt)
            made["weight"].append(pair.weight)
            places.append(pair.place)
            pending += [self._side(pair.place, side, tokenizer) for side in (pair.chosen, pair.rejected)]
            if len(pending) >= batch_size:
                self._flush(pending, made, tokenizer)
        if not places:
            raise ValueError(f"{self.path} has no rows" + (f" but {ties} ties" if ties else ""))
        if ties:
            rank_zero_info(f"{self.path}: {ties} ties are left out, which leaves {len(places)} pairs")
        if not any(made["weight"]):
            raise ValueError(f"{self.path}: all weights are 0, so nothing would be learned")
        self._flush(pending, made, tokenizer)
        for place, chosen, rejected in zip(places, made["chosen"], made["rejected"], strict=True):
            if chosen == rejected:
                raise ValueError(f"{place}: chosen and rejected are the same image, token by token")
        return Dataset.from_dict(made)

    def _prompt(self, place: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{place}: the prompt is not a text but {short(value)}")
        if not value.strip():
            raise ValueError(f"{place}: the prompt is empty")
        if any("\ud800" <= character <= "\udfff" for character in value):  # half a character, which JSON can write
            raise ValueError(f"{place}: the prompt {value!r} is not valid Unicode")
        return value

    def _in_order(self, place: str, row: Mapping[str, Any]) -> bool | None:
        """Whether the image of the column `chosen` is the chosen one; None in a tie."""
        if (column := self.columns.get("label")) is None:
            return True
        label = row[column]
        if not isinstance(label, int | float) or label not in _FIRST_IS_CHOSEN:
            raise ValueError(f"{place}: the label {short(label)} is not 1, 0 or .5")
        return _FIRST_IS_CHOSEN[label]

    def _image(self, place: str, row: Mapping[str, Any], column: str) -> _Image | list[int]:
        value = row[column]
        if isinstance(value, list):
            for token in value:
                if type(token) is not int:
                    raise ValueError(f"{place}: token {short(token)} is not a whole number")
            return value
        if isinstance(value, Mapping) and value.keys() == {"bytes", "path"} and value["bytes"] is None:
            value = value["path"]
        if isinstance(value, str):
            return _Image(Path(self.path).parent / value, value)
        if isinstance(value, bytes) or (isinstance(value, Mapping) and value.keys() == {"bytes", "path"}):
            return _Image(value, f"the image in {column!r}")
        raise ValueError(f"{place}: {column!r} holds neither an image nor tokens but {short(value)}")

    def _weight(self, place: str, value: Any) -> float:
        if not isinstance(value, int | float) or not 0 <= value <= _LARGEST_WEIGHT:
            raise ValueError(f"{place}: the weight {short(value)} is not a number from 0 to {_LARGEST_WEIGHT:,.0f}")
        return float(value)

    def _side(self, place: str, side: _Image | list[int], tokenizer: ImageTokenizer) -> list[int] | np.ndarray:
        """Tokens as they are, or pixels, uint8 [H, W, 3]."""
        if isinstance(side, _Image):
            try:
                return fit_square(read_image(side.source, side.name).pixels, tokenizer.image_size)
            except UnreadableImage as error:
                raise ValueError(f"{place}: {error}") from None
        if len(side) != tokenizer.num_tokens:
            raise ValueError(f"{place}: {len(side)} tokens, where an image has {tokenizer.num_tokens}")
        for token in side:
            if not 0 <= token < tokenizer.codebook_size:
                raise ValueError(f"{place}: token {token} is not in 0..{tokenizer.codebook_size - 1}")
        return side

    @torch.no_grad()
    def _flush(
        self, pending: list[list[int] | np.ndarray], made: dict[str, list[Any]], tokenizer: ImageTokenizer
    ) -> None:
        """Encode what is pending in one batch, chosen and rejected in turn."""
        images = [item for item in pending if isinstance(item, np.ndarray)]
        encoded: Iterator[list[int]] = iter(())
        if images:
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
            device = next(tokenizer.parameters()).device
            encoded = iter(tokenizer.encode(pixels.to(device)).tolist())
        tokens = [next(encoded) if isinstance(item, np.ndarray) else item for item in pending]
        made["chosen"] += tokens[::2]
        made["rejected"] += tokens[1::2]
        pending.clear()


class PreferenceFilesDataModule(PairsDataModule):
    """Pairs from files; the reference is the decoder as it is before training.

    Args:
        train, validation: where they are; images are encoded once.
        folder, collect_batch_size, batch_size: see `StoredDataModule`.
    """

    def __init__(
        self, train: PreferenceFile, validation: PreferenceFile, folder: str, collect_batch_size: int, batch_size: int
    ) -> None:
        super().__init__(folder, batch_size, collect_batch_size)
        self.files = {"train": train, "validation": validation}
        self._made: dict[str, Dataset] = {}

    def setup(self, stage: str) -> None:
        """Read, check, encode and score everything before training starts."""
        decoder: Any = self.trainer.lightning_module.decoder
        for name, source in self.files.items():
            if name in self._made:
                continue
            key = source.cache_key() if self.trainer.is_global_zero else ""
            made_with = {"file": self.trainer.strategy.broadcast(key), "decoder": decoder.cache_key()}
            self._made[name] = load_rows(self._stored(f"{name}-pairs", made_with, partial(self._read, source, decoder)))

    def _read(self, source: PreferenceFile, decoder: TokenDecoder) -> Dataset:
        decoder.to(self.trainer.strategy.root_device)  # where Lightning puts it later anyway
        return self._with_reference(source.encode(decoder, self.collect_batch_size), decoder)

    def _pairs(self, name: str) -> Dataset:
        return self._made[name]
