"""Checks of the data that a config names, by its files alone: torch is not imported."""

import os
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from hydra.utils import instantiate

from datamodules.preference_rows import (
    Pair,
    PreferenceRows,
    Side,
    naming,
    refuse_equal,
    refuse_other_tokens,
    refuse_useless,
)
from datamodules.prompt_folders import PromptFolder, scan
from lightning_modules.backbone.words import known_words
from lightning_modules.rewards.references import refuse_few
from lightning_modules.runs.fitting import class_names
from lightning_modules.runs.weights import built_parts

if TYPE_CHECKING:
    from lightning_modules.image_reader import ImageSource
    from lightning_modules.rewards.stored_detections import StoredDetections

_PREFERENCES = "datamodules.preference_files.PreferenceFile"
_DETECTIONS = "lightning_modules.rewards.stored_detections.StoredDetections"
_PHOTOGRAPHS = "datamodules.photographs.Photographs"
_Words: TypeAlias = tuple[frozenset[str], int]  # that the decoder knows, and how many it takes
_SECONDS = 0.5  # of reading a file of preferences; one that takes longer is read to its end before training starts


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
        reward, names, detections = config["geneval"]["reward"], class_names(built_parts(config)), None
        if reward["detector"]["_target_"] == _DETECTIONS:
            made = instantiate({"geneval": {"reward": {"detector": reward["detector"]}}}, _convert_="all")
            detections = made["geneval"]["reward"]["detector"]  # errors of `made` name the key
            names = detections.class_names
        folders = scan(config["images"], names)
        if detections:
            _refuse_undetected(reward, detections, folders)
    fid = config["evaluator"].get("fid") or {}
    if config["task"] != "export" and (fid.get("references") or {}).get("_target_") == _PHOTOGRAPHS:
        made = instantiate({"fid": {"references": fid["references"]}}, _convert_="all")
        refuse_few(made["fid"]["references"], fid["count"])


def _refuse_undetected(
    reward: Mapping[str, Any], detector: "StoredDetections", folders: Sequence[PromptFolder]
) -> None:
    """Raise ValueError for the first image whose detections do not suffice and that can be read.

    Images that cannot be read are left out of scores.
    """
    from lightning_modules.image_reader import UnreadableImage, read_image  # imports numpy
    from lightning_modules.rewards.geneval_rules import GenEvalRules

    rules = GenEvalRules.with_options(detector.class_names, reward.get("options") or {})
    for folder in folders:
        asks_colors = any("color" in clause for clause in folder.metadata["include"])
        for file in folder.files:
            try:
                [found] = detector.of([folder.name(file)])
                if asks_colors and not reward.get("colors"):
                    rules.evaluate(folder.metadata, found)
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
    """Read preferences, as many as there is time for; raises ValueError, naming file and row."""
    for name, node in data.items():
        if not isinstance(node, Mapping) or node.get("_target_") != _PREFERENCES:
            continue
        try:
            rows = PreferenceRows(node["path"], node["split"], node["columns"])
            if not rows.takes_datasets:
                _read(rows, words, tokenizer.get("module") or {})
        except (FileNotFoundError, ValueError) as error:
            if str(error).startswith("data."):
                raise
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"data.{name}: {error}") from None


def _read(rows: PreferenceRows, words: _Words | None, tokenizer: Mapping[str, Any]) -> None:
    until = time.monotonic() + _SECONDS
    weights, ties = [], 0
    for place, pair in rows.pairs():
        if pair is None:
            ties += 1
        else:
            weights.append(pair.weight)
            with naming(place):
                _refuse_unfit_pair(pair, words, tokenizer)
        if time.monotonic() > until:
            return
    refuse_useless(rows.path, weights, ties)


def _refuse_unfit_pair(pair: Pair, words: _Words | None, tokenizer: Mapping[str, Any]) -> None:
    if words:
        known_words(pair.prompt, *words)
    grid, codes = tokenizer.get("grid"), tokenizer.get("codebook_size")
    if type(grid) is type(codes) is int:
        refuse_other_tokens(pair.sides, grid**2, codes)
    for side in pair.sides:
        if isinstance(side, tuple) and (lacks := _lacks(side[0])):
            raise ValueError(f"{side[1]} cannot be read: {lacks}")
    refuse_equal([_content(side) for side in pair.sides])


def _content(side: Side) -> Any:
    """What makes two sides the same image for sure: tokens, bytes, or the path of a file."""
    source = side[0] if isinstance(side, tuple) else side
    return os.path.abspath(source) if isinstance(source, Path) else source


def _lacks(source: "ImageSource") -> str:
    """Say why an image surely cannot be read, without reading it; "" if it may be fine."""
    if isinstance(source, bytes):
        return "" if source else "the file is empty"
    try:
        found = os.stat(source)
    except OSError as error:
        return str(error.strerror)
    if not stat.S_ISREG(found.st_mode):
        return "it is no file"
    if not found.st_size:
        return "the file is empty"
    return "" if os.access(source, os.R_OK) else "Permission denied"
