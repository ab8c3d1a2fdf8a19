"""Mask-token decoding (Show-o, arXiv 2408.12528): a step draws all unknown tokens and fixes the surest of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Cost, Frames, Request, Values
from lightning_modules.backbone.features import STATISTICS, DecoderFeatures
from lightning_modules.backbone.image_tokenizer import upsample_patches
from lightning_modules.backbone.mask_network import MaskNetwork
from lightning_modules.backbone.mask_sampling import (
    MaskSampling,
    SeededNoise,
    least_confident,
    masked_after,
    masked_again_log_probs,
)
from lightning_modules.backbone.mask_state import MaskProposal, MaskState
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.cache_key import key_of
from lightning_modules.ranks import uniform_rows

_RANDOM_STEPS = 16  # of images that were not decoded
# Of B grids with k candidates: unknown before, bool [B, n], undecided after, bool [B, k, n], `MaskState.statistics`.
_Known = tuple[Tensor, Tensor, Tensor]


class MaskTokenDecoder(MaskNetwork):
    """Prompts in, image tokens out, a set of positions a step; see `MaskNetwork` for the arguments."""

    sampling_type = MaskSampling
    max_mask_ratio = 1.0  # scales the masked fraction of images in pre-training (`MaskWarmup`)
    # `grid_pass`, compiled. It belongs to the class: copies of an object would run with its weights.
    compiled_pass: ClassVar[Callable[..., list[Tensor]]]

    def steps(self, sampling: MaskSampling) -> int:
        return sampling.steps

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood of masked tokens of images [B, n], nats each; see `TokenDecoder`.

        Of each image a fraction cos(pi t / 2) is masked, t uniform in [0, 1], and one token at least.
        """
        batch, length = tokens.shape
        device, dtype = tokens.device, torch.float32  # in bfloat16 many numbers would be equal
        ratio = self.max_mask_ratio * torch.cos(torch.rand(batch, 1, device=device, dtype=dtype) * math.pi / 2)
        order = torch.rand(batch, length, device=device, dtype=dtype).argsort(1).argsort(1)
        masked = order < (ratio * length).round().clamp(min=1)
        return -self.token_log_probs(self.encode_prompts(prompts), tokens, masked).sum() / masked.sum()

    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """Estimates by `estimate`, each image masked by its seed; see `TokenDecoder`."""
        estimate, length = self.estimate, tokens.shape[1]
        masked = estimate.masks(seeds, length).to(tokens.device)
        texts = list(dict.fromkeys(prompts))  # each is encoded once
        rows = torch.tensor([texts.index(text) for text in prompts], device=tokens.device).repeat(estimate.n_masks)
        prefix, repeated = self.encode_prompts(texts).select(rows), tokens.repeat(estimate.n_masks, 1)
        total = self.token_log_probs(prefix, repeated, masked.flatten(0, 1), estimate.as_trained).sum(1)
        total = total.view(masked.shape[:2])
        return (total if estimate.as_trained else total * length / masked.sum(2)).mean(0)

    @property
    def likelihood_key(self) -> Any:
        return key_of(self.estimate)

    def policy_log_probs(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        sampling: MaskSampling,
        trajectory: Trajectory | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Of the codes that were fixed at each step, given those before; which ones is taken as given.

        With `sampling.score_remasked` also that the others were masked again; see `masked_again_log_probs`.
        """
        assert trajectory is not None
        prefixes = [self.encode_prompts(prompts), *([self.encode_prompts([""])] if sampling.guidance else [])]
        branches, found = len(prefixes), []
        for step in range(sampling.steps)[:steps]:
            unknown = (trajectory.fixed_at >= step).repeat(branches, 1)
            hidden = self.image_hidden(tokens.repeat(branches, 1), unknown, prefixes)
            fixed = (trajectory.fixed_at == step).flatten()
            scored = unknown[: len(tokens)].flatten() if sampling.score_remasked else fixed
            positions = scored.nonzero().squeeze(1)
            log_p = self.guided_logits(hidden.chunk(branches), sampling.guidance, positions).log_softmax(-1)
            drawn, images = log_p.gather(1, tokens.flatten()[positions, None]).squeeze(1), positions // tokens.shape[1]
            if sampling.score_remasked:
                assert trajectory.cuts is not None
                again, cut = ~fixed[positions], trajectory.cuts[images, step]
                masked = masked_again_log_probs(log_p[again], cut[again], sampling.temperature_at(step))
                drawn = drawn.index_put((again,), masked)
            found.append(drawn.new_zeros(len(tokens)).index_add(0, images, drawn))
        return torch.stack(found, 1)

    def noise(self, seeds: Sequence[int], k: int, sampling: MaskSampling) -> SeededNoise:
        return SeededNoise.draw(seeds, k, sampling.steps, self.num_tokens)

    @torch.no_grad()
    def begin(self, request: Request, sampling: MaskSampling, k: int = 1) -> MaskState:
        prompts, device = request.prompts, self.embed.weight.device
        prefix, prompt_features = self.encode_with_features(prompts)
        unconditional = bool(sampling.guidance or self.feature_layers)
        tokens, fixed = request.initial(self.num_tokens, device)
        return MaskState(
            tokens=tokens,
            step=0,
            noise=self.noise(request.seeds, k, sampling).to(device),
            prompt=prompt_features,
            features=None,
            log_probs=torch.zeros(len(prompts), sampling.steps, device=device),
            cost=Cost(),
            unknown=~fixed,
            sampling=sampling,
            temperature=torch.ones(len(prompts), 1, device=device),
            prefixes=[prefix, *([self.encode_prompts([""])] if unconditional else [])],
        )

    def forward_pass(self, state: MaskState) -> tuple[list[Tensor], list[Tensor]]:
        """One forward pass: hidden states for features and, normalised, those for logits, [B, n, dim] a prefix."""
        branches = len(state.prefixes)
        tokens, unknown = state.tokens.repeat(branches, 1), state.unknown.repeat(branches, 1)
        state.cost.count_pass(*tokens.shape)
        run = MaskTokenDecoder.compiled_pass if self.compiled else MaskTokenDecoder.grid_pass
        layers = run(self, tokens, unknown, state.prefixes)
        return layers, list(self.norm(layers[-1][:, 1:-1]).chunk(branches))

    @torch.no_grad()
    def propose(self, state: MaskState, k: int, distinct: bool = False) -> MaskProposal:
        """k whole grids as candidates, which are never `distinct` (ValueError); see `Decoder`."""
        if distinct:
            raise ValueError("distinct candidates are tokens; a mask-token decoder draws whole grids")
        layers, branches = self.forward_pass(state)
        positions = state.unknown.flatten().nonzero().squeeze(1)
        code_probs = self.guided_logits(branches, state.sampling.guidance, positions).softmax(-1)
        drawn = state.noise.codes(state.step, positions, code_probs, k)
        tokens = state.tokens.flatten()[:, None].repeat(1, k)
        tokens[positions] = drawn
        probs = torch.ones_like(tokens, dtype=code_probs.dtype)
        probs[positions] = code_probs.gather(1, drawn)
        tokens, probs = (x.unflatten(0, state.tokens.shape).transpose(1, 2) for x in (tokens, probs))  # [B, k, n]
        masked, cut = least_confident(
            probs.flatten(0, 1),
            state.unknown.repeat_interleave(k, 0),
            masked_after(state.step, state.steps, state.unknown).repeat_interleave(k),
            (state.temperature * state.sampling.temperature_at(state.step)).repeat_interleave(k, 0),
            state.noise.confidence(state.step, k).flatten(0, 1),
        )
        masked, cut = masked.unflatten(0, (-1, k)), cut.unflatten(0, (-1, k))
        is_last, features = state.step + 1 == state.steps, None
        undecided = masked & (not is_last)
        if self.feature_layers:
            known = state.unknown, undecided, state.statistics
            features = self._features(state.prompt, layers, branches, tokens, known)
        log_probs = probs.log().masked_fill(undecided, 0).sum(-1)
        if state.sampling.score_remasked:
            images, candidates, places = undecided.nonzero().unbind(1)
            row = (state.unknown.flatten().cumsum(0) - 1)[images * tokens.shape[2] + places]
            log_p = code_probs[row].log()
            again = masked_again_log_probs(log_p, cut[images, candidates], state.sampling.temperature_at(state.step))
            log_probs = log_probs.index_put((images, candidates), again, accumulate=True)
        return MaskProposal(tokens, log_probs, features, probs, masked, cut, is_last)

    def _features(
        self, prompt: Tensor, layers: Sequence[Tensor], branches: Sequence[Tensor], tokens: Tensor, known: _Known
    ) -> DecoderFeatures:
        """Features of k grids [B, k, n] from the pass that they were drawn from (`forward_pass`)."""
        unknown, undecided, statistics = known
        shape = tokens.transpose(1, 2).shape  # [B, n, k]
        positions = unknown.flatten().nonzero().squeeze(1)
        log_p, unconditional = (self.code_head(part.flatten(0, 1)[positions]).log_softmax(-1) for part in branches)
        drawn = tokens.transpose(1, 2).flatten(0, 1)[positions]
        own = statistics[:2].flatten(1)[..., None].repeat(1, 1, shape[2])
        own[:, positions] = torch.stack([log.gather(1, drawn) for log in (log_p, unconditional)])
        entropy = statistics[2].flatten().clone()
        entropy[positions] = -(log_p.exp() * log_p).sum(-1)
        log_probs, unconditional_log_probs = own.unflatten(1, shape[:2]).transpose(2, 3).flatten(2, 3)
        embeddings = self.embed(tokens + self.vocabulary.first_code)
        if self.visual:
            embeddings = embeddings + self.code_features()[tokens]
        hidden = torch.cat([layers[depth - 1][:, 1:-1] for depth in self.feature_layers], -1).chunk(2)
        return DecoderFeatures(
            prompt=prompt,
            embeddings=embeddings.flatten(1, 2),
            hidden=hidden[0],
            unconditional_hidden=hidden[1],
            log_probs=log_probs,
            unconditional_log_probs=unconditional_log_probs,
            entropy=entropy.view(shape[:2]),
            undecided=undecided.flatten(1, 2),
        )

    @torch.no_grad()
    def features(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        unknown: Tensor | None = None,
        undecided: Tensor | None = None,
        statistics: Tensor | None = None,
    ) -> DecoderFeatures:
        """Features of grids [B, n], by default of finished images, from a pass with each prompt and one without any.

        Each grid has as many prompts, which are neighbours. The others are of the pass that its previews come from:
        tokens `unknown` before and `undecided` after it, bool [B, n], and `MaskState.statistics` before it, [3, B, n].
        """
        copies = len(prompts) // len(tokens)
        nothing = torch.zeros_like(tokens, dtype=torch.bool)
        unknown, undecided = (nothing if mask is None else mask for mask in (unknown, undecided))
        statistics = torch.zeros(3, *tokens.shape, device=tokens.device) if statistics is None else statistics
        bare = self.grid_pass(tokens, unknown, [self.encode_prompts([""])])
        tokens, unknown, undecided = (x.repeat_interleave(copies, 0) for x in (tokens, unknown, undecided))
        prefix, read = self.encode_with_features(prompts)
        full = self.grid_pass(tokens, unknown, [prefix])
        layers = [torch.cat([h, b.repeat_interleave(copies, 0)]) for h, b in zip(full, bare, strict=True)]
        branches = self.norm(layers[-1][:, 1:-1]).chunk(2)
        known = unknown, undecided[:, None], statistics.repeat_interleave(copies, 1)
        return self._features(read, layers, branches, tokens[:, None], known)

    def training_features(
        self, batch: Mapping[str, Any], last_step: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        """Features of grids at one step each, from a pass with what was unknown then; see `TokenDecoder`."""
        tokens, device = batch["tokens"], batch["tokens"].device
        if "trajectory" in batch:
            trajectory = Trajectory(**batch["trajectory"])
            statistics = torch.stack([batch["features"][name] for name in STATISTICS])
        else:
            trajectory = Trajectory.in_random_order(tokens, _RANDOM_STEPS, uniform_rows(*tokens.shape, device=device))
            statistics = torch.zeros(3, *tokens.shape, device=device)
        steps = trajectory.previews.shape[1]
        first = batch["first_unverified"][:: len(batch["prompt"]) // len(tokens)]
        if fraction is None:
            step = first + (uniform_rows(len(tokens), device=device) * (steps + 1 - first)).long()
            # Best-of-n and reflection value finished images.
            step = torch.where(uniform_rows(len(tokens), device=device) < last_step, steps - 1, step)
            # A finished image may come from anywhere, and of one that was decoded again some tokens do.
            known = 2 * uniform_rows(len(tokens), 1, device=device) * (step < steps)[:, None]
            statistics = statistics * (uniform_rows(*tokens.shape, device=device) < known)
        else:
            step = torch.full_like(first, max(0, round(fraction * steps) - 1))
        return self.features(batch["prompt"], *trajectory.at(step), statistics)

    def preview(self, state: MaskState, proposal: MaskProposal | None = None) -> Tensor:
        return self.pixels(state.tokens if proposal is None else proposal.tokens.flatten(0, 1), state.cost)

    def frames(self, tokens: Tensor, trajectory: Trajectory | None, most: int) -> Frames | None:
        if trajectory is None:
            return None
        grids = torch.cat([trajectory.previews[0, :-1], tokens[None]])  # reflection replaces the last one
        steps = sorted({len(grids) * (i + 1) // most - 1 for i in range(most)} - {-1})
        return Frames("previews", grids[steps], None, [f"step {i + 1}" for i in steps])

    @torch.no_grad()
    def confidence(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures | None, cost: Cost
    ) -> Tensor:
        """Log-probability given the three quarters of the image that do not share its place in squares of 2 x 2."""
        prefix, index = self.encode_prompts(prompts), torch.arange(self.image_tokenizer.grid)
        place = (2 * (index[:, None] % 2) + index % 2).flatten().to(tokens.device)
        cost.count_pass(4 * len(prompts), self.num_tokens)
        masks = [(place == i).expand_as(tokens) for i in range(4)]
        return torch.stack([self.token_log_probs(prefix, tokens, masked) for masked in masks]).sum(0)

    def value_gains(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures, value: Values, patches: int, cost: Cost
    ) -> Tensor:
        """The value minus that of the same grid in which the patch is undecided, from a pass a patch; see `Decoder`."""
        grid = self.image_tokenizer.grid
        without = []
        for patch in torch.eye(patches**2, dtype=torch.bool, device=tokens.device):
            masked = upsample_patches(patch.view(1, patches, -1), grid).expand_as(tokens)
            seen = self.features(prompts, tokens, masked, masked, features.statistics)
            cost.count_pass(2 * len(prompts), self.num_tokens)
            without.append(value(seen, [self.num_tokens]).exp())
        gains = value(features, [self.num_tokens]).exp() - torch.cat(without, 1)
        cost.verifier_calls += gains.numel() + len(prompts)
        return upsample_patches(gains.unflatten(1, (patches, patches)), grid)

    def commit(self, state: MaskState, proposal: MaskProposal, choice: Tensor) -> None:
        """Take candidate `choice` [B] of each row; after the last step nothing is masked."""
        rows = torch.arange(len(choice), device=choice.device)
        state.tokens = proposal.tokens[rows, choice]
        state.log_probs[:, state.step] = proposal.log_probs[rows, choice]
        state.step += 1
        state.features = proposal.features and proposal.features.pick(choice)
        state.unknown = proposal.masked[rows, choice] & (not proposal.is_last)
        state.grids.append((state.tokens, state.unknown))
        state.cuts.append(proposal.cut[rows, choice])


MaskTokenDecoder.compiled_pass = torch.compile(MaskTokenDecoder.grid_pass, mode="reduce-overhead")
