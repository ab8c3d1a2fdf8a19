"""The contract of families: what `PipelineDecoder` asks of the parts of a pipeline of diffusers.

A new family is a subclass in a file of its own, and a line in `decoder.py`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.denoising_sampling import Levels
from lightning_modules.backbone.denoising_state import Prediction

Arguments = Mapping[str, Tensor]  # of the network, a row for each latent


class Family(ABC):
    """How the pipelines of one kind encode prompts, and what their networks make of latents.

    Args:
        pipeline, size: the pipeline; pixels along each side of its images.

    Raises:
        ValueError: its scheduler has levels of noise that are not known here.
    """

    network_name: ClassVar[str] = "transformer"  # the part that takes off noise
    patch: int = 1  # latents along each side of a token

    def __init__(self, pipeline: Any, size: int) -> None:
        self.pipeline, self.size = pipeline, size
        self.network: Any = getattr(pipeline, self.network_name)

    @property
    def is_distilled(self) -> bool:
        """Its network reads the scale of guidance as a number, in one pass."""
        return bool(self.network.config.get("guidance_embeds"))

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers that a layer of the network computes for each token."""

    @abstractmethod
    def levels(self, steps: int, tokens: int, start: float) -> Levels:
        """The pipeline's levels of noise for an image of so many tokens; those below `start` in as many steps."""

    @abstractmethod
    def encode(self, prompts: list[str], device: Any) -> dict[str, Tensor]:
        """What the network reads of each prompt."""

    def encode_away(self, prompt: str, device: Any) -> dict[str, Tensor]:
        """What the network reads of a negative prompt, one row."""
        return self.encode([prompt], device)

    @abstractmethod
    def denoise(self, latents: Tensor, time: float, read: Arguments, guidance: float) -> Tensor:
        """The network's answer to latents [R, T, D] in its precision; one that is distilled reads `guidance`."""

    @abstractmethod
    def prediction(self, latents: Tensor, answer: Tensor, levels: Levels, step: int) -> Prediction:
        """What an answer says of the latents of a step, [R, T, D] each."""

    def guide(self, away: Tensor, toward: Tensor, scale: float) -> Tensor:
        """Guidance, with its scale as diffusers counts it: 1 is none."""
        return away + scale * (toward - away)

    def refuse_scheduler(self) -> NoReturn:
        kind, scheduler = (type(part).__name__ for part in (self.pipeline, self.pipeline.scheduler))
        raise ValueError(
            f"decoder.checkpoint: the steps of a {kind} with a {scheduler} are not known here; "
            "decoder=diffusion makes its images whole"
        )


class FlowFamily(Family):
    """Those of flow matching, whose network predicts the velocity."""

    def __init__(self, pipeline: Any, size: int) -> None:
        super().__init__(pipeline, size)
        scheduler = pipeline.scheduler
        is_euler = type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.invert_sigmas
        if not is_euler and not scheduler.config.get("use_flow_sigmas"):
            self.refuse_scheduler()

    def plan(self, steps: int) -> dict[str, Any]:
        """What the pipeline asks its scheduler to plan."""
        return {"num_inference_steps": steps}

    def levels(self, steps: int, tokens: int, start: float) -> Levels:
        scheduler = self.pipeline.scheduler
        shift = {"mu": dynamic_shift(scheduler.config, tokens)} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(**self.plan(steps), **shift)
        sigmas, times = scheduler.sigmas.tolist(), [*scheduler.timesteps.tolist(), 0.0]
        if start < 1:  # evenly along the rest of the same way
            first = np.interp(start, sigmas[::-1], range(steps, -1, -1))
            places = np.linspace(first, steps, steps + 1)
            sigmas, times = (np.interp(places, range(steps + 1), each).tolist() for each in (sigmas, times))
        return Levels(times, [1 - sigma for sigma in sigmas], sigmas, is_flow=True)

    def prediction(self, latents: Tensor, answer: Tensor, levels: Levels, step: int) -> Prediction:
        return Prediction.of_velocity(latents, answer, levels.sigmas[step])


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The logarithm of the shift of times, linear in the tokens: the more, the more steps are at high noise."""
    fewest, most = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    return low + (high - low) * (tokens - fewest) / (most - fewest)


def pack(latents: Tensor, patch: int) -> Tensor:
    """Latents [B, C, H, W] -> tokens [B, T, C patch²], row by row."""
    return F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, patch: int) -> Tensor:
    """Tokens [B, T, C patch²] of a square image -> latents [B, C, H, W]."""
    grid = math.isqrt(tokens.shape[1])
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (grid, grid)), patch)
