"""Mask-token decoding (Show-o, arXiv 2408.12528): a prompt, then all image tokens at once, some of them masked.

A sequence is `t2i sot text eot soi image eoi`. Text is causal and does not see the image, so its keys and values are
computed once per prompt; soi, image and eoi see everything.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.backbone.decoder import Cost, Frames, Request, TokenDecoder, Values
from lightning_modules.backbone.features import STATISTICS, DecoderFeatures
from lightning_modules.backbone.image_tokenizer import ImageTokenizer, upsample_patches
from lightning_modules.backbone.loading import CheckpointReader, copy_from, fingerprint
from lightning_modules.backbone.mask_attention import Grid, Prefix, Rotary
from lightning_modules.backbone.mask_likelihood import MaskEstimate
from lightning_modules.backbone.mask_sampling import MaskSampling, SeededNoise, least_confident, masked_after
from lightning_modules.backbone.mask_state import MaskProposal, MaskState, Vocabulary
from lightning_modules.backbone.text import TextTokenizer
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.backbone.transformer import Transformer, TransformerConfig
from lightning_modules.cache_key import class_name, key_of
from lightning_modules.ranks import uniform_rows

_RANDOM_STEPS = 16  # of images that were not decoded


class MaskTokenDecoder(TokenDecoder):
    """Prompts in, image tokens out, a set of positions a step.

    Args:
        image_tokenizer: fixes the number of tokens and the codebook; turns tokens into pixels.
        text_tokenizer: turns prompts into ids.
        max_text: a prompt's block has one place more than this; longer prompts lose their end.
        transformer: sizes of the decoder.
        rotary_dims: dimensions of each head that carry the position.
        feature_layers: after which layers (1 = first) hidden states are read by verifiers; without any the decoder
            gives no features.
        estimate: of log p of whole images; the default is `MaskEstimate()`.
        visual: codes are embedded (and predicted) by what they look like as well, and tokens by their row and column.
            Show-o has neither; small decoders learn much faster with both.
        compiled: decoding's passes are compiled, on GPUs with CUDA graphs.
    """

    causal = False

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        max_text: int,
        transformer: TransformerConfig,
        rotary_dims: int,
        feature_layers: Sequence[int] = (),
        estimate: MaskEstimate | None = None,
        visual: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if not all(1 <= depth <= transformer.depth for depth in feature_layers):
            raise ValueError(f"feature_layers={list(feature_layers)} must lie in 1..{transformer.depth}")
        if not 0 < rotary_dims <= transformer.head_dim or rotary_dims % 2:
            raise ValueError(f"rotary_dims={rotary_dims} must be even and within the head's {transformer.head_dim}")
        self.image_tokenizer = image_tokenizer.eval().requires_grad_(False)
        self.text_tokenizer = text_tokenizer
        vocabulary = Vocabulary(
            text_tokenizer.size, text_tokenizer.end_of_text, image_tokenizer.codebook_size, max_text
        )
        self.vocabulary = vocabulary
        self.rotary_dims = rotary_dims
        self.feature_layers = tuple(feature_layers)
        self.estimate = estimate or MaskEstimate()
        if (n_masks := self.estimate.n_masks) > self.num_tokens:
            raise ValueError(f"decoder.estimate.n_masks={n_masks}, but an image has only {self.num_tokens} tokens")
        self.embed = nn.Embedding(vocabulary.total, transformer.dim)
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(transformer.dim)
        self.head = nn.Linear(transformer.dim, vocabulary.total)
        for weight in (self.embed.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.visual = visual
        self.compiled = compiled
        self.max_mask_ratio = 1.0
        if visual:
            self.code_proj = nn.Linear(image_tokenizer.code_vectors.shape[1], transformer.dim, bias=False)
            nn.init.normal_(self.code_proj.weight, std=0.05 * self.code_proj.in_features**-0.5)
            self.rows = nn.Parameter(torch.randn(image_tokenizer.grid, 1, transformer.dim) * 0.02)
            self.columns = nn.Parameter(torch.randn(1, image_tokenizer.grid, transformer.dim) * 0.02)

    def cache_key(self) -> dict[str, Any]:
        """Its weights, its sizes, its text, and the layers that verifiers read; `estimate` changes no image."""
        return {
            "class": class_name(self),
            "weights": fingerprint(self),
            "transformer": key_of(self.transformer.config),
            "rotary_dims": self.rotary_dims,
            "vocabulary": key_of(self.vocabulary),
            "text": self.text_tokenizer.cache_key(),
            "feature_layers": list(self.feature_layers),
        }

    def warm_start(self, name: str, stored: CheckpointReader) -> None:
        """Begin training with what a next-token decoder has learnt; Show-o begins with a language model's weights.

        What both have is taken over: the Transformer and its norm, what codes look like, rows and columns, words, and
        the part of each code that is its own. To have predicted the next token helps to fill gaps.

        Args:
            name: of the weights, for errors.
            stored: weights of a `NextTokenDecoder` with the same sizes, vocabulary and image tokenizer.

        Raises:
            ValueError: a tensor is missing or of another shape; the sentence names it.
        """
        ids = self.vocabulary
        codes, words = slice(ids.first_code, ids.mask), slice(ids.text)
        own = dict(self.named_parameters())
        alike = [key for key in own if not key.startswith(("image_tokenizer.", "embed.", "head."))]
        begin: dict[str, list[Tensor]] = {key: [own[key]] for key in alike}
        begin["codes"] = [self.embed.weight[codes], self.head.weight[codes]]
        begin["prompt_encoder.words.weight"] = [self.embed.weight[words]]
        copy_from(stored, begin, f"decoder.start={name!r}")

    @property
    def dim(self) -> int:
        return self.transformer.config.dim

    @property
    def max_words(self) -> int:
        """Text tokens of the longest prompt; see `Decoder`."""
        return self.vocabulary.max_text - 2

    def word_spans(self, prompt: str) -> list[tuple[int, int]]:
        return self.text_tokenizer.spans(prompt)

    def _rotary(self, start: int, length: int) -> Rotary:
        positions = torch.arange(start, start + length, device=self.embed.weight.device)
        return Rotary.at(positions, self.rotary_dims)

    def _sequence(self, tokens: Tensor, unknown: Tensor) -> Tensor:
        """Codes [R, n] and which are masked -> ids of soi, image and eoi, [R, n + 2]."""
        words = self.vocabulary
        ids = torch.where(unknown, words.mask, tokens + words.first_code)
        return F.pad(F.pad(ids, (1, 0), value=words.soi), (0, 1), value=words.eoi)

    def _blocks(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.vocabulary.block(text) for text in self.text_tokenizer.encode(prompts)]

    def encode(self, prompts: Sequence[str]) -> Prefix:
        """The keys and values of G prompts; the empty one is the unconditional one."""
        x, prefix = self._prompts(self._blocks(prompts))
        self.transformer.last(x, prefix)
        return prefix

    def _open(self, prompts: Sequence[str]) -> tuple[Prefix, Tensor]:
        """The keys and values of G prompts, and what verifiers read of them, [G, L, 2 dim]; [G, 0, 0] if none does."""
        if not self.feature_layers:
            return self.encode(prompts), self.embed.weight.new_zeros(len(prompts), 0, 0)
        blocks = self._blocks(prompts)
        prefix, hidden = self.prompt_pass(blocks)
        return prefix, self._read(blocks, hidden[max(self.feature_layers) - 1])

    def _read(self, blocks: Sequence[Sequence[int]], layer: Tensor) -> Tensor:
        """Each text token of G prompts by itself, and as a layer [G, P, dim] has it in the prompt: [G, L, 2 dim].

        Aligned on the left, zeros after the end: what is read does not depend on the other prompts.
        """
        read = layer.new_zeros(len(blocks), self.max_words, 2 * self.dim)
        for row, block in enumerate(blocks):
            words = self.embed(torch.tensor(block[2:-1], dtype=torch.int64, device=layer.device))
            places = slice(layer.shape[1] - len(block) + 2, layer.shape[1] - 1)
            both = [F.layer_norm(x, x.shape[-1:]) for x in (words, layer[row, places])]
            read[row, : len(words)] = torch.cat(both, -1)
        return read

    def prompt_pass(self, blocks: Sequence[Sequence[int]]) -> tuple[Prefix, list[Tensor]]:
        """Prompts `t2i sot text eot` -> their keys and values, and hidden states [G, P, dim] after every layer."""
        x, prefix = self._prompts(blocks)
        return prefix, self.transformer.run(x, prefix)

    def _prompts(self, blocks: Sequence[Sequence[int]]) -> tuple[Tensor, Prefix]:
        """What `prompt_pass` runs: embeddings, and how they attend."""
        length = max(map(len, blocks))
        device = self.embed.weight.device
        real = None
        if min(map(len, blocks)) < length:
            flags = [[False] * (length - len(block)) + [True] * len(block) for block in blocks]
            real = torch.tensor(flags, device=device)
        ids = torch.tensor([[self.vocabulary.text] * (length - len(block)) + list(block) for block in blocks])
        prefix = Prefix(self._rotary(self.vocabulary.max_text + 1 - length, length), real)
        return self.embed(ids.to(device)), prefix

    def grid_pass(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> list[Tensor]:
        """Hidden states of soi, image and eoi, [R, n + 2, dim], after every layer.

        Args:
            tokens: codes [R, n].
            unknown: which of them are masked, bool [R, n].
            prefixes: each has the prompts of an equal share of the rows.
        """
        return self.transformer.run(*self._grid(tokens, unknown, prefixes))

    def _grid(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> tuple[Tensor, Grid]:
        """What `grid_pass` runs: embeddings, and how they attend."""
        ids = self._sequence(tokens, unknown)
        rotary = self._rotary(self.vocabulary.max_text + 1, ids.shape[1])
        x = self.embed(ids)
        if self.visual:
            looks = self._looks()[tokens].masked_fill(unknown[..., None], 0)
            x = x + F.pad(looks + (self.rows + self.columns).flatten(0, 1), (0, 0, 1, 1))
        return x, Grid(rotary, prefixes)

    def _looks(self) -> Tensor:
        """What each code looks like, [C, dim]."""
        return self.code_proj(self.image_tokenizer.code_vectors)

    def code_logits(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> Tensor:
        """Logits of the image codes at every position, single precision [R, n, C]; see `grid_pass`."""
        return self._code_head(self._image_hidden(self.transformer.last(*self._grid(tokens, unknown, prefixes))))

    def _image_hidden(self, hidden: Tensor) -> Tensor:
        """The last layer's output for soi, image and eoi -> what the logits of the image are read from, [R, n, dim]."""
        return self.norm(hidden[:, 1:-1])

    def _code_head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., dim] -> logits of the image codes, single precision [..., C]."""
        codes = slice(self.vocabulary.first_code, self.vocabulary.mask)
        weight = self.head.weight[codes] + self._looks() if self.visual else self.head.weight[codes]
        return F.linear(hidden, weight, self.head.bias[codes]).float()

    def token_log_probs(self, prefix: Prefix, tokens: Tensor, masked: Tensor, as_trained: bool = False) -> Tensor:
        """log p(token | prompt, tokens that are not masked) where `masked`, else 0, [B, n]. Differentiable.

        Args:
            prefix: of B prompts.
            tokens: codes [B, n].
            masked: bool [B, n].
            as_trained: among all ids instead of the image codes, and of soi and eoi as well, [B, n + 2]: Show-o's own
                training never excludes these.
        """
        if not as_trained:
            log_p = self.code_logits(tokens, masked, [prefix]).log_softmax(-1)
            return log_p.gather(-1, tokens[..., None]).squeeze(-1) * masked
        log_p = self.head(self.norm(self.grid_pass(tokens, masked, [prefix])[-1])).float().log_softmax(-1)
        ids = self._sequence(tokens, torch.zeros_like(masked))
        return log_p.gather(-1, ids[..., None]).squeeze(-1) * F.pad(masked, (1, 1), value=True)

    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        """Estimates by `estimate`, each image masked by its seed; see `TokenDecoder`."""
        estimate, length = self.estimate, tokens.shape[1]
        masked = estimate.masks(seeds, length).to(tokens.device)
        texts = list(dict.fromkeys(prompts))  # each is encoded once
        rows = torch.tensor([texts.index(text) for text in prompts], device=tokens.device).repeat(estimate.n_masks)
        prefix, repeated = self.encode(texts).select(rows), tokens.repeat(estimate.n_masks, 1)
        total = self.token_log_probs(prefix, repeated, masked.flatten(0, 1), estimate.as_trained).sum(1)
        total = total.view(masked.shape[:2])
        if not estimate.as_trained:
            total = total * length / masked.sum(2)
        return total.mean(0)

    @property
    def likelihood_key(self) -> Any:
        return key_of(self.estimate)

    def policy_log_probs(
        self, prompts: Sequence[str], tokens: Tensor, sampling: MaskSampling, trajectory: Trajectory | None = None
    ) -> Tensor:
        """Of the codes that were fixed at each step, given those before; which ones is taken as given."""
        assert trajectory is not None
        prefixes = [self.encode(prompts), *([self.encode([""])] if sampling.guidance else [])]
        branches, steps = len(prefixes), []
        for step in range(sampling.steps):
            unknown = (trajectory.fixed_at >= step).repeat(branches, 1)
            hidden = self.transformer.last(*self._grid(tokens.repeat(branches, 1), unknown, prefixes))
            rows, columns = where = (trajectory.fixed_at == step).nonzero(as_tuple=True)
            flat = rows * tokens.shape[1] + columns
            logits = self.guided_logits(self._image_hidden(hidden).chunk(branches), sampling.guidance, flat)
            drawn = logits.log_softmax(-1).gather(1, tokens[where][:, None]).squeeze(1)
            steps.append(torch.zeros(len(tokens), device=tokens.device).index_add(0, rows, drawn))
        return torch.stack(steps, 1)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if the text tokenizer cannot read a prompt; see `Decoder`."""
        self.text_tokenizer.encode(prompts)

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood of masked tokens of images [B, n], nats each; see `Decoder`.

        Of each image a share cos(pi t / 2) is masked, t uniform in [0, 1], and one token at least; `max_mask_ratio`
        scales it (`MaskWarmup`).
        """
        batch, length = tokens.shape
        device, dtype = tokens.device, torch.float32  # in bfloat16 many numbers would be equal
        share = self.max_mask_ratio * torch.cos(torch.rand(batch, 1, device=device, dtype=dtype) * math.pi / 2)
        order = torch.rand(batch, length, device=device, dtype=dtype).argsort(1).argsort(1)
        masked = order < (share * length).round().clamp(min=1)
        return -self.token_log_probs(self.encode(prompts), tokens, masked).sum() / masked.sum()

    def noise(self, seeds: Sequence[int], k: int, sampling: MaskSampling) -> SeededNoise:
        """Noise of images with these seeds; see `Decoder`."""
        return SeededNoise.draw(seeds, k, sampling.steps, self.num_tokens)

    @torch.no_grad()
    def begin(self, request: Request, sampling: MaskSampling, k: int = 1) -> MaskState:
        prompts = request.prompts
        shape = len(prompts), self.num_tokens
        device = self.embed.weight.device
        prefix, read = self._open(prompts)
        unconditional = bool(sampling.guidance or self.feature_layers)
        tokens, fixed = request.tokens, request.fixed_mask
        if tokens is None or fixed is None:
            tokens = torch.zeros(shape, dtype=torch.int64)
            fixed = torch.zeros(shape, dtype=torch.bool)
        return MaskState(
            tokens=tokens.to(device),
            unknown=~fixed.to(device),
            step=0,
            sampling=sampling,
            temperature=torch.ones(len(prompts), 1, device=device),
            noise=self.noise(request.seeds, k, sampling).to(device),
            prefixes=[prefix, *([self.encode([""])] if unconditional else [])],
            prompt=read,
            features=None,
            log_probs=torch.zeros(len(prompts), sampling.steps, device=device),
            cost=Cost(),
        )

    def forward_pass(self, state: MaskState) -> tuple[list[Tensor], list[Tensor]]:
        """One forward pass: what verifiers read of it, and what logits are read from, [B, n, dim], by branch.

        The branches, prompts and empty prompts, are one batch; without guidance and features there are no empty ones.
        """
        branches = len(state.prefixes)
        tokens, unknown = state.tokens.repeat(branches, 1), state.unknown.repeat(branches, 1)
        state.cost.count_pass(*tokens.shape)
        run = _compiled_layers if self.compiled else MaskTokenDecoder._layers
        layers = run(self, tokens, unknown, state.prefixes)
        return layers, list(self._image_hidden(layers[-1]).chunk(branches))

    def _layers(self, tokens: Tensor, unknown: Tensor, prefixes: Sequence[Prefix]) -> list[Tensor]:
        """What `grid_pass` gives; without verifiers that read it only the last layer's."""
        run = self._grid(tokens, unknown, prefixes)
        return self.transformer.run(*run) if self.feature_layers else [self.transformer.last(*run)]

    def guided_logits(self, branches: Sequence[Tensor], guidance: float, where: Tensor) -> Tensor:
        """Logits [M, C] after guidance, from what a pass was read from, [B, n, dim] with the prompt and without.

        Logits are linear in hidden states, so these are what is guided, and the head runs once.

        Args:
            branches: of `forward_pass`.
            guidance: scale.
            where: positions [M] of the B * n, counted row by row.
        """
        conditional, *unconditional = (branch.flatten(0, 1)[where] for branch in branches)
        if unconditional and guidance:
            conditional = torch.lerp(unconditional[0], conditional, 1 + guidance)
        return self._code_head(conditional)

    @torch.no_grad()
    def propose(self, state: MaskState, k: int, distinct: bool = False) -> MaskProposal:
        """k ways to go on, all from one forward pass.

        Raises:
            ValueError: `distinct`; what is drawn are whole grids.
        """
        if distinct:
            raise ValueError("distinct candidates are tokens; a mask-token decoder draws whole grids")
        layers, branches = self.forward_pass(state)
        where = state.unknown.flatten().nonzero().squeeze(1)
        codes_of = self.guided_logits(branches, state.sampling.guidance, where).softmax(-1)
        drawn = state.noise.codes(state.step, where, codes_of, k)
        tokens = state.tokens.flatten()[:, None].repeat(1, k)
        tokens[where] = drawn
        probs = torch.ones_like(tokens, dtype=codes_of.dtype)
        probs[where] = codes_of.gather(1, drawn)
        tokens, probs = (x.unflatten(0, state.tokens.shape).transpose(1, 2) for x in (tokens, probs))  # [B, k, n]
        count = masked_after(state.step, state.steps, state.unknown)
        temperature = state.temperature * state.sampling.temperature_at(state.step)
        masked = least_confident(
            probs.flatten(0, 1),
            state.unknown.repeat_interleave(k, 0),
            count.repeat_interleave(k),
            temperature.repeat_interleave(k, 0),
            state.noise.confidence(state.step, k).flatten(0, 1),
        ).unflatten(0, (-1, k))
        is_last, features = state.step + 1 == state.steps, None
        if self.feature_layers:
            undecided = masked & (not is_last)
            seen = layers, branches, tokens, state.unknown, undecided, state.statistics
            features = self._features(state.prompt, *seen)
        return MaskProposal(tokens, probs, masked, features, is_last)

    def _features(
        self,
        prompt: Tensor,
        layers: Sequence[Tensor],
        branches: Sequence[Tensor],
        tokens: Tensor,
        unknown: Tensor,
        undecided: Tensor,
        decided: Tensor,
    ) -> DecoderFeatures:
        """Features of k grids [B, k, n] from a pass (see `forward_pass`); `decided` are `MaskState.statistics`."""
        shape = tokens.transpose(1, 2).shape  # [B, n, k]
        where = unknown.flatten().nonzero().squeeze(1)
        log_p, unconditional = (self._code_head(part.flatten(0, 1)[where]).log_softmax(-1) for part in branches)
        drawn = tokens.transpose(1, 2).flatten(0, 1)[where]
        own = decided[:2].flatten(1)[..., None].repeat(1, 1, shape[2])
        own[:, where] = torch.stack([log.gather(1, drawn) for log in (log_p, unconditional)])
        entropy = decided[2].flatten().clone()
        entropy[where] = -(log_p.exp() * log_p).sum(-1)
        log_probs, unconditional_log_probs = own.unflatten(1, shape[:2]).transpose(2, 3).flatten(2, 3)
        embeddings = self.embed(tokens + self.vocabulary.first_code)
        if self.visual:
            embeddings = embeddings + self._looks()[tokens]
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
        decided: Tensor | None = None,
    ) -> DecoderFeatures:
        """Features of grids, from a pass with each prompt and one without any; by default about finished images.

        Args:
            prompts: B * c of them.
            tokens: codes [B, n], previews included; each grid stands for c prompts, which are neighbours.
            unknown: what was masked in the pass that the previews come from, bool [B, n].
            undecided: what is still a preview after it, bool [B, n].
            decided: `statistics` of `MaskState`, [3, B, n], of what was known before the pass.
        """
        copies = len(prompts) // len(tokens)
        nothing = torch.zeros_like(tokens, dtype=torch.bool)
        unknown = nothing if unknown is None else unknown
        undecided = nothing if undecided is None else undecided
        decided = torch.zeros(3, *tokens.shape, device=tokens.device) if decided is None else decided
        bare = self.grid_pass(tokens, unknown, [self.encode([""])])
        tokens, unknown, undecided = (x.repeat_interleave(copies, 0) for x in (tokens, unknown, undecided))
        prefix, read = self._open(prompts)
        full = self.grid_pass(tokens, unknown, [prefix])
        layers = [torch.cat([h, b.repeat_interleave(copies, 0)]) for h, b in zip(full, bare, strict=True)]
        return self._features(
            read,
            layers,
            self._image_hidden(layers[-1]).chunk(2),
            tokens[:, None],
            unknown,
            undecided[:, None],
            decided.repeat_interleave(copies, 1),
        )

    def training_features(
        self, batch: Mapping[str, Any], finished: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        """Features of grids at one step each; what was seen on the way takes a pass with what was unknown then."""
        tokens, device = batch["tokens"], batch["tokens"].device
        decided = torch.zeros(3, *tokens.shape, device=device)
        if "trajectory" in batch:
            trajectory = Trajectory(**batch["trajectory"])
            decided = torch.stack([batch["features"][name] for name in STATISTICS])
        else:
            trajectory = Trajectory.in_random_order(tokens, _RANDOM_STEPS, uniform_rows(*tokens.shape, device=device))
        steps = trajectory.previews.shape[1]
        first = batch["first_unverified"][:: len(batch["prompt"]) // len(tokens)]
        if fraction is None:
            step = first + (uniform_rows(len(tokens), device=device) * (steps + 1 - first)).long()
            # Best-of-n, and reflection, ask of finished images.
            step = torch.where(uniform_rows(len(tokens), device=device) < finished, steps - 1, step)
            # A finished image may come from anywhere, and of one that was decoded again some tokens do.
            known = 2 * uniform_rows(len(tokens), 1, device=device) * (step < steps)[:, None]
            decided = decided * (uniform_rows(*tokens.shape, device=device) < known)
        else:
            step = torch.full_like(first, max(0, round(fraction * steps) - 1))
        return self.features(batch["prompt"], *trajectory.at(step), decided)

    def preview(self, state: MaskState, proposal: MaskProposal | None = None) -> Tensor:
        return self.image_tokenizer.decode(state.tokens if proposal is None else proposal.tokens.flatten(0, 1))

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
        prefix, index = self.encode(prompts), torch.arange(self.image_tokenizer.grid)
        place = (2 * (index[:, None] % 2) + index % 2).flatten().to(tokens.device)
        cost.count_pass(4 * len(prompts), self.num_tokens)
        masks = [(place == i).expand_as(tokens) for i in range(4)]
        return torch.stack([self.token_log_probs(prefix, tokens, masked) for masked in masks]).sum(0)

    def value_gains(
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        features: DecoderFeatures,
        values: Values,
        patches: int,
        cost: Cost,
    ) -> Tensor:
        """What each patch adds to the same grid in which it is not decided yet, which takes a pass a patch."""
        decided = torch.stack([getattr(features, name) for name in STATISTICS])
        grid = self.image_tokenizer.grid
        without = []
        for patch in torch.eye(patches**2, dtype=torch.bool, device=tokens.device):
            here = upsample_patches(patch.view(1, patches, -1), grid).expand_as(tokens)
            seen = self.features(prompts, tokens, here, here, decided)
            cost.count_pass(2 * len(prompts), self.num_tokens)
            without.append(values(seen, [self.num_tokens]).exp())
        gains = values(features, [self.num_tokens]).exp() - torch.cat(without, 1)
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


# Of the class, not of an object, whose copies would go on with its weights.
_compiled_layers = torch.compile(MaskTokenDecoder._layers, mode="reduce-overhead")
