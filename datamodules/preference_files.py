"""Preferences from a file: prompts with a chosen and a rejected image, or with the tokens of both."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from datamodules.pairs import PairsDataModule
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import fingerprint


@dataclass(frozen=True)
class PreferenceFile:
    """A JSONL file, a folder written by `datasets`, or a data set on the Hugging Face hub.

    Images are paths (relative to the JSONL file) or image columns of `datasets`; where a value is a list of numbers
    instead, these are image tokens. A column `weight` says how much each pair counts; without it all count alike.

    Attributes:
        path: of the file or folder, or name on the hub.
        split: of a data set on the hub.
        columns: names of the columns for `prompt`, `chosen` and `rejected`.
    """

    path: str
    split: str
    columns: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            if name not in self.columns:
                raise ValueError(f"data.columns must name the column for {name!r}")

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Rows with the place where they stand, for sentences about them."""
        if self.path.endswith(".jsonl"):
            for number, line in enumerate(Path(self.path).read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    try:
                        yield f"{self.path}:{number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{self.path}:{number}: not valid JSON ({error})") from None
            return
        for number, row in enumerate(self._dataset()):
            yield f"{self.path}, row {number}", row

    def _dataset(self) -> Dataset:
        if Path(self.path).exists():
            rows = datasets.load_from_disk(self.path)
        else:
            rows = datasets.load_dataset(self.path, split=self.split)
        if not isinstance(rows, Dataset):
            raise ValueError(f"{self.path} holds several splits ({', '.join(map(str, rows))}); name one of them")
        # Undecoded, so that a broken image is found here, with its row.
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows

    def digest(self) -> str:
        """Changes when the file does."""
        if not self.path.endswith(".jsonl"):
            return self._dataset()._fingerprint
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"there is no preference file {self.path}")
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()[:16]

    def encode(self, decoder: TokenDecoder, batch_size: int) -> Dataset:
        """Check every row and encode its images: `prompt`, `chosen`, `rejected` (tokens) and `weight`.

        Raises:
            ValueError: no rows, or a row with a missing column, unknown words, an unreadable image, tokens that are out
                of range or too few or many, twice the same image, or made for another decoder; it names file and row.
        """
        tokenizer = decoder.image_tokenizer
        made: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": [], "weight": []}
        policy = fingerprint(decoder)
        places, pending = [], []
        for place, row in tqdm(self._rows(), desc=f"Reading {self.path}", unit="pair"):
            if not isinstance(row, Mapping):
                raise ValueError(f"{place}: not an object but {row!r}")
            for column in self.columns.values():
                if row.get(column) is None:
                    raise ValueError(f"{place}: there is no {column!r}; the row has: {', '.join(row)}")
            if row.get("decoder", policy) != policy:
                raise ValueError(f"{place}: this pair was made for another decoder")
            prompt = row[self.columns["prompt"]]
            try:
                decoder.check_prompts([str(prompt)])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            made["prompt"].append(str(prompt))
            made["weight"].append(self._weight(place, row.get("weight", 1.0)))
            places.append(place)
            pending += [self._side(place, row[self.columns[side]], tokenizer) for side in ("chosen", "rejected")]
            if len(pending) >= batch_size:
                self._flush(pending, made, tokenizer)
        if not places:
            raise ValueError(f"{self.path} has no rows")
        self._flush(pending, made, tokenizer)
        for place, chosen, rejected in zip(places, made["chosen"], made["rejected"], strict=True):
            if chosen == rejected:
                raise ValueError(f"{place}: chosen and rejected are the same image, token by token")
        return Dataset.from_dict(made)

    def _weight(self, place: str, value: Any) -> float:
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{place}: the weight {value!r} is not a number of at least 0")
        return float(value)

    def _side(self, place: str, value: Any, tokenizer: ImageTokenizer) -> list[int] | np.ndarray:
        """Tokens as they are, or pixels, uint8 [H, W, 3]."""
        if isinstance(value, list):
            if len(value) != tokenizer.num_tokens:
                raise ValueError(f"{place}: {len(value)} tokens, where an image has {tokenizer.num_tokens}")
            for token in value:
                if not isinstance(token, int) or not 0 <= token < tokenizer.codebook_size:
                    raise ValueError(f"{place}: token {token!r} is not in 0..{tokenizer.codebook_size - 1}")
            return value
        source: Any = value
        if isinstance(value, str):
            source = Path(self.path).parent / value
        elif isinstance(value, Mapping):
            source = BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
        try:
            with Image.open(source) as image:
                size = (tokenizer.image_size, tokenizer.image_size)
                return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC))
        except (OSError, UnidentifiedImageError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{place}: cannot read the image {value if isinstance(value, str) else ''}: {error}"
            ) from None

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
        folder, collect_batch_size, batch_size: see `PairsDataModule`.
    """

    def __init__(
        self, train: PreferenceFile, validation: PreferenceFile, folder: str, collect_batch_size: int, batch_size: int
    ) -> None:
        super().__init__(folder, batch_size, collect_batch_size)
        self.files = {"train": train, "validation": validation}
        self._made: dict[str, Dataset] = {}

    def setup(self, stage: str) -> None:
        """Read, check, encode and score everything before training starts."""
        assert self.trainer is not None
        decoder: Any = self.trainer.lightning_module.decoder
        for name, source in self.files.items():
            if name in self._made:
                continue
            about = [source.digest(), dict(source.columns), decoder.cache_key()]
            pairs = self._stored(f"{name}-pairs", about, partial(self._read, source, decoder))
            self._made[name] = datasets.load_from_disk(str(pairs))

    def _read(self, source: PreferenceFile, decoder: TokenDecoder) -> Dataset:
        assert self.trainer is not None
        decoder.to(self.trainer.strategy.root_device)  # where Lightning puts it later anyway
        return self._with_reference(source.encode(decoder, self.collect_batch_size), decoder)

    def _pairs(self, name: str) -> Dataset:
        return self._made[name]
