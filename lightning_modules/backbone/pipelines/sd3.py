"""Stable Diffusion 3 and 3.5."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.pipelines.family import Arguments, FlowFamily, pack, unpack


class SD3(FlowFamily):
    """`StableDiffusion3Pipeline`; a token is a patch of its transformer, 2x2 latents."""

    def __init__(self, pipeline: Any, size: int) -> None:
        super().__init__(pipeline, size)
        self.patch = self.network.config.patch_size

    @property
    def width(self) -> int:
        return self.network.inner_dim

    def encode(self, prompts: list[str], device: Any) -> dict[str, Tensor]:
        texts: Any = {"prompt": prompts, "prompt_2": None, "prompt_3": None}
        hidden, _, pooled, _ = self.pipeline.encode_prompt(**texts, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def denoise(self, latents: Tensor, time: float, read: Arguments, guidance: float) -> Tensor:
        times = torch.full((len(latents),), time, device=latents.device)
        maps = unpack(latents, self.patch)
        return pack(self.network(hidden_states=maps, timestep=times, **read, return_dict=False)[0], self.patch)
