"""Which tokens of an image show what which word of the prompt names: what PARM learns to match words and places by."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_modules.rewards.geneval import COLORS, Detections

ANYTHING = "shape"  # the word for an object of any class


def grounding(
    metadata: Mapping[str, Any],
    detections: Detections,
    class_names: Sequence[str],
    threshold: float,
    max_words: int,
    grid: int,
    image_size: int,
) -> NDArray[np.float32]:
    """Whether the middle of each token's patch lies in the box of an object of the class or colour of each word.

    Args:
        metadata: the prompt; colours are looked at only if its clauses name any, because that may cost a network.
        detections: the objects in the image.
        class_names: words that name a class, or the plural of one.
        threshold: score that an object has to exceed.
        max_words: words of the longest prompt, L.
        grid: tokens along each side, which make T = grid * grid.
        image_size: pixels along each side.

    Returns:
        [T, L] of 0 and 1; NaN for words that name neither class nor colour, and beyond the prompt.
    """
    found = [i for i, score in enumerate(detections.scores) if score > threshold]
    colored = any("color" in clause for clause in metadata["include"])
    colors = detections.colors(found) if colored else [""] * len(found)
    middles = (np.arange(grid) + 0.5) * image_size / grid
    result = np.full((grid, grid, max_words), np.nan, np.float32)
    for place, word in enumerate(metadata["prompt"].split()):
        noun = next((n for n in (word, word.removesuffix("s"), word.removesuffix("es")) if n in class_names), None)
        if noun is None and word not in (*COLORS, ANYTHING):
            continue
        result[..., place] = 0
        for i, color in zip(found, colors, strict=True):
            if word in (color, ANYTHING) or detections.classes[i] == noun:
                x1, y1, x2, y2 = detections.boxes[i]
                rows, columns = (middles >= y1) & (middles < y2), (middles >= x1) & (middles < x2)
                result[rows[:, None] & columns, place] = 1
    return result.reshape(-1, max_words)
