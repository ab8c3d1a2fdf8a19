"""Any text-to-image pipeline of diffusers as a decoder of whole images; `pipelines` runs some of them step by step.

A pipeline decides a whole image in one step here, and its "tokens" are the pixels. What needs finished images only
works with it: plain sampling, best-of-n by any reward, GenEval.
"""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_modules.backbone.decoder import Cost, Decoder, DecodingState, Proposal, Request
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.pipelines.loading import load_pipeline, networks, pipeline_key
from lightning_modules.backbone.sampling import refuse_below
from lightning_modules.cache_key import class_name

_ONE_STEP = (
    "decoder=diffusion decides an image in one step: use plain sampling or best-of-n by a reward, or a decoder that is "
    "run step by step (sd3, sdxl, flux)"
)


@dataclass(frozen=True)
class DiffusionSampling:
    """How a pipeline is run.

    Pipelines that are distilled to be guided (FLUX, LCM) read `guidance` as a number in one pass; others take a pass
    with the prompt and one without.
    """

    steps: int  # of denoising
    guidance: float  # scale of guidance as diffusers counts it: 1 is none
    size: int  # pixels along each side
    negative_prompt: str = ""  # what guidance leads away from

    def __post_init__(self) -> None:
        refuse_below(1, steps=self.steps)


class Pixels(ImageTokenizer):
    """Takes pixels for tokens, uint8 [B, 3, H, W]."""

    grid = 1  # the parts of an image cannot be decoded one by one

    def encode(self, pixels: Tensor) -> Tensor:
        return (pixels * 255).round().to(torch.uint8)

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens.float() / 255


@dataclass
class DiffusionState(DecodingState):
    """B images, none or all of them made: `tokens` [B, 0] or uint8 [B, 3, H, W]; the noise is the seed of each."""

    prompts: Sequence[str]
    sampling: DiffusionSampling

    @property
    def steps(self) -> int:
        return 1

    @property
    def choice_noise(self) -> NoReturn:
        raise ValueError(_ONE_STEP)

    def select(self, rows: Tensor) -> NoReturn:
        raise ValueError(_ONE_STEP)


class DiffusionDecoder(Decoder):
    """Any text-to-image pipeline of diffusers.

    Args:
        checkpoint, dtype, without: see `load_pipeline`.

    Raises:
        ImportError, FileNotFoundError: see `load_pipeline`.
    """

    sampling_type = DiffusionSampling

    def __init__(self, checkpoint: str, dtype: str = "float16", without: Sequence[str] = ()) -> None:
        super().__init__()
        self.pipeline: Any = load_pipeline(checkpoint, dtype, without)
        self._arguments = inspect.signature(self.pipeline.__call__).parameters
        self.networks = nn.ModuleDict(networks(self.pipeline))  # moved, and told apart, with this module
        self.eval().requires_grad_(False)
        self.image_tokenizer = Pixels()

    def cache_key(self) -> dict[str, Any]:
        return {"class": class_name(self), "weights": fingerprint(self), **pipeline_key(self.pipeline)}

    def steps(self, sampling: DiffusionSampling) -> int:
        return sampling.steps

    def noise(self, seeds: Sequence[int], k: int, sampling: Any) -> Sequence[int]:
        """The seeds: the pipeline draws each image's noise from a generator of its own, on the CPU. See `_guidance`."""
        if k != 1:
            raise ValueError(f"pipelines of diffusers decide an image in one step, so k must be 1, not {k}")
        if sampling is not None:
            self._guidance(sampling)
        return seeds

    @property
    def _denoisers(self) -> list[Any]:
        """The networks that take off noise; each of their calls is a forward pass."""
        return [self.networks[name] for name in ("transformer", "transformer_2", "unet") if name in self.networks]

    def _guidance(self, sampling: DiffusionSampling) -> dict[str, Any]:
        """The arguments that guide the pipeline; ValueError if it cannot be, or has no use for a negative prompt."""
        name = type(self.pipeline).__name__
        distilled = any(
            getattr(network.config, "guidance_embeds", False) or getattr(network.config, "time_cond_proj_dim", None)
            for network in self._denoisers
        )
        scales = ["guidance_scale"] if distilled else ["true_cfg_scale", "guidance_scale"]
        scale = next((argument for argument in scales if argument in self._arguments), None)
        if scale is None and sampling.guidance > 1:
            raise ValueError(f"sampling.guidance={sampling.guidance}: {name} cannot be guided; 1 is none")
        two_passes = not distilled and sampling.guidance > 1 and "negative_prompt" in self._arguments
        if sampling.negative_prompt and not two_passes:
            why = "guidance must be above 1" if sampling.guidance <= 1 else f"{name} makes no pass that would read it"
            raise ValueError(f"sampling.negative_prompt={sampling.negative_prompt!r} has no effect: {why}")
        guided = {} if scale is None else {scale: sampling.guidance}
        return guided | ({"negative_prompt": sampling.negative_prompt} if two_passes else {})

    def begin(self, request: Request, sampling: DiffusionSampling, k: int = 1) -> DiffusionState:
        if request.fixed_mask is not None:
            raise ValueError("pipelines of diffusers decide whole images: none of their tokens can stay")
        nothing = torch.empty(len(request.rows), 0, dtype=torch.uint8, device=self.pipeline.device)
        noise = self.noise(request.seeds, k, sampling)
        return DiffusionState(
            nothing, 0, noise, nothing, None, nothing.float(), Cost(), prompts=request.prompts, sampling=sampling
        )

    @torch.no_grad()
    def propose(self, state: DiffusionState, k: int, distinct: bool = False) -> Proposal:
        """One candidate for each image, uint8 [B, 1, 3, H, W], of which no probability is known."""
        sampling = state.sampling
        guided = self._guidance(sampling)
        if "negative_prompt" in guided:
            guided["negative_prompt"] = [guided["negative_prompt"]] * len(state.prompts)

        def count(network: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            state.cost.decoder_passes += len(next(x for x in (*given, *named.values()) if isinstance(x, Tensor)))

        with ExitStack() as hooks:
            for network in self._denoisers:
                hooks.callback(network.register_forward_pre_hook(count, with_kwargs=True).remove)
            images = self.pipeline(
                prompt=list(state.prompts),
                **guided,
                num_inference_steps=sampling.steps,
                height=sampling.size,
                width=sampling.size,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in state.noise],
                output_type="pt",
            ).images
        unknown = torch.full((len(images), 1), torch.nan, device=images.device)
        return Proposal(self.image_tokenizer.encode(images.float())[:, None], unknown, None)

    def commit(self, state: DiffusionState, proposal: Proposal, choice: Tensor) -> None:
        state.tokens = proposal.tokens[:, 0]
        state.step = 1
