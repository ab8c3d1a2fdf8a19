"""Reference images from a folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.photographs import Photographs
from lightning_modules.rewards.fid import FID
from tests.helpers.pictures import HUGE


def test_the_middle_squares_of_all_images_below_a_folder(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the middle square
    (tmp_path / "more").mkdir()
    Image.fromarray(wide).save(tmp_path / "more" / "a.png")
    Image.new("L", (30, 50), 100).save(tmp_path / "b.JPG")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "more" / "._a.png").write_bytes(b"of macOS")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.png").write_bytes(b"")
    photographs = Photographs(str(tmp_path), 10)
    assert len(photographs) == 2
    grey, middle = photographs[0].image, photographs[1].image
    assert grey.shape == middle.shape == (10, 10, 3) and grey.dtype == np.uint8
    assert abs(grey.astype(int) - 100).max() <= 2 and middle[:, 1:-1].min() > 190
    with pytest.raises(ValueError, match=r"fid.count is 3, and there are only 2 reference images"):
        FID(photographs, 3)
    for content, cause in ((b"no image", "cannot be read: it is no image of"), (HUGE, "cannot be read: it has more")):
        (tmp_path / "b.JPG").write_bytes(content)
        with pytest.raises(ValueError, match=rf"^fid.references.folder: {tmp_path}/b.JPG {cause}"):
            photographs[0]
    with pytest.raises(FileNotFoundError, match=r"there are no images in .*nowhere"):
        Photographs(str(tmp_path / "nowhere"), 10)
