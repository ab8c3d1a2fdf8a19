"""Preferences from a file: prompts with a chosen and a rejected image, or with the tokens of both."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

from datamodules.data_sets import load_rows, load_split
from datamodules.images import as_pixels
from datamodules.pairs import SIDES, PairsDataModule
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.image_reader import ImageSource, fit_square, hash_image, read_image
from lightning_modules.jsonl import read_jsonl

_LARGEST_WEIGHT = 1e6  # what is larger is a mistake, and overflows sooner or later
_ORDER = {1: 1, 0: -1, 0.5: None}  # step through (`chosen`, `rejected`) that gives the better one first, by the label


@dataclass(frozen=True)
class _Image:
    """An image that has yet to be read, and its name in errors."""

    source: ImageSource
    name: str


_Side = _Image | list[int]


@dataclass(frozen=True)
class _Pair:
    """A row whose form is right; its images have yet to be read. The chosen side comes first."""

    prompt: str
    sides: list[_Side]
    weight: float
    decoder: str | None


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Begin the sentences of errors with the place in the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


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
        """Read rows, each with its place in the file."""
        if self._is_jsonl:
            yield from read_jsonl(self.path)
            return
        rows = load_split(self.path, self.split)
        with _naming(self.path):
            for column in self._named.values():
                if column not in rows.column_names:
                    raise ValueError(f"there is no {column!r}; the columns are: {', '.join(rows.column_names)}")
        used = {*self._named.values(), "weight", "decoder"}
        rows = rows.select_columns([name for name in rows.column_names if name in used])
        # Undecoded, so that a broken image is found here, with its row.
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        for number, row in enumerate(rows):
            yield f"{self.path}, row {number}", row

    def _pairs(self, doing: str) -> Iterator[tuple[str, _Pair | None]]:
        """Read pairs of the right form with their places; None for a tie. The progress bar says what is `doing`."""
        for place, row in tqdm(self._rows(), desc=f"{doing} {self.path}", unit="pair", delay=1):
            with _naming(place):
                pair = self._pair(row)
            yield place, pair

    def _pair(self, row: Any) -> _Pair | None:
        if not isinstance(row, Mapping):
            raise ValueError(f"not an object but {short(row)}")
        for column in self._named.values():
            if row.get(column) is None:
                raise ValueError(f"there is no {column!r}; the row has: {', '.join(row)}")
        sides = [self._side(row, self._named[side]) for side in SIDES]
        prompt, weight = _prompt(row[self._named["prompt"]]), row.get("weight", 1.0)
        if not isinstance(weight, int | float) or not 0 <= weight <= _LARGEST_WEIGHT:
            raise ValueError(f"the weight {short(weight)} is not a number from 0 to {_LARGEST_WEIGHT:,.0f}")
        label_column = self.columns.get("label")
        label = row[label_column] if label_column else 1
        if not isinstance(label, int | float) or label not in _ORDER:
            raise ValueError(f"the label {short(label)} is not 1, 0 or .5")
        order = _ORDER[label]
        return None if order is None else _Pair(prompt, sides[::order], float(weight), row.get("decoder"))

    def _side(self, row: Mapping[str, Any], column: str) -> _Side:
        """Take the image or the tokens of a column."""
        value = row[column]
        if isinstance(value, list):
            for token in value:
                if type(token) is not int:
                    raise ValueError(f"token {short(token)} is not a whole number")
            return value
        is_stored = isinstance(value, Mapping) and value.keys() == {"bytes", "path"}
        if is_stored and value["bytes"] is None:
            value = value["path"]
        if isinstance(value, str):
            return _Image(Path(self.path).parent / value, value)
        if isinstance(value, bytes) or is_stored:
            return _Image(value, f"the image in {column!r}")
        raise ValueError(f"{column!r} holds neither an image nor tokens but {short(value)}")

    def cache_key(self) -> str:
        """Hash all that pairs are made of: prompts, the bytes of images, tokens, weights, and their order.

        Raises:
            ValueError: see `encode`.
        """
        digest = hashlib.sha256()
        for place, pair in self._pairs("Looking for changes in"):
            if pair is not None:
                with _naming(place):
                    sides = [hash_image(s.source, s.name) if isinstance(s, _Image) else s for s in pair.sides]
                digest.update(json.dumps([pair.prompt, *sides, pair.weight, pair.decoder]).encode())
        return digest.hexdigest()[:16]

    def encode(self, decoder: TokenDecoder, batch_size: int) -> Dataset:
        """Check every row and encode its images: `prompt`, `chosen`, `rejected` (tokens) and `weight`.

        Raises:
            ValueError: no rows, or a row with a missing column, a prompt that is no text or has unknown words, an
                unreadable image, tokens that are out of range or too few or many, an unknown label, twice the same
                image, or made for another decoder; it names file and row.
        """
        tokenizer, policy = decoder.image_tokenizer, fingerprint(decoder)
        made: dict[str, list[Any]] = {"prompt": [], "weight": []}
        places: list[str] = []
        tokens: list[list[int]] = []  # chosen and rejected in turn
        pending: list[list[int] | np.ndarray] = []
        ties = 0
        for place, pair in self._pairs("Reading"):
            if pair is None:
                ties += 1
                continue
            with _naming(place):
                if pair.decoder not in (None, policy):
                    raise ValueError("this pair was made for another decoder")
                decoder.check_prompts([pair.prompt])
                pending += [_content(side, tokenizer) for side in pair.sides]
            places.append(place)
            made["prompt"].append(pair.prompt)
            made["weight"].append(pair.weight)
            if len(pending) >= batch_size:
                tokens += _encode(pending, tokenizer)
                pending = []
        tokens += _encode(pending, tokenizer)
        if not places:
            raise ValueError(f"{self.path} has no rows" + (f" but {ties} ties" if ties else ""))
        if ties:
            rank_zero_info(f"{self.path}: {ties} ties are left out, which leaves {len(places)} pairs")
        if not any(made["weight"]):
            raise ValueError(f"{self.path}: all weights are 0, so nothing would be learned")
        for place, chosen, rejected in zip(places, tokens[::2], tokens[1::2], strict=True):
            if chosen == rejected:
                raise ValueError(f"{place}: chosen and rejected are the same image, token by token")
        return Dataset.from_dict({**made, "chosen": tokens[::2], "rejected": tokens[1::2]})


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the prompt is not a text but {short(value)}")
    if not value.strip():
        raise ValueError("the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):  # half a character, which JSON can write
        raise ValueError(f"the prompt {value!r} is not valid Unicode")
    return value


def _content(side: _Side, tokenizer: ImageTokenizer) -> list[int] | np.ndarray:
    """Read an image, uint8 [H, W, 3], or check tokens."""
    if isinstance(side, _Image):
        return fit_square(read_image(side.source, side.name).pixels, tokenizer.image_size)
    if len(side) != tokenizer.num_tokens:
        raise ValueError(f"{len(side)} tokens, where an image has {tokenizer.num_tokens}")
    for token in side:
        if not 0 <= token < tokenizer.codebook_size:
            raise ValueError(f"token {token} is not in 0..{tokenizer.codebook_size - 1}")
    return side


@torch.no_grad()
def _encode(sides: list[list[int] | np.ndarray], tokenizer: ImageTokenizer) -> list[list[int]]:
    """Replace pixels by tokens, all in one batch."""
    images = [side for side in sides if isinstance(side, np.ndarray)]
    device = next(tokenizer.parameters()).device
    encoded = iter(tokenizer.encode(as_pixels(images).to(device)).tolist() if images else ())
    return [next(encoded) if isinstance(side, np.ndarray) else side for side in sides]


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
