"""GenEval's prompts: what they may ask, in the words of the official metadata (github.com/djghosh13/geneval)."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_modules.jsonl import read_jsonl

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
ANYTHING = "shape"  # the word for an object of any class

# COCO's 80 classes in COCO's order, three of them under GenEval's own names (computer mouse, tv remote,
# computer keyboard): map a COCO detector's output by index, never by name.
CLASS_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def read_prompts(path: str | Path, class_names: Sequence[str] = CLASS_NAMES) -> list[dict[str, Any]]:
    """Read prompts in GenEval's format, one JSON object a line, and validate them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no prompts or a broken one; the message names file and line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file of GenEval prompts")
    rows = []
    for place, row in read_jsonl(path):
        validate_metadata(row, class_names, place)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file has no prompts")
    return rows


def validate_metadata(row: Any, class_names: Sequence[str] | None, place: str) -> None:
    """Refuse a prompt that `GenEvalRules` cannot judge, or would judge otherwise than its author meant.

    It may name the classes `class_names` (None: any). Raises ValueError with one sentence that begins with `place`
    ("file:line").
    """
    if complaint := _complaint(row, class_names):
        raise ValueError(f"{place}: {complaint}")


def _complaint(row: Any, class_names: Sequence[str] | None) -> str:
    """A sentence on what is wrong with a prompt, "" if nothing is."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {row!r}"
    tag, prompt, include, exclude = row.get("tag"), row.get("prompt"), row.get("include"), row.get("exclude", [])
    known = ("tag", "prompt", "include", "exclude")
    absent = [key for key in known if key not in row]
    typos = [(key, close[0]) for key in row if key not in known and (close := get_close_matches(key, absent, 1, 0.8))]
    checks = (
        # Others may be a user's own; the rules would ignore a misspelt one in silence.
        (not typos, "unknown key {!r}, probably {!r}".format(*typos[0]) if typos else ""),
        (tag is not None, f"there is no tag; it is one of {', '.join(TASKS)}"),
        (tag in TASKS, f"unknown tag {tag!r}, known are {', '.join(TASKS)}"),
        (isinstance(prompt, str) and prompt.strip(), f"prompt must be a non-empty text, found {prompt!r}"),
        (isinstance(include, list) and include, f"include must be a non-empty list, found {include!r}"),
        (isinstance(exclude, list), f"exclude must be a list, found {exclude!r}"),
    )
    if complaint := next((sentence for fine, sentence in checks if not fine), ""):
        return complaint
    for kind, keys in (("include", ("class", "count", "color", "position")), ("exclude", ("class", "count"))):
        for index, clause in enumerate(row.get(kind, [])):
            if complaint := _clause_complaint(clause, keys, index, class_names):
                return f"{kind}[{index}]: {complaint}"
    return ""


def _clause_complaint(clause: Any, keys: Sequence[str], index: int, class_names: Sequence[str] | None) -> str:
    if not isinstance(clause, dict):
        return f"expected an object, found {clause!r}"
    unknown = next((key for key in clause if key not in keys), None)
    name, count, color = clause.get("class"), clause.get("count"), clause.get("color", COLORS[0])
    classes = [name] if class_names is None else class_names
    listed = ", ".join([*map(str, classes[:8]), *(["..."] if len(classes) > 8 else [])])
    pair = clause.get("position", [RELATIONS[0], -1])
    is_pair = isinstance(pair, list) and len(pair) == 2
    relation, target = pair if is_pair else (None, None)
    is_earlier = "position" not in clause or (type(target) is int and 0 <= target < index)
    checks = (
        # The rules read known keys only, so a misspelt one would be ignored in silence.
        (unknown is None, f"unknown key {unknown!r}, known are {', '.join(keys)}"),
        (name in classes, f"unknown class {name!r}, known are {listed}"),
        (type(count) is int and count >= 1, f"count must be a whole number of at least 1, found {count!r}"),
        (color in COLORS, f"unknown color {color!r}, known are {', '.join(COLORS)}"),
        (is_pair, f"position must be [relation, index of an earlier include], found {pair!r}"),
        (relation in RELATIONS, f"unknown relation {relation!r}, known are {', '.join(RELATIONS)}"),
        (is_earlier, f"position must refer to an earlier include by its index, found {target!r}"),
    )
    return next((sentence for fine, sentence in checks if not fine), "")
