"""Sana."""

import inspect
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.pipelines.family import Arguments, FlowFamily, pack, unpack


class Sana(FlowFamily):
    """`SanaPipeline`; a token is a latent. Its own solver is of second order, steps here are of first order."""

    @property
    def width(self) -> int:
        return self.network.config.num_attention_heads * self.network.config.attention_head_dim

    def encode(self, prompts: list[str], device: Any) -> dict[str, Tensor]:
        """Encode prompts after the instruction to its text encoder that is the pipeline's default."""
        asked = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encode(prompts, device, asked)

    def encode_away(self, prompt: str, device: Any) -> dict[str, Tensor]:
        return self._encode([prompt], device, None)

    def _encode(self, prompts: list[str], device: Any, instruction: list[str] | None) -> dict[str, Tensor]:
        options: Any = {"do_classifier_free_guidance": False, "complex_human_instruction": instruction}
        hidden, mask, _, _ = self.pipeline.encode_prompt(prompts, device=device, **options)
        return {"encoder_hidden_states": hidden.to(self.network.dtype), "encoder_attention_mask": mask}

    def denoise(self, latents: Tensor, time: float, read: Arguments, guidance: float) -> Tensor:
        times = torch.full((len(latents),), time * self.network.config.timestep_scale, device=latents.device)
        maps = unpack(latents, self.patch)
        return pack(self.network(maps, **read, timestep=times, return_dict=False)[0], self.patch)
