"""Pictures as files, and which prompts are shown in them."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lightning_modules.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with whole(path) as partial:
        image.save(partial, format="PNG")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a plot as a PNG file, whole or not at all."""
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def pick_prompt_indices(total: int, wanted: int) -> set[int]:
    """Pick `wanted` indices (or all, if there are fewer): one from each of as many windows of 0..total.

    Each is one place further along in its window: a fixed step would meet the same one of prompts that repeat in turn.
    """
    return {i * total // wanted + i % max(1, total // wanted) for i in range(wanted)}
