"""GenEval prompts: the embedded shapes prompts, or files and data sets in the official format."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datamodules.coco_prompts import OFFICIAL_FILE, official_prompts, prompt_pool
from datamodules.data_set_folder import stored_split
from datamodules.prompt_templates import Metadata, PerTask, Split, by_task, pick
from datamodules.shapes.prompts import shapes_prompts as prompts_from_shapes  # noqa: F401  # for configs
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES, read_prompts, validate_metadata

OFFICIAL_IMAGES = 4  # of each prompt


def prompts_from_coco(split: Split, per_task: PerTask) -> list[Metadata]:
    """Return prompts about COCO's classes; see `pick`."""
    return pick(prompt_pool(split), per_task)


def prompts_from_file(
    path: str, class_names: Sequence[str] = CLASS_NAMES, official: bool = False, per_task: PerTask = None
) -> list[Metadata]:
    """Read the prompts of a JSONL file in GenEval's format.

    Args:
        path: of the file, or `bundled:geneval_prompts`, the official prompts.
        class_names: classes that prompts may name.
        official: these must be the official 553 prompts, each once.
        per_task: see `pick`.

    Raises:
        FileNotFoundError, ValueError: no such file, a broken row, or other prompts than the `official` ones.
    """
    file = str(OFFICIAL_FILE) if path == f"bundled:{OFFICIAL_FILE.parent.name}" else path
    return _checked(read_prompts(file, tuple(class_names)), path, official, per_task)


def prompts_from_dataset(
    path: str,
    split: str = "test",
    class_names: Sequence[str] = CLASS_NAMES,
    official: bool = False,
    per_task: PerTask = None,
) -> list[Metadata]:
    """Read the prompts of a data set on the Hugging Face hub, or of a folder written by `datasets`.

    Its columns are the keys of GenEval's format (`tag`, `include`, `exclude`, `prompt`), or it has one column,
    `metadata`, that holds the row, as JSON or as a struct.

    Args:
        path: of the folder, or name on the hub.
        split: of a data set with several.
        class_names, official, per_task: see `prompts_from_file`, also for what is raised.
    """
    stored = stored_split(path, split)
    if stored is not None and stored.is_plain(stored.features):
        found: Iterable[Any] = stored.rows(stored.features)
    else:
        from datamodules.data_sets import load_split  # takes seconds

        found = load_split(path, split)
    rows = []
    for number, columns in enumerate(found):
        place = f"{path}, row {number}"
        row = _plain(columns)
        if isinstance(row.get("metadata"), Mapping):
            row = row["metadata"]
        elif "metadata" in row:
            try:
                row = json.loads(row["metadata"])
            except ValueError as error:
                raise ValueError(f"{place}: metadata is not valid JSON: {error}") from error
        validate_metadata(row, tuple(class_names), place)
        rows.append(row)
    return _checked(rows, path, official, per_task)


def _plain(value: Any) -> Any:
    """Undo what columns do to a row: keys that a clause lacks are None there, and a position's index is a text."""
    if isinstance(value, Mapping):
        plain = {key: _plain(item) for key, item in value.items() if item is not None}
        if isinstance(plain.get("position"), list):
            plain["position"] = [int(item) if str(item).isdecimal() else item for item in plain["position"]]
        return plain
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _checked(rows: list[Metadata], place: str, official: bool, per_task: PerTask) -> list[Metadata]:
    if official and (found := differences(rows)):
        advice = "for prompts of your own set official=false beside the path"
        raise ValueError(f"{place}: these are not the official prompts: {'; '.join(found)}; {advice}")
    return rows if per_task is None else pick(by_task(rows), per_task)


def repeated(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say in a phrase how many prompts occur more than once, and which one most often; none if none does."""
    counts = Counter(row["prompt"] for row in rows)
    several = sum(count > 1 for count in counts.values())
    prompt, most = next(iter(counts.most_common(1)), ("", 0))
    return [f"prompts that occur more than once: {several}, such as {prompt!r} {most} times"] if several else []


def differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name what sets prompts apart from the official 553, a phrase each: missing, surplus, repeated, altered."""
    both = official_prompts(), rows
    official, distinct = ({json.dumps(row, sort_keys=True): row["tag"] for row in each} for each in both)
    totals, counts = Counter(official.values()), Counter(distinct.values())
    found = [f"{counts[task]} of {total} {task} prompts" for task, total in totals.items() if counts[task] != total]
    found += repeated(rows)
    if not found and distinct.keys() != official.keys():
        found.append("some have other words or clauses")
    return found


def unofficial(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in a sentence for each difference why a score is not that of the official benchmark."""
    return [f"not the official prompt set: {phrase}" for phrase in differences(rows)]


def sample_path(prompt: int, sample: int) -> str:
    """Return the path of an image within a folder in GenEval's layout."""
    return f"{prompt:05d}/samples/{sample:04d}.png"
