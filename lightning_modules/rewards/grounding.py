"""Grounding: the tokens of an image that show what each word of the prompt names, from which PARM learns."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_modules.rewards.geneval_metadata import ANYTHING, COLORS
from lightning_modules.rewards.geneval_rules import Detections


@cache
def _names(class_names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds colours and classes; "orange" is a colour where a class follows: of "an orange orange" the first one."""
    longest_first = sorted((*class_names, ANYTHING), key=len, reverse=True)
    noun = rf"(?:{'|'.join(map(re.escape, longest_first))})(?:e?s)?\b"
    color = "|".join(COLORS)
    return re.compile(rf"\b(?:(?P<color>(?:{color})(?=\s+{noun}))|(?P<noun>{noun})|(?P<lone>(?:{color})\b))")


def grounding(
    metadata: Mapping[str, Any],
    detections: Detections,
    class_names: Sequence[str],
    threshold: float,
    words: Sequence[tuple[int, int]],
    max_words: int,
    grid: int,
    image_size: int,
) -> NDArray[np.float32]:
    """Mark the tokens whose patch has its middle in the box of an object of the class or colour of each word.

    Args:
        metadata: the prompt; colours are named only if its clauses name any, because that may cost a network.
        class_names: of one word or several, which prompts may have in the plural.
        threshold: score that an object has to exceed.
        words: start and end of each of the decoder's words in the prompt, in characters.
        max_words: words of the longest prompt, L.
        grid, image_size: tokens (T = grid * grid) and pixels along each side.

    Returns [T, L] of 0 and 1; NaN for words that are no part of a class or colour, and beyond the prompt.
    """
    found = [i for i, score in enumerate(detections.scores) if score > threshold]
    colored = any("color" in clause for clause in metadata["include"])
    colors = detections.colors(found) if colored else [""] * len(found)
    middles = (np.arange(grid) + 0.5) * image_size / grid
    result = np.full((grid, grid, max_words), np.nan, np.float32)
    for name in _names(tuple(class_names)).finditer(metadata["prompt"]):
        first, last = name.span()
        places = [place for place, (start, end) in enumerate(words[:max_words]) if start < last and end > first]
        result[..., places] = 0
        color, noun = name["color"] or name["lone"], name["noun"] or ""
        singular = {noun, noun.removesuffix("s"), noun.removesuffix("es")}
        for i, seen in zip(found, colors, strict=True):
            if (seen == color) if color else (ANYTHING in singular or detections.classes[i] in singular):
                x1, y1, x2, y2 = detections.boxes[i]
                rows, columns = (middles >= y1) & (middles < y2), (middles >= x1) & (middles < x2)
                for place in places:
                    result[rows[:, None] & columns, place] = 1
    return result.reshape(-1, max_words)
