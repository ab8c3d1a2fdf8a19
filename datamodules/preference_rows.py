"""Preferences from a file, row by row: each checked for its form, which takes neither torch nor the images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from datamodules.data_set_folder import StoredSplit, has_name_on_hub, stored_split
from lightning_modules.jsonl import read_jsonl

if TYPE_CHECKING:  # imports numpy
    from lightning_modules.image_reader import ImageSource

SIDES = ("chosen", "rejected")
_LARGEST_WEIGHT = 1e6  # what is larger is a mistake, and overflows sooner or later
_ORDER = {1: 1, 0: -1, 0.5: None}  # step through (`chosen`, `rejected`) that gives the better one first, by the label
Side: TypeAlias = (
    "tuple[ImageSource, str] | list[int]"  # an image that has yet to be read and its name in errors, or tokens
)


class Pair(NamedTuple):
    """A row of the right form, the chosen side first."""

    prompt: str
    sides: list[Side]
    weight: float
    decoder: str | None


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Begin the sentences of errors with the place in the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


@dataclass(frozen=True)
class PreferenceRows:
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
            raise ValueError(f"data.train.columns must name the column for {missing[0]!r}")
        if unknown := set(self.columns) - {*needed, "label"}:
            raise ValueError(f"data.train.columns: {min(unknown)!r} is none of {', '.join(needed)}, label")
        there = self.path and Path(self.path).exists()
        if not there and (self.is_jsonl or not has_name_on_hub(self.path)):
            raise FileNotFoundError(f"there is no preference file or folder {self.path or repr('')}")
        if Path(self.path).is_file() and not self.is_jsonl:
            raise ValueError(f"{self.path} is no .jsonl file; preferences are one JSON object a line, or a data set")
        if (stored := self._stored) is not None:
            self._refuse_without([*stored.features])

    @property
    def is_jsonl(self) -> bool:
        """It is a file of text, not a data set."""
        return self.path.endswith(".jsonl")

    @property
    def takes_datasets(self) -> bool:
        """Rows are read by `datasets`, whose import takes seconds."""
        return not self.is_jsonl and not ((stored := self._stored) and stored.is_plain(self._used))

    @cached_property
    def _stored(self) -> StoredSplit | None:
        return None if self.is_jsonl else stored_split(self.path, self.split)

    @property
    def _named(self) -> dict[str, str]:
        """Columns that rows must have, by what they hold."""
        return {name: column for name, column in self.columns.items() if column is not None}

    @property
    def _used(self) -> set[str]:
        """Columns that are read, where there are such."""
        return {*self._named.values(), "weight", "decoder"}

    def _refuse_without(self, columns: Sequence[str]) -> None:
        """Raise ValueError if a data set lacks a column."""
        for column in self._named.values():
            if column not in columns:
                has = f"the columns are: {', '.join(columns)}; data.train.columns says what is read"
                raise ValueError(f"{self.path}: there is no {column!r}; {has}")

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Read rows, each with its place in the file."""
        if self.is_jsonl:
            yield from read_jsonl(self.path)
            return
        if (stored := self._stored) and stored.is_plain(self._used):
            rows: Iterable[Any] = stored.rows(self._used)
        else:
            rows = self._loaded()
        for number, row in enumerate(rows):
            yield f"{self.path}, row {number}", row

    def _loaded(self) -> Iterable[Any]:
        """Read rows with `datasets`, from the hub or a folder."""
        from datamodules.data_sets import load_split

        rows = load_split(self.path, self.split)
        self._refuse_without(rows.column_names)
        rows = rows.select_columns([name for name in rows.column_names if name in self._used])
        return rows.to_iterable_dataset().decode(False)  # so a broken image is named by its row

    def pairs(self) -> Iterator[tuple[str, Pair | None]]:
        """Read pairs of the right form with their places; None for a tie. Raises ValueError, naming file and row."""
        for place, row in self._rows():
            with naming(place):
                pair = self._pair(row)
            yield place, pair

    def _pair(self, row: Any) -> Pair | None:
        """Check the form of a row."""
        if not isinstance(row, Mapping):
            raise ValueError(f"not an object but {short(row)}")
        for column in self._named.values():
            if column in row and row[column] is None:
                raise ValueError(f"{column!r} is null")
            if column not in row:
                has = f"the row has: {', '.join(row)}; data.train.columns says what is read"
                raise ValueError(f"there is no {column!r}; {has}")
        sides = [self._side(row, self._named[side]) for side in SIDES]
        prompt, weight = _prompt(row[self._named["prompt"]]), row.get("weight", 1.0)
        if not isinstance(weight, int | float) or not 0 <= weight <= _LARGEST_WEIGHT:
            raise ValueError(f"the weight {short(weight)} is not a number from 0 to {_LARGEST_WEIGHT:,.0f}")
        label_column = self.columns.get("label")
        label = row[label_column] if label_column else 1
        if not isinstance(label, int | float) or label not in _ORDER:
            raise ValueError(f"the label {short(label)} is not 1, 0 or .5")
        order = _ORDER[label]
        return None if order is None else Pair(prompt, sides[::order], float(weight), row.get("decoder"))

    def _side(self, row: Mapping[str, Any], column: str) -> Side:
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


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the prompt is not a text but {short(value)}")
    if not value.strip():
        raise ValueError("the prompt is empty")
    return value


def refuse_useless(path: str, weights: Sequence[float], ties: int) -> None:
    """Raise ValueError for a file whose pairs, of these weights and as many ties, teach nothing."""
    if not weights:
        raise ValueError(f"{path} has no rows" + (f" but {ties} ties" if ties else ""))
    if not any(weights):
        raise ValueError(f"{path}: all weights are 0, so nothing would be learned")


def refuse_other_tokens(sides: Sequence[Side], number: int, codebook_size: int) -> None:
    """Raise ValueError for sides that are tokens, but not as many as an image has, of other codes, or the same ones."""
    lists = [side for side in sides if isinstance(side, list)]
    for tokens in lists:
        if len(tokens) != number:
            raise ValueError(f"{len(tokens)} tokens, where an image has {number}")
        for token in tokens:
            if not 0 <= token < codebook_size:
                raise ValueError(f"token {token} is not in 0..{codebook_size - 1}")
    if len(lists) == len(sides):
        refuse_equal(lists)


def refuse_equal(sides: Sequence[Any]) -> None:
    """Raise ValueError if both sides are the same image."""
    if sides[0] == sides[1]:
        raise ValueError("chosen and rejected are the same image, token by token")
