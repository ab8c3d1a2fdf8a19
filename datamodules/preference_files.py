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
from typing import Any, NamedTuple

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
_Side = tuple[ImageSource, str] | list[int]  # an image that has yet to be read and its name in errors, or tokens


class _Pair(NamedTuple):
    """A row of the right form, the chosen side first."""

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
    lists of whole numbers are image tokens. A column `weight` says how much each pair counts, 1 without it.

    `columns` names those for `prompt`, `chosen`, `rejected` and, if there is one, `label`: 1 where the image of the
    column `chosen` is better, 0 where that of `rejected` is, .5 for a tie, which is left out.

    Raises FileNotFoundError if there is no such file or folder, ValueError if a column is not named or a file no JSONL.
    """

    path: str  # of the file or folder, or name on the hub
    split: str  # of a data set with several
    columns: Mapping[str, str | None]

    def __post_init__(self) -> None:
        needed = ("prompt", *SIDES)
        if missing := [name for name in needed if not self.columns.get(name)]:
            raise ValueError(f"data.columns must name the column for {missing[0]!r}")
        if unknown := set(self.columns) - {*needed, "label"}:
            raise ValueError(f"data.columns: {min(unknown)!r} is none of {', '.join(needed)}, label")
        on_hub = not self._is_jsonl and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.path)
        if not on_hub and not Path(self.path).exists():
            raise FileNotFoundError(f"there is no preference file or folder {self.path}")
        if Path(self.path).is_file() and not self._is_jsonl:
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
        for column in self._named.values():
            if column not in rows.column_names:
                columns = ", ".join(rows.column_names)
                raise ValueError(f"{self.path}: there is no {column!r}; the columns are: {columns}")
        used = {*self._named.values(), "weight", "decoder"}
        rows = rows.select_columns([name for name in rows.column_names if name in used])
        for number, row in enumerate(rows.to_iterable_dataset().decode(False)):  # so a broken image is named by its row
            yield f"{self.path}, row {number}", row

    def _pairs(self, doing: str) -> Iterator[tuple[str, _Pair | None]]:
        """Read pairs of the right form with their places; None for a tie. The progress bar says what is `doing`."""
        for place, row in tqdm(self._rows(), desc=f"{doing} {self.path}", unit="pair", delay=1):
            with _naming(place):
                pair = self._pair(row)
            yield place, pair

    def _pair(self, row: Any) -> _Pair | None:
        """Check the form of a row."""
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
        if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(value, str):
            return Path(self.path).parent / value, value
        if isinstance(value, bytes):
            return value, f"the image in {column!r}"
        raise ValueError(f"{column!r} holds neither an image nor tokens but {short(value)}")

    def _checked(self, decoder: TokenDecoder, doing: str) -> Iterator[tuple[str, _Pair | None]]:
        """Read pairs as `_pairs` does; check all but their images, and at the end whether there is something to learn.

        Raises what `encode` does.
        """
        policy, weights, ties = "", [], 0
        for place, pair in self._pairs(doing):
            if pair is None:
                ties += 1
            else:
                with _naming(place):
                    policy = policy or (fingerprint(decoder) if pair.decoder else "")
                    if pair.decoder not in (None, policy):
                        raise ValueError("this pair was made for another decoder")
                    decoder.check_prompts([pair.prompt])
                    _check_tokens(pair.sides, decoder.image_tokenizer)
                weights.append(pair.weight)
            yield place, pair
        if not weights:
            raise ValueError(f"{self.path} has no rows" + (f" but {ties} ties" if ties else ""))
        if not any(weights):
            raise ValueError(f"{self.path}: all weights are 0, so nothing would be learned")

    def check(self, decoder: TokenDecoder) -> str:
        """Check every row but for its images, and hash all that pairs are made of, bytes of images included.

        Returns the hash, in which order counts; raises what `encode` does.
        """
        digest = hashlib.sha256()
        for place, pair in self._checked(decoder, "Looking for changes in"):
            if pair is not None:
                with _naming(place):
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
            with _naming(place):
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
            with _naming(place):
                _refuse_equal(sides)
        return Dataset.from_dict(columns)


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the prompt is not a text but {short(value)}")
    if not value.strip():
        raise ValueError("the prompt is empty")
    return value


def _check_tokens(sides: list[_Side], tokenizer: ImageTokenizer) -> None:
    """Check those sides of a pair that are tokens."""
    lists = [side for side in sides if isinstance(side, list)]
    for tokens in lists:
        if len(tokens) != tokenizer.num_tokens:
            raise ValueError(f"{len(tokens)} tokens, where an image has {tokenizer.num_tokens}")
        for token in tokens:
            if not 0 <= token < tokenizer.codebook_size:
                raise ValueError(f"token {token} is not in 0..{tokenizer.codebook_size - 1}")
    if len(lists) == len(sides):
        _refuse_equal(lists)


def _refuse_equal(sides: list[list[int]]) -> None:
    if sides[0] == sides[1]:
        raise ValueError("chosen and rejected are the same image, token by token")


def _content(side: _Side, image_size: int) -> list[int] | np.ndarray:
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
