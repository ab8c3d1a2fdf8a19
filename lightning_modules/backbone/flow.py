"""A flow decoder: a mask-token network whose tokens are hidden by noise instead of a mask (flow matching).

Tokens are vectors of codes. So the best guess at an image, the mean of its posterior, is a mean of code vectors, and a
pass has to say only how probable each code is (arXiv 2211.15089, where it is called score interpolation).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbone.decoder import Cost
from lightning_modules.backbone.denoising import DenoisingDecoder
from lightning_modules.backbone.denoising_sampling import FlowSampling, GaussianNoise, Levels
from lightning_modules.backbone.denoising_state import LatentTrajectory, Prediction
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.image_tokenizer import CodeVectors
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.loading import CheckpointReader, copy_from, own_state
from lightning_modules.backbone.mask_attention import Prefix
from lightning_modules.backbone.mask_network import MaskNetwork
from lightning_modules.backbone.text import DelimitedTokenizer
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.ranks import uniform_rows

_FREQUENCIES = 16  # of the embedding of time
_OWN = ("stem", "time_proj")  # layers that a mask-token decoder lacks
_LEAST_TIME = 0.05  # below this all codes that differ to the eye are known
_LOOK_ALIKE = 2.0  # distance of vectors of codes that differ no more than two of the background
_ESTIMATES = 4  # times an image, for `log_probs`
# Verifiers learn at the times of these steps. Finished images are judged from the last pass. Its time is not near 0,
# where the network was not trained, and where what it says of an image no longer depends on the prompt.
SCHEDULE = FlowSampling(steps=16, shift=8.0)
_LAST_TIME = SCHEDULE.times[-2]


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


@dataclass
class Pass:
    """What a forward pass over R noisy images says, once for each of P prefixes."""

    logits: list[Tensor]  # of the code of each token, single precision, P of [R, T, C]
    layers: list[Tensor]  # hidden states after every layer, [P R, T, dim]


class FlowDecoder(DenoisingDecoder, MaskNetwork):
    """Reads a prompt once, and the noisy tokens of an image at every step.

    A noisy vector x = (1 - t) v + t noise leaves some codes v possible: by Bayes' rule p(code | x) is proportional to
    exp(-|x - (1 - t) v|² / 2 t²), times what the other tokens say of it, which the network predicts. It reads for each
    token the mean embedding of the codes that are possible, and the more of the mask's the less is known: with the
    weights of a mask-token decoder it begins as one. It also reads the noisy vectors of a neighbourhood, and the time.

    Args:
        image_tokenizer: whose code vectors are denoised.
        text_tokenizer, max_text, transformer, rotary_dims, feature_layers: see `MaskNetwork`.
        time_mean, time_std: of log(t / (1 - t)), t being the times that are trained (logit-normal, arXiv 2403.03206).
            Vectors of many numbers stand out of much noise, so that most is decided at high times.
    """

    trajectory_type = LatentTrajectory
    sampling_type = FlowSampling
    image_tokenizer: CodeVectors

    def __init__(
        self,
        image_tokenizer: CodeVectors,
        text_tokenizer: DelimitedTokenizer,
        max_text: int,
        transformer: TransformerConfig,
        rotary_dims: int,
        feature_layers: Sequence[int] = (),
        time_mean: float = 2.6,
        time_std: float = 0.9,
    ) -> None:
        super().__init__(
            image_tokenizer, text_tokenizer, max_text, transformer, rotary_dims, feature_layers, visual=True
        )
        self.time_mean, self.time_std = time_mean, time_std
        size, dim = image_tokenizer.code_vectors.shape[1], transformer.dim
        # What is known of a token by itself is little for long: an object is seen in a neighbourhood.
        self.stem = nn.Sequential(
            nn.Conv2d(size, 2 * dim, 3, padding=1), nn.GELU(), nn.Conv2d(2 * dim, dim, 3, padding=1, bias=False)
        )
        self.time_proj = Linear(2 * _FREQUENCIES, dim, bias=False)
        for name in ("stem.2", "time_proj"):  # at first it is the mask-token decoder
            nn.init.zeros_(self.get_parameter(f"{name}.weight"))

    def cache_key(self) -> dict[str, Any]:
        """See `TokenDecoder`; the times that are trained decide `confidence`, and so what reflection does."""
        return super().cache_key() | {"times": [self.time_mean, self.time_std]}

    def warm_start(self, name: str, stored: CheckpointReader) -> None:
        """Begin training as a mask-token decoder of the same sizes.

        Raises ValueError if a tensor is missing or of another shape, with it and the `name` of the weights.
        """
        targets = {key: [weight] for key, weight in own_state(self).items() if not key.startswith(_OWN)}
        copy_from(stored, targets, f"decoder.start={name!r}")

    def decoding_bytes(self, images: int, size: int) -> float:
        """Estimate what a mask-token decoder takes, the probabilities of codes, and all latents of 32 steps."""
        vector = self.image_tokenizer.code_vectors.shape[1]
        codes = 4 * self.num_tokens * self.vocabulary.codes * 4
        return super().decoding_bytes(images, size) + images * (codes + 32 * self.num_tokens * vector * (4 + 2))

    def latent_shape(self, sampling: FlowSampling) -> tuple[int, int]:
        return self.num_tokens, self.image_tokenizer.code_vectors.shape[1]

    def levels(self, sampling: FlowSampling) -> Levels:
        return Levels.of_flow(sampling.times)

    def encode(self, prompts: Sequence[str], sampling: FlowSampling) -> PromptKeys:
        prefix, read = self.encode_with_features(prompts)
        needed = self.feature_layers or sampling.guidance
        return PromptKeys(read, prefix, self.encode_prompts([""]) if needed else None)

    def code_table(self) -> Tensor:
        """Embeddings of all codes, [C, dim]."""
        return self.embed.weight[self.vocabulary.first_code : self.vocabulary.mask] + self.code_features()

    def code_log_likelihoods(self, latents: Tensor, times: Tensor) -> Tensor:
        """log p(latent | code) of latents [R, T, D] at times [R], up to a constant of each token, [R, T, C]."""
        with torch.autocast(latents.device.type, enabled=False):  # look-alikes differ by less than bfloat16 resolves
            vectors, t = self.image_tokenizer.code_vectors.float(), times.float()[:, None, None]
            kept = 1 - t
            return (kept * (latents.float() @ vectors.T) - kept**2 * vectors.square().sum(1) / 2) / t**2

    def _grid_of(self, tokens: Tensor) -> Tensor:
        """Tokens [R, T, D] -> [R, D, grid, grid]."""
        return tokens.transpose(1, 2).unflatten(2, (self.image_tokenizer.grid, -1))

    def denoise(self, latents: Tensor, times: Tensor, likelihoods: Tensor, prefixes: Sequence[Prefix]) -> Pass:
        """A pass over latents [R, T, D] at times [R], once for each prefix.

        The likelihoods [R, T, C] are those of `code_log_likelihoods`.
        """
        known = likelihoods.log_softmax(-1)
        probs = known.exp()
        certain = 1 + (probs * known).sum(-1, keepdim=True) / math.log(self.vocabulary.codes)
        mask = self.embed.weight[self.vocabulary.mask]
        x = mask + certain * (probs @ self.code_table() - mask) + self.places
        angles = times[:, None] * torch.logspace(0, 2, _FREQUENCIES, device=times.device)
        x = (
            x
            + self.stem(self._grid_of(latents)).flatten(2).transpose(1, 2)
            + self.time_proj(torch.cat([angles.cos(), angles.sin()], -1))[:, None]
        )
        ends = self.embed.weight[[self.vocabulary.soi, self.vocabulary.eoi]].expand(len(x), -1, -1)
        x = torch.cat([ends[:, :1], x, ends[:, 1:]], 1).repeat(len(prefixes), 1, 1)
        attending = self.attending(prefixes)
        layers = self.transformer.run(x, attending) if self.feature_layers else [self.transformer.last(x, attending)]
        layers = [layer[:, 1:-1] for layer in layers]
        return Pass([self.code_head(part) for part in self.norm(layers[-1]).chunk(len(prefixes))], layers)

    def predict(
        self, latents: Tensor, levels: Levels, step: int, condition: PromptKeys, sampling: FlowSampling, cost: Cost
    ) -> Prediction:
        time, prefixes = levels.times[step], condition.prefixes
        cost.count_pass(len(prefixes) * len(latents), self.num_tokens)
        times = torch.full_like(latents[:, 0, 0], time)
        likelihoods = self.code_log_likelihoods(latents, times)
        made = self.denoise(latents, times, likelihoods, prefixes)
        context = made.logits[0]
        if sampling.guidance:
            context = torch.lerp(made.logits[1], context, 1 + sampling.guidance)
        probs = (context / sampling.temperature + likelihoods).softmax(-1)
        clean = probs @ self.image_tokenizer.code_vectors
        features = self._features(condition.prompt, made, likelihoods, probs) if self.feature_layers else None
        return Prediction(clean, (latents - (1 - time) * clean) / time, features)

    def _features(self, prompt: Tensor, made: Pass, likelihoods: Tensor, probs: Tensor) -> DecoderFeatures:
        """Features from a pass with each prompt and without, of images that consist of codes by `probs` [R, T, C].

        Log-probabilities are those of the codes that are likeliest by then.
        """
        log_p, unconditional = ((logits + likelihoods).log_softmax(-1) for logits in made.logits)
        codes = probs.argmax(-1, keepdim=True)
        hidden = torch.cat([made.layers[depth - 1] for depth in self.feature_layers], -1).chunk(2)
        return DecoderFeatures(
            prompt=prompt,
            embeddings=probs @ self.code_table(),
            hidden=hidden[0],
            unconditional_hidden=hidden[1],
            log_probs=log_p.gather(-1, codes).squeeze(-1),
            unconditional_log_probs=unconditional.gather(-1, codes).squeeze(-1),
            entropy=-(log_p.exp() * log_p).sum(-1),
            undecided=torch.zeros(codes.shape[:2], dtype=torch.bool, device=codes.device),
        )

    def _trained_times(self, uniform: Tensor) -> Tensor:
        """Times of the logit-normal distribution from uniform numbers [B], its quantiles."""
        normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)
        return (self.time_mean + self.time_std * normal).sigmoid().clamp(min=_LEAST_TIME)

    def _posterior(self, prompts: Sequence[str], tokens: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """log p(code | noisy image) of images [B, T, D] at times [B], [B, T, C]."""
        t = times[:, None, None]
        latents = (1 - t) * tokens + t * noise
        likelihoods = self.code_log_likelihoods(latents, times)
        made = self.denoise(latents, times, likelihoods, [self.encode_prompts(prompts)])
        return (made.logits[0] + likelihoods).log_softmax(-1)

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """The cross-entropy of the codes of images [B, T, D] given the images with noise, nats a token.

        Codes count as right by how alike they look: most of an image is a background of a few codes that hardly differ,
        and which of them it is would drown the rest.
        """
        times = self._trained_times(uniform_rows(len(tokens), device=tokens.device))
        log_p = self._posterior(prompts, tokens, times, torch.randn_like(tokens))
        vectors = self.image_tokenizer.code_vectors
        likeness = -torch.cdist(vectors, vectors).square() / (2 * _LOOK_ALIKE**2)
        return -(log_p + likeness[self.image_tokenizer.codes(tokens)]).logsumexp(-1).mean()

    def _token_log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """The part of each token in the estimates of `log_probs`, [B, T]."""
        tokenizer = self.image_tokenizer
        tokens = tokenizer.code_vectors[tokenizer.codes(tokens)]
        noise = GaussianNoise.draw(seeds, _ESTIMATES, self.latent_shape(FlowSampling(_ESTIMATES))).to(tokens.device)
        strata = (torch.arange(_ESTIMATES, device=tokens.device) + noise.choice) / _ESTIMATES
        found = []
        for times in map(self._trained_times, strata.unbind(1)):
            clean = self._posterior(prompts, tokens, times, noise.initial).exp() @ tokenizer.code_vectors
            logit = times.logit()
            density = torch.distributions.Normal(self.time_mean, self.time_std).log_prob(logit)
            weight = (-2 * logit - density).exp()  # signal-to-noise ratio ((1 - t) / t)², by the density of times
            found.append(-weight[:, None] * (clean - tokens).square().sum(2))
        return torch.stack(found).mean(0)

    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """Estimates of log p(image | prompt), nats, [B], at `_ESTIMATES` times an image; see `TokenDecoder`.

        For images of codes it is minus half the squared error of the best guess, integrated over the signal-to-noise
        ratio (arXiv 2302.03792, equation 9). Each time is from its own part of those that are trained. Times and noise
        come from the seeds.
        """
        return self._token_log_probs(prompts, tokens, seeds).sum(1)

    @property
    def likelihood_key(self) -> Any:
        return _ESTIMATES

    @torch.no_grad()
    def confidence(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures | None, cost: Cost
    ) -> Tensor:
        """The part of each token in `log_probs`, with the same noise for all images; see `Decoder`."""
        cost.count_pass(_ESTIMATES * len(prompts), self.num_tokens)
        return self._token_log_probs(prompts, tokens, [0] * len(prompts))

    @torch.no_grad()
    def features(self, prompts: Sequence[str], tokens: Tensor, time: Tensor | None = None) -> DecoderFeatures:
        """Features of images [B, T, D] with noise of a time [B], by default of the last pass; see `TokenDecoder`."""
        copies, device = len(prompts) // len(tokens), tokens.device
        times = torch.full((len(tokens),), _LAST_TIME, device=device) if time is None else time
        t = times[:, None, None]
        latents = ((1 - t) * tokens + t * torch.randn_like(tokens)).repeat_interleave(copies, 0)
        times = times.repeat_interleave(copies)
        likelihoods = self.code_log_likelihoods(latents, times)
        prefix, read = self.encode_with_features(prompts)
        made = self.denoise(latents, times, likelihoods, [prefix, self.encode_prompts([""])])
        return self._features(read, made, likelihoods, (made.logits[0] + likelihoods).softmax(-1))

    def training_features(
        self, batch: Mapping[str, Any], last_step: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        """Features of images with noise of a time each; see `TokenDecoder`.

        An image and its latents on the way are, for an exact flow with stochastic steps, what an image and itself with
        noise are. So no latents are stored. Times from before the first unverified step are not drawn, nor those after
        the last pass.
        """
        rows, device = len(batch["tokens"]), batch["tokens"].device
        if fraction is not None:
            left = torch.full((rows,), 1 - fraction, device=device)
        else:
            left = uniform_rows(rows, device=device) * (uniform_rows(rows, device=device) >= last_step)
        times = SCHEDULE.shift * left / (1 + (SCHEDULE.shift - 1) * left)
        if fraction is None and "trajectory" in batch:
            first = batch["first_unverified"][:: len(batch["prompt"]) // rows].long()
            times = times * batch["trajectory"]["times"].gather(1, first[:, None]).squeeze(1)
        return self.features(batch["prompt"], batch["tokens"], times.clamp(_LAST_TIME, 1))
