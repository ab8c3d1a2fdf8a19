"""Checkpoint files that appear whole or not at all."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_modules.files import whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the file; Lightning's own writes to the system's temporary folder and copies from there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; raises OSError, naming the file, if it cannot be written."""
        buffer = BytesIO()  # torch's own errors do not say that a disk is full
        torch.save(checkpoint, buffer)
        with whole(Path(path)) as partial:
            partial.write_bytes(buffer.getbuffer())
