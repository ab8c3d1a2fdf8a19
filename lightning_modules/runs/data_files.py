"""Checks of the data that a config names, by its files alone: torch is not imported."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hydra.utils import instantiate

from datamodules.preference_rows import Pair, PreferenceRows, naming, refuse_equal, refuse_other_tokens, refuse_useless
from datamodules.prompt_folders import PromptFolder, scan
from lightning_modules.backbone.words import known_words
from lightning_modules.rewards.references import refuse_few
from lightning_modules.runs.fitting import class_names
from lightning_modules.runs.weights import built_parts

if TYPE_CHECKING:
    from lightning_modules.rewards.stored_detections import StoredDetections

_PREFERENCES = "datamodules.preference_files.PreferenceFile"
_DETECTIONS = "lightning_modules.rewards.stored_detections.StoredDetections"
_PHOTOGRAPHS = "datamodules.photographs.Photographs"
_Words: TypeAlias = tuple[frozenset[str], int]  # that the decoder knows, and how many it takes
_ROWS = 1000  # of preferences, which are read in an instant; all are before training starts


def refuse_broken_rows(config: Mapping[str, Any]) -> None:
    """Refuse prompts and preferences that are not of their form.

    Raises ValueError, naming file and row, or FileNotFoundError.
    """
    _read_prompts(config["geneval"], bool(config.get("data")))
    _read_preferences(config.get("data") or {}, _words_of(config.get("decoder") or {}), config.get("tokenizer") or {})


def refuse_unknown_words(config: Mapping[str, Any]) -> None:
    """Raise ValueError for prompts, to be evaluated on, with words that the decoder does not know, or too many."""
    words = _words_of(config.get("decoder") or {})
    if words is None or not config["callbacks"].get("geneval"):
        return
    for name in ("validation_prompts", "test_prompts"):
        if isinstance(node := config["geneval"].get(name), Mapping):
            for row in instantiate(node, _convert_="all"):
                with naming(f"geneval.{name}"):
                    known_words(row["prompt"], *words)


def refuse_unfit_images(config: Mapping[str, Any]) -> None:
    """Refuse folders of images, detections in them and references that are not of their form, or too few.

    Raises ValueError or FileNotFoundError, naming the file, its row or the key.
    """
    if config["task"] == "score":
        folders = scan(config["images"], class_names(built_parts(config)))
        detector = config["geneval"]["reward"]["detector"]
        if detector["_target_"] == _DETECTIONS:
            made = instantiate({"geneval": {"reward": {"detector": detector}}}, _convert_="all")  # errors name the key
            _refuse_undetected(made["geneval"]["reward"]["detector"], folders)
    fid = config["evaluator"].get("fid") or {}
    if config["task"] != "export" and (fid.get("references") or {}).get("_target_") == _PHOTOGRAPHS:
        made = instantiate({"fid": {"references": fid["references"]}}, _convert_="all")
        refuse_few(made["fid"]["references"], fid["count"])


def _refuse_undetected(detector: "StoredDetections", folders: Sequence[PromptFolder]) -> None:
    """Raise ValueError for the first image that has no detections and can be read; others are left out of scores."""
    from lightning_modules.image_reader import UnreadableImage, read_image  # imports numpy

    for folder in folders:
        for file in folder.files:
            try:
                detector.of([folder.name(file)])
            except ValueError:
                with suppress(UnreadableImage):
                    read_image(folder.path / "samples" / file, file)
                    raise


def _words_of(decoder: Mapping[str, Any]) -> _Words | None:
    """The words that a decoder of this project knows by heart, if it does, and how many it takes."""
    network = decoder.get("module") or {}
    vocabulary, most = network.get("vocabulary"), network.get("max_words")
    if not str(network.get("_target_")).startswith("lightning_modules.") or vocabulary is None or type(most) is not int:
        return None
    made = instantiate({"decoder": {"module": {"vocabulary": vocabulary}}}, _convert_="all")
    return frozenset(made["decoder"]["module"]["vocabulary"]), most


def _read_prompts(geneval: Mapping[str, Any], trains: bool) -> None:
    """Read prompts of files, and those of which numbers are given by task; raises what their functions raise."""
    for name, node in geneval.items():
        if name == "train_prompts" and not trains:  # thousands, to be made for nothing
            continue
        if isinstance(node, Mapping) and ("path" in node or isinstance(node.get("per_task"), Mapping)):
            instantiate({"geneval": {name: node}}, _convert_="all")


def _read_preferences(data: Mapping[str, Any], words: _Words | None, tokenizer: Mapping[str, Any]) -> None:
    """Read the first preferences of files; raises ValueError, naming file and row, for one that is not of the form."""
    for name, node in data.items():
        if not isinstance(node, Mapping) or node.get("_target_") != _PREFERENCES:
            continue
        try:
            rows = PreferenceRows(node["path"], node["split"], node["columns"])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data.{name}: {error}") from None
        if not rows.is_jsonl:  # a data set takes seconds to open
            continue
        pairs = [*islice(rows.pairs(), _ROWS)]
        weights = [pair.weight for _, pair in pairs if pair]
        if len(pairs) < _ROWS:
            refuse_useless(node["path"], weights, ties=len(pairs) - len(weights))
        for place, pair in pairs:
            if pair:
                with naming(place):
                    _refuse_unfit_pair(pair, words, tokenizer.get("module") or {})


def _refuse_unfit_pair(pair: Pair, words: _Words | None, tokenizer: Mapping[str, Any]) -> None:
    if words:
        known_words(pair.prompt, *words)
    grid, codes = tokenizer.get("grid"), tokenizer.get("codebook_size")
    if type(grid) is type(codes) is int:
        refuse_other_tokens(pair.sides, grid**2, codes)
    for side in pair.sides:
        if isinstance(side, tuple) and isinstance(side[0], Path) and not side[0].is_file():
            lacks = "it is no file" if side[0].exists() else "No such file or directory"
            raise ValueError(f"{side[1]} cannot be read: {lacks}")
    refuse_equal(pair.sides)
