"""A flow decoder: a Transformer that takes noise off all patches of an image at once (flow matching).

It predicts the image and is trained on the velocity: of large patches a network of this size cannot predict noise
(arXiv 2511.13720).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbone.decoder import Cost, TokenDecoder
from lightning_modules.backbone.denoising import DenoisingDecoder
from lightning_modules.backbone.denoising_sampling import FlowSampling, GaussianNoise, Levels
from lightning_modules.backbone.denoising_state import LatentTrajectory, Prediction
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.image_tokenizer import PixelPatches
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.loading import CheckpointReader, copy_from
from lightning_modules.backbone.mask_attention import Grid, Prefix
from lightning_modules.backbone.sampling import guide
from lightning_modules.backbone.text import PromptEncoder, WordTokenizer
from lightning_modules.backbone.transformer import Block, Transformer, TransformerConfig
from lightning_modules.ranks import uniform_rows

_FREQUENCIES = 32  # of the embedding of time
_LEAST_TIME = 0.05  # below this, errors of the image are not errors of the velocity
_ESTIMATES = 4  # times an image, for `log_probs`
_SHIFT = 5.0  # of the times at which verifiers learn; see `FlowSampling`


@dataclass
class PromptKeys:
    """What passes read of B prompts: the keys and values of their words, and of no words, which all images share."""

    prompt: Tensor
    prefix: Prefix  # of B prompts
    empty: Prefix | None  # of the empty prompt, where anything is guided away from it or compared with it

    @property
    def prefixes(self) -> list[Prefix]:
        return [self.prefix] if self.empty is None else [self.prefix, self.empty]

    def select(self, rows: Tensor) -> "PromptKeys":
        return PromptKeys(self.prompt[rows], self.prefix.select(rows), self.empty)


class Modulation(nn.Module):
    """Adaptive layer norm: scales, shifts and gates of every layer, from the time (DiT, arXiv 2212.09748).

    Layers share one network and have an offset each (PixArt-alpha, arXiv 2310.00426). At first it changes nothing.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(Linear(2 * _FREQUENCIES, dim), nn.SiLU(), Linear(dim, 6 * dim))
        self.layers = nn.Parameter(torch.zeros(depth, 6, dim))
        nn.init.zeros_(self.embed[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.embed[2].bias)  # type: ignore[arg-type]

    def forward(self, times: Tensor) -> Tensor:
        """Times [R] -> shift, scale and gate of attention, then of the feed-forward layer, [depth, 6, R, 1, dim]."""
        frequencies = torch.logspace(0, 2, _FREQUENCIES, device=times.device)
        angles = times[:, None] * frequencies
        shared = self.embed(torch.cat([angles.cos(), angles.sin()], -1)).unflatten(-1, (6, -1)).transpose(0, 1)
        return (self.layers[:, :, None] + shared)[..., None, :]


def modulated(block: Block, x: Tensor, layer: int, attending: Grid, modulation: Tensor) -> Tensor:
    """Run a layer on x [R, S, dim] with shifts, scales and gates [6, R, 1, dim]."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    normed = block.attention_norm(x) * (1 + scale) + shift
    x = x + (1 + gate) * block.attention(normed, layer, attending)
    assert block.mlp_norm is not None
    return x + (1 + mlp_gate) * block.mlp(block.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)


class FlowDecoder(DenoisingDecoder, TokenDecoder):
    """Reads a prompt's encoded words once, and the noisy patches of an image at every step.

    Args:
        image_tokenizer: how images are cut into patches.
        vocabulary, max_words: the words that prompts consist of; the longest prompt, words.
        transformer: sizes of the decoder.
        text_depth: layers of the prompt encoder, which has the decoder's width and heads.
        feature_layers: see `TokenDecoder`; without feature layers there are no features.
        time_mean, time_std: of log(t / (1 - t)), t being the times that are trained (logit-normal, arXiv 2403.03206).
            Large patches of flat colours stand out of much noise, so that most is decided at high times.
    """

    causal = False
    trajectory_type = LatentTrajectory
    sampling_type = FlowSampling
    has_likelihood = False
    image_tokenizer: PixelPatches
    text_tokenizer: WordTokenizer

    def __init__(
        self,
        image_tokenizer: PixelPatches,
        vocabulary: Sequence[str],
        max_words: int,
        transformer: TransformerConfig,
        text_depth: int,
        feature_layers: Sequence[int] = (),
        time_mean: float = 1.2,
        time_std: float = 1.3,
    ) -> None:
        super().__init__(image_tokenizer, transformer.depth, feature_layers)
        self.time_mean, self.time_std = time_mean, time_std
        dim, size = transformer.dim, image_tokenizer.vector_size
        self.text_tokenizer = WordTokenizer(vocabulary, max_words)
        self.prompt_encoder = PromptEncoder(self.text_tokenizer, replace(transformer, depth=text_depth))
        self.patch_proj = Linear(size, dim)
        self.rows = nn.Parameter(torch.randn(image_tokenizer.grid, 1, dim) * 0.02)
        self.columns = nn.Parameter(torch.randn(1, image_tokenizer.grid, dim) * 0.02)
        self.modulation = Modulation(dim, transformer.depth)
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(dim)
        self.head = Linear(dim, size)
        # The width of the Transformer is less than a patch has numbers: edges are drawn from the noisy patch itself.
        self.refine = nn.Sequential(Linear(dim + size, 4 * dim), nn.GELU(), Linear(4 * dim, size))
        for layer in (self.head, self.refine[2]):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def cache_key(self) -> dict[str, Any]:
        """See `TokenDecoder`; the times that are trained decide `confidence`, and so what reflection does."""
        return super().cache_key() | {"times": [self.time_mean, self.time_std]}

    def warm_start(self, name: str, stored: CheckpointReader) -> None:
        """Begin training with what a next-token decoder of the same sizes has too: Transformer, words, rows, columns.

        Raises ValueError if a tensor is missing or of another shape, with it and the `name` of the weights.
        """
        shared = ("transformer.", "prompt_encoder.", "rows", "columns")
        targets = {key: [weight] for key, weight in self.named_parameters() if key.startswith(shared)}
        copy_from(stored, targets, f"decoder.start={name!r}")

    @property
    def max_words(self) -> int:
        return self.text_tokenizer.max_words

    def training_bytes(self, images: int, size: int, weight: int) -> float:
        """Estimate the activations that wait for the backward pass."""
        kept = self.transformer.config.saved_bytes(self.num_tokens + self.max_words, size, weight)
        return images * kept + (self.cast_bytes(size, weight) if images else 0)

    def decoding_bytes(self, images: int, size: int) -> float:
        """Estimate a layer's hidden states, the keys and values of prompts, and all latents on the way.

        Guidance, and 32 steps, are included.
        """
        config = self.transformer.config
        layer = 2 * self.num_tokens * config.dim * (5 + 2 * config.mlp_ratio) * size
        prompts = 2 * config.depth * config.dim * self.max_words * size
        latents = 32 * self.num_tokens * self.image_tokenizer.vector_size * (4 + 2)
        return images * (layer + prompts + latents)

    def latent_shape(self, sampling: FlowSampling) -> tuple[int, int]:
        return self.num_tokens, self.image_tokenizer.vector_size

    def levels(self, sampling: FlowSampling) -> Levels:
        return Levels.of_flow(sampling.times)

    def _read(self, prompts: Sequence[str]) -> tuple[Prefix, Tensor]:
        """The keys and values of prompts, and their features, [B, L, 2 dim]."""
        ids = self.text_tokenizer(prompts).to(self.rows.device)
        encoded, prefix = self.prompt_encoder(ids), Prefix(None, None)
        self.transformer.last(encoded, prefix)
        return prefix, self.prompt_encoder.read(ids, encoded)

    def encode(self, prompts: Sequence[str], sampling: FlowSampling) -> PromptKeys:
        prefix, read = self._read(prompts)
        if self.feature_layers:
            return PromptKeys(read, prefix, self._read([""])[0])
        return PromptKeys(read[:, :0, :0], prefix, self._read([""])[0] if sampling.guidance else None)

    def denoise(self, latents: Tensor, times: Tensor, prefixes: Sequence[Prefix]) -> tuple[Tensor, list[Tensor]]:
        """Predict the images of latents [R, T, D] at times [R]; each prefix is for an equal part of the rows.

        Returns [R, T, D] in single precision and hidden states [R, T, dim] after every layer.
        """
        x = self.patch_proj(latents) + (self.rows + self.columns).flatten(0, 1)
        modulations, attending, layers = self.modulation(times), Grid(None, prefixes), []
        for layer, block in enumerate(self.transformer.blocks):
            assert isinstance(block, Block)
            x = modulated(block, x, layer, attending, modulations[layer])
            layers.append(x)
        read = self.norm(x)
        return (self.head(read) + self.refine(torch.cat([read, latents], -1))).float(), layers

    def predict(
        self, latents: Tensor, levels: Levels, step: int, condition: PromptKeys, sampling: FlowSampling, cost: Cost
    ) -> Prediction:
        time, prefixes = levels.times[step], condition.prefixes
        branches = len(prefixes)
        rows = latents.repeat(branches, 1, 1)
        cost.count_pass(len(rows), self.num_tokens)
        images, layers = self.denoise(rows, torch.full_like(rows[:, 0, 0], time), prefixes)
        clean, *unconditional = images.chunk(branches)
        guided = guide(clean, unconditional[0], sampling.guidance) if unconditional else clean
        features = None
        if self.feature_layers:
            features = self._features(condition.prompt, images, layers, torch.full_like(clean[:, :1, 0], time))
        return Prediction(guided, (latents - (1 - time) * guided) / time, features)

    def _features(self, prompt: Tensor, images: Tensor, layers: Sequence[Tensor], times: Tensor) -> DecoderFeatures:
        """Features from a pass with each prompt, then one without any: [2 R, T, ...].

        In the place of log-probabilities stands how far the image with the prompt is from that without, in that of the
        entropy the time.
        """
        hidden = torch.cat([layers[depth - 1] for depth in self.feature_layers], -1).chunk(2)
        clean, bare = images.chunk(2)
        moved = (clean - bare).square().mean(-1)
        return DecoderFeatures(
            prompt=prompt,
            embeddings=self.patch_proj(clean),
            hidden=hidden[0],
            unconditional_hidden=hidden[1],
            log_probs=torch.zeros_like(moved),
            unconditional_log_probs=-moved,
            entropy=times.expand_as(moved),
            undecided=torch.zeros_like(moved, dtype=torch.bool),
        )

    def _trained_times(self, uniform: Tensor) -> Tensor:
        """Times of the logit-normal distribution from uniform numbers [B], its quantiles."""
        normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)
        return (self.time_mean + self.time_std * normal).sigmoid()

    def _token_errors(self, prompts: Sequence[str], tokens: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Mean squared errors of the velocity of the tokens of images [B, T, D] at times [B], [B, T]."""
        t = times[:, None, None]
        guess, _ = self.denoise((1 - t) * tokens + t * noise, times, [self._read(prompts)[0]])
        return ((guess - tokens) / t.clamp(min=_LEAST_TIME)).square().mean(2)

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """The flow loss in the place of a likelihood: the mean squared error of the velocity of images [B, T, D]."""
        times = self._trained_times(uniform_rows(len(tokens), device=tokens.device))
        return self._token_errors(prompts, tokens, times, torch.randn_like(tokens)).mean()

    def _bound(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """The part of each token in the estimates of `log_probs`, [B, T]."""
        noise = GaussianNoise.draw(seeds, _ESTIMATES, self.latent_shape(FlowSampling(_ESTIMATES))).to(tokens.device)
        places = (torch.arange(_ESTIMATES, device=tokens.device) + noise.choice) / _ESTIMATES
        times = [self._trained_times(place) for place in places.unbind(1)]
        errors = [self._token_errors(prompts, tokens, time, noise.initial) for time in times]
        return -0.5 * tokens.shape[2] * torch.stack(errors).mean(0)

    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """Estimates of the bound that stands for log p in Diffusion-DPO (arXiv 2311.12908, equation 14), nats, [B].

        That is minus half the squared error of the velocity, at `_ESTIMATES` times an image, each from its own part of
        those that are trained. Times and noise come from the seeds.
        """
        return self._bound(prompts, tokens, seeds).sum(1)

    @torch.no_grad()
    def confidence(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures | None, cost: Cost
    ) -> Tensor:
        """The part of each token in `log_probs`, with the same noise for all images; see `Decoder`."""
        cost.count_pass(_ESTIMATES * len(prompts), self.num_tokens)
        return self._bound(prompts, tokens, [0] * len(prompts))

    @torch.no_grad()
    def features(self, prompts: Sequence[str], tokens: Tensor, time: Tensor | None = None) -> DecoderFeatures:
        """Features of images [B, T, D] with noise of a time [B], by default of the last step; see `TokenDecoder`."""
        copies, device = len(prompts) // len(tokens), tokens.device
        times = torch.full((len(tokens),), _LEAST_TIME, device=device) if time is None else time
        t = times[:, None, None]
        latents = (1 - t) * tokens + t * torch.randn_like(tokens)
        prefix, read = self._read(prompts)
        rows = torch.arange(len(tokens), device=device).repeat_interleave(copies).repeat(2)
        images, layers = self.denoise(latents[rows], times[rows], [prefix, self._read([""])[0]])
        return self._features(read, images, layers, times[rows[: len(prompts)], None])

    def training_features(
        self, batch: Mapping[str, Any], last_step: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        """Features of images with noise of a time each; see `TokenDecoder`.

        An image and its latents on the way are, for an exact flow with stochastic steps, what an image and itself with
        noise are. So no latents are stored. Times from before the first unverified step are not drawn.
        """
        rows, device = len(batch["tokens"]), batch["tokens"].device
        if fraction is not None:
            left = torch.full((rows,), 1 - fraction, device=device)
        else:
            left = uniform_rows(rows, device=device) * (uniform_rows(rows, device=device) >= last_step)
        times = _SHIFT * left / (1 + (_SHIFT - 1) * left)
        if fraction is None and "trajectory" in batch:
            first = batch["first_unverified"][:: len(batch["prompt"]) // rows].long()
            times = times * batch["trajectory"]["times"].gather(1, first[:, None]).squeeze(1)
        return self.features(batch["prompt"], batch["tokens"], times.clamp(_LEAST_TIME, 1))
