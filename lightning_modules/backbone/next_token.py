"""The shared decoder: a Transformer that predicts an image's tokens one after the other, given a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbone.decoder import Cost, Frames, Proposal, Request, TokenDecoder, Values
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.image_tokenizer import ImageTokenizer, upsample_patches
from lightning_modules.backbone.next_token_state import NextTokenState, decision_order
from lightning_modules.backbone.sampling import Noise, Sampling, draw, sampling_log_probs, uniform_noise
from lightning_modules.backbone.text import PromptEncoder, WordTokenizer
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.backbone.transformer import KVCache, Transformer, TransformerConfig


class NextTokenDecoder(TokenDecoder):
    """Prompts in, image tokens out, one token a step (`H0 = concat(prompt embeddings, image tokens < t)`).

    Args:
        image_tokenizer, feature_layers: see `TokenDecoder`.
        vocabulary: the words that prompts consist of.
        max_words: longest prompt, words.
        transformer: sizes of the decoder.
        text_depth: layers of the prompt encoder, which has the decoder's width and heads.
    """

    causal = True
    sampling_type = Sampling
    text_tokenizer: WordTokenizer

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        vocabulary: Sequence[str],
        max_words: int,
        transformer: TransformerConfig,
        text_depth: int,
        feature_layers: Sequence[int],
    ) -> None:
        super().__init__(image_tokenizer, transformer.depth, feature_layers)
        dim = transformer.dim
        self.text_tokenizer = WordTokenizer(vocabulary, max_words)
        self.prompt_encoder = PromptEncoder(self.text_tokenizer, replace(transformer, depth=text_depth))
        self.codes = nn.Parameter(torch.zeros(image_tokenizer.codebook_size, dim))
        self.code_proj = nn.Linear(image_tokenizer.code_vectors.shape[1], dim, bias=False)
        self.rows = nn.Parameter(torch.zeros(image_tokenizer.grid, 1, dim))
        self.columns = nn.Parameter(torch.zeros(1, image_tokenizer.grid, dim))
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(dim)
        for weight in (self.codes, self.rows, self.columns):
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.code_proj.weight, std=0.05 * self.code_proj.in_features**-0.5)

    @property
    def max_words(self) -> int:
        return self.text_tokenizer.max_words

    def word_ids(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> word ids [B, L]; raises ValueError for unknown words and too many."""
        return self.text_tokenizer(prompts).to(self.rows.device)

    @property
    def _positions(self) -> Tensor:
        """Position embeddings, [T, dim]."""
        return (self.rows + self.columns).flatten(0, 1)

    def _code_embeddings(self) -> Tensor:
        """Embeddings of all codes, [V, dim]: a map of what they look like, and a part of each one's own.

        Without the map the decoder hardly combines classes and colours that no training prompt names together.
        """
        return self.code_proj(self.image_tokenizer.code_vectors) + self.codes

    def _embed(self, codes: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings, with positions, of an image's first tokens [B, S]."""
        return codes[tokens] + self._positions[: tokens.shape[1]]

    def _logits(self, codes: Tensor, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., V]; the output matrix is the embedding of the codes."""
        return self.norm(hidden) @ codes.T

    def _run(self, codes: Tensor, word_ids: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Full pass: prompt embeddings, and hidden states [B, T, dim] per layer that predict each token."""
        prompt = self.prompt_encoder(word_ids)
        inputs = torch.cat([prompt, self._embed(codes, tokens[:, :-1])], dim=1)
        hidden = self.transformer(inputs, causal=True)
        return prompt, [h[:, prompt.shape[1] - 1 :] for h in hidden]

    def _feature_states(self, hidden: Sequence[Tensor]) -> Tensor:
        """Hidden states of every layer [..., dim] -> those of `feature_layers`, [..., F]."""
        return torch.cat([hidden[depth - 1] for depth in self.feature_layers], dim=-1)

    def _token_logits(self, word_ids: Tensor, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of each token of images [B, T], given the prompt and the tokens before it."""
        codes = self._code_embeddings()
        return self._logits(codes, self._run(codes, word_ids, tokens)[1][-1])

    def token_log_probs(self, word_ids: Tensor, tokens: Tensor) -> Tensor:
        """log p(token t | prompt, tokens < t) for word ids [B, L] and tokens [B, T] -> [B, T]. Differentiable."""
        logits = self._token_logits(word_ids, tokens).float()
        return -nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        return -self.token_log_probs(self.word_ids(prompts), tokens).mean()

    def log_probs(self, prompts: Sequence[str], tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.token_log_probs(self.word_ids(prompts), tokens).sum(1)  # exact: seeds are for estimates

    def policy_log_probs(
        self, prompts: Sequence[str], tokens: Tensor, sampling: Sampling, trajectory: Trajectory | None = None
    ) -> Tensor:
        ids = self.word_ids(prompts)
        both = self._token_logits(torch.cat([ids, torch.zeros_like(ids)]), tokens.repeat(2, 1)).flatten(0, 1)
        conditional, unconditional = both.chunk(2)
        log_p = sampling_log_probs(conditional, unconditional, sampling)
        return log_p.gather(-1, tokens.flatten()[:, None]).view_as(tokens)

    @torch.no_grad()
    def features(self, prompts: Sequence[str], tokens: Tensor) -> DecoderFeatures:
        word_ids = self.word_ids(prompts)
        copies = len(word_ids) // len(tokens)
        codes = self._code_embeddings()
        _, unconditional = self._run(codes, torch.zeros_like(word_ids[::copies]), tokens)
        tokens = tokens.repeat_interleave(copies, 0)
        prompt, conditional = self._run(codes, word_ids, tokens)
        hidden, log_p = (
            torch.cat([read(conditional), read(unconditional).repeat_interleave(copies, 0)])
            for read in (self._feature_states, lambda layers: self._logits(codes, layers[-1]).log_softmax(-1))
        )
        everywhere = torch.arange(self.num_tokens, device=tokens.device)
        return self._features(self.prompt_encoder.read(word_ids, prompt), codes, tokens, everywhere, hidden, log_p)

    def _features(
        self, prompt: Tensor, codes: Tensor, tokens: Tensor, positions: Tensor, hidden: Tensor, log_p: Tensor
    ) -> DecoderFeatures:
        """Features of tokens [B, S] at positions [S] or [B, S or 1].

        Hidden states and log-probabilities of all codes, [2B, S or 1, ...], are those with the prompt, then without.
        """
        own = log_p.expand(-1, tokens.shape[1], -1).gather(-1, tokens.repeat(2, 1)[..., None]).squeeze(-1)
        conditional = log_p[: len(tokens)]
        return DecoderFeatures(
            prompt=prompt,
            embeddings=codes[tokens] + self._positions[positions],
            hidden=hidden[: len(tokens)],
            unconditional_hidden=hidden[len(tokens) :],
            log_probs=own[: len(tokens)],
            unconditional_log_probs=own[len(tokens) :],
            entropy=-(conditional.exp() * conditional).sum(-1),
        )

    @torch.no_grad()
    def features_from_cache(self, prompts: Sequence[str], tokens: Tensor, **stored: Tensor) -> DecoderFeatures:
        """Features `stored` while decoding images [B, T], and those that follow cheaply from prompts and tokens."""
        word_ids = self.word_ids(prompts)
        embeddings = self._embed(self._code_embeddings(), tokens)
        prompt = self.prompt_encoder.read(word_ids, self.prompt_encoder(word_ids))
        return DecoderFeatures(prompt=prompt, embeddings=embeddings, **stored)

    def training_features(
        self, batch: Mapping[str, Any], last_step: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        if "features" in batch:
            return self.features_from_cache(batch["prompt"], batch["tokens"], **batch["features"])
        return self.features(batch["prompt"], batch["tokens"])

    def preview(self, state: NextTokenState, proposal: Proposal | None = None) -> Tensor:
        """The tokens so far as pixels; what is not decided yet is grey. See `Decoder`."""
        tokens, known = state.tokens, state.fixed
        if proposal is not None:
            k = proposal.tokens.shape[1]
            position = state.position.to(tokens.device).repeat_interleave(k)[:, None]
            tokens = tokens.repeat_interleave(k, 0).scatter(1, position, proposal.tokens.flatten(0, 1))
            known = known.repeat_interleave(k, 0).scatter(1, position, True)
        pixels, grid = self.image_tokenizer.decode(tokens), self.image_tokenizer.grid
        known = upsample_patches(known.view(-1, grid, grid), pixels.shape[-1])
        return torch.where(known.view(-1, 1, *pixels.shape[2:]), pixels, 0.5)

    def frames(self, tokens: Tensor, trajectory: Trajectory | None, most: int) -> Frames:
        counts = [self.num_tokens * (i + 1) // most for i in range(most)]
        shown = torch.arange(self.num_tokens) < torch.tensor(counts)[:, None]
        return Frames("tokens decided", tokens.expand(len(counts), -1), shown, [str(n) for n in counts])

    def confidence(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures | None, cost: Cost
    ) -> Tensor:
        """Log-probability given the tokens before it, from when it was drawn; see `Decoder`."""
        assert features is not None
        return features.log_probs

    def value_gains(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures, value: Values, patches: int, cost: Cost
    ) -> Tensor:
        """The value of each prefix minus that of the one before; see `Decoder`."""
        after = value(features, range(1, self.num_tokens + 1)).exp()
        cost.verifier_calls += after.numel()
        return after.diff(dim=1, prepend=after[:, :1])

    def noise(self, seeds: Sequence[int], k: int, sampling: Sampling) -> Noise:
        uniform = uniform_noise(seeds, k, self.num_tokens)
        return Noise(uniform[:, 1:], uniform[:, 0])

    @torch.no_grad()
    def begin(self, request: Request, sampling: Sampling, k: int = 1) -> NextTokenState:
        """Encode the prompts, with their unconditional twin, and read what is fixed; see `Decoder`.

        Fixed tokens are read, not decided: those before the first open one in the pass of the prompt, later ones in
        that of the decided token before them. So there is at most one pass more than the most open tokens of a row.
        """
        ids = self.word_ids(request.prompts)
        tokens, fixed = request.initial(self.num_tokens, ids.device)
        order = decision_order(fixed.cpu())
        prompt = self.prompt_encoder(torch.cat([ids, torch.zeros_like(ids)]))
        cache = KVCache(prompt.shape[1] + self.num_tokens)
        codes = self._code_embeddings()
        first = order[:, 0]
        known = self._embed(codes, tokens[:, : int(first.max())]).repeat(2, 1, 1)
        hidden = self.transformer(torch.cat([prompt, known], 1), causal=True, cache=cache)
        cache.lengths = prompt.shape[1] + first.repeat(2)
        read = self.prompt_encoder.read(ids, prompt[: len(ids)])
        width = self.dim * len(self.feature_layers)
        state = NextTokenState(
            tokens=tokens,
            step=0,
            noise=self.noise(request.seeds, k, sampling).to(prompt.device),
            prompt=read,
            features=DecoderFeatures.empty(read, self.num_tokens, self.dim, width),
            log_probs=torch.zeros(order.shape, device=prompt.device),
            cost=Cost(),
            fixed=fixed,
            order=order,
            sampling=sampling,
            codes=codes,
            cache=cache,
            hidden=prompt.new_empty(len(prompt), width),
            logits=prompt.new_empty(len(prompt), len(codes)),
        )
        state.cost.count_pass(*known.shape[:2])
        self._advance(state, [h[:, prompt.shape[1] - 1 :] for h in hidden], torch.full_like(first, -1))
        return state

    def _advance(self, state: NextTokenState, hidden: Sequence[Tensor], last: Tensor) -> None:
        """Take what a pass predicts for `state.position`, and the features of fixed tokens that it read on the way.

        Entry i of row b of the hidden states of every layer, [2B, S, dim], predicts position last[b] + 1 + i.
        """
        passed = (state.position - last - 1).clamp(min=0)  # number of fixed tokens before the next one
        logits, hidden_states = self._logits(state.codes, hidden[-1]), self._feature_states(hidden)
        both, column = torch.arange(len(logits)), passed.repeat(2)
        moved = (state.position > last).repeat(2).to(logits.device)[:, None]
        state.hidden = torch.where(moved, hidden_states[both, column], state.hidden)
        state.logits = torch.where(moved, logits[both, column], state.logits)
        if not passed.any():
            return
        offset = torch.arange(int(passed.max()))
        positions = (last[:, None] + 1 + offset).clamp(max=self.num_tokens - 1).to(state.tokens.device)
        tokens, read = state.tokens.gather(1, positions), slice(len(offset))
        log_p = logits[:, read].log_softmax(-1)
        features = self._features(state.prompt, state.codes, tokens, positions, hidden_states[:, read], log_p)
        rows, columns = (offset < passed[:, None]).nonzero(as_tuple=True)
        state.features.write(rows, last[rows] + 1 + columns, features, columns)

    @torch.no_grad()
    def propose(self, state: NextTokenState, k: int, distinct: bool = False) -> Proposal:
        """k candidates for the next token; a fixed token is its own only candidate, k times. See `Decoder`."""
        conditional, unconditional = state.logits.chunk(2)
        noise = state.noise.candidates[:, :k, state.step]
        tokens, log_probs = draw(conditional, unconditional, state.sampling, noise, distinct)
        position = state.position.to(tokens.device)[:, None]
        fixed = state.fixed.gather(1, position)
        tokens = torch.where(fixed, state.tokens.gather(1, position), tokens)
        log_p = state.logits[:, None].log_softmax(-1)
        features = self._features(state.prompt, state.codes, tokens, position, state.hidden[:, None], log_p)
        return Proposal(tokens[..., None], log_probs.masked_fill(fixed, 0.0), features)

    @torch.no_grad()
    def commit(self, state: NextTokenState, proposal: Proposal, choice: Tensor) -> None:
        """Take candidate `choice` [B] and, unless that was the last step, run the next forward pass."""
        assert proposal.features is not None
        rows, last = torch.arange(len(choice), device=choice.device), state.position
        here = rows, last.to(choice.device)
        state.tokens[here], state.fixed[here] = proposal.tokens[rows, choice, 0], True
        state.log_probs[:, state.step] = proposal.log_probs[rows, choice]
        state.features.write(*here, proposal.features.pick(choice), torch.zeros_like(choice))
        state.step += 1
        if state.is_done:
            return
        counts = state.position - last  # the decided token and the fixed ones after it; 0 for complete rows
        positions = (last[:, None] + torch.arange(int(counts.max()))).clamp(max=self.num_tokens - 1).to(choice.device)
        x = (state.codes[state.tokens.gather(1, positions)] + self._positions[positions]).repeat(2, 1, 1)
        if (counts == 1).all():
            hidden = self.transformer.step(x, state.cache)
            state.cache.commit(torch.zeros(len(x), dtype=torch.int64, device=x.device))
        else:
            hidden = self.transformer.extend(x, counts.repeat(2), state.cache)
        state.cost.count_pass(*x.shape[:2])
        self._advance(state, hidden, last)
