"""Qwen-Image."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.pipelines.family import Arguments
from lightning_modules.backbone.pipelines.flux import Flux

_MOST_WORDS = 512  # text tokens of a prompt, the pipeline's default


class QwenImage(Flux):
    """`QwenImagePipeline`, whose latents and plan of steps are those of FLUX. Texts are as long as the longest."""

    def encode(self, prompts: list[str], device: Any) -> dict[str, Tensor]:
        hidden, mask = self.pipeline.encode_prompt(prompts, device=device, max_sequence_length=_MOST_WORDS)
        mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=device) if mask is None else mask
        return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}

    def denoise(self, latents: Tensor, time: float, read: Arguments, guidance: float) -> Tensor:
        rows, grid = len(latents), round(latents.shape[1] ** 0.5)
        times = torch.full((rows,), time, device=latents.device, dtype=latents.dtype)
        shapes = [[(1, grid, grid)]] * rows
        return self.network(latents, timestep=times / 1000, img_shapes=shapes, **read, return_dict=False)[0]

    def guide(self, away: Tensor, toward: Tensor, scale: float) -> Tensor:
        """Guidance that leaves the length of each token's velocity as it was."""
        guided = super().guide(away, toward, scale)
        return guided * (toward.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
