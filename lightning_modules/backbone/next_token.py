"""Next-token decoding: a step decides one token of an image, given its prompt and all tokens before it."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.backbone.attention import ExtendAttention, FullAttention, StepAttention
from lightning_modules.backbone.decoder import Cost, Frames, Proposal, Request, Values
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.image_tokenizer import upsample_patches
from lightning_modules.backbone.kv_cache import KVCache, SharedPrefix
from lightning_modules.backbone.next_token_network import NextTokenNetwork, Prefix
from lightning_modules.backbone.next_token_state import NextTokenState, decision_order
from lightning_modules.backbone.sampling import Noise, Sampling, draw, guide, uniform_noise
from lightning_modules.backbone.trajectory import Trajectory

_STATIC_PREFIX = 16  # prefixes that compiled passes read have a multiple of these positions: few shapes


class NextTokenDecoder(NextTokenNetwork):
    """Prompts in, image tokens out, one token a step; see `NextTokenNetwork` for what a subclass gives."""

    sampling_type = Sampling
    # `token_pass`, compiled. It belongs to the class: copies of an object would run with its weights.
    compiled_pass: ClassVar[Callable[..., tuple[Tensor, Tensor]]]

    def noise(self, seeds: Sequence[int], k: int, sampling: Sampling) -> Noise:
        uniform = uniform_noise(seeds, k, self.num_tokens)
        return Noise(uniform[:, 1:], uniform[:, 0])

    @torch.no_grad()
    def begin(self, request: Request, sampling: Sampling, k: int = 1) -> NextTokenState:
        """Encode the prompts, with their unconditional twins if anything reads those, and read what is fixed.

        Fixed tokens are read, not decided: those before the first open one beside the prompt, later ones in the pass of
        the decided token before them. So there is at most one pass more than the most open tokens of a row.
        """
        prompts = request.prompts
        branches = 2 if sampling.guidance or self.feature_layers else 1
        conditional = [True] * len(prompts) + [False] * len(prompts) * (branches - 1)
        prefix, rows = self.distinct_prefixes(prompts * branches, conditional)
        if self.compiled and self.shares_prefixes:
            prefix = prefix.padded(_STATIC_PREFIX)
        tokens, fixed = request.initial(self.num_tokens, prefix.embeddings.device)
        order, table = decision_order(fixed.cpu()), self.code_table()
        counts = self.places(order[:, 0])
        cache, layers, words = self._read(table, prefix, rows, tokens, counts)
        texts = list(dict.fromkeys(prompts)) if self.shares_prefixes else prompts
        prompt = self.prompt_features(texts, prefix, words)[rows[: len(prompts)]]
        width = self.dim * len(self.feature_layers)
        state = NextTokenState(
            tokens=tokens,
            step=0,
            noise=self.noise(request.seeds, k, sampling).to(tokens.device),
            prompt=prompt,
            features=DecoderFeatures.empty(prompt, self.num_tokens, self.dim, width) if width else None,
            log_probs=torch.zeros(order.shape, device=tokens.device),
            cost=Cost(),
            fixed=fixed,
            order=order,
            sampling=sampling,
            table=table,
            rotary=self.rotary(torch.arange(self.image_places, device=tokens.device)),
            cache=cache,
            hidden=prompt.new_empty(len(rows), width),
            logits=prompt.new_empty(0, dtype=torch.float32),
        )
        state.cost.count_pass(len(rows), int(counts.max()))
        self._advance(state, layers, torch.full_like(counts, -1))
        return state

    def _read(
        self, table: Tensor, prefix: Prefix, rows: Tensor, tokens: Tensor, counts: Tensor
    ) -> tuple[KVCache, list[Tensor], list[Tensor]]:
        """Read what comes before the image and the known tokens of images [B, T], of row b the first counts[b] places.

        Returns what is cached, hidden states [R, 1 + S, dim] before and at the first places, per layer, and those of
        the prefix, [U, P, dim].
        """
        length, device = prefix.embeddings.shape[1], tokens.device
        branches = len(rows) // len(tokens)
        places = torch.arange(int(counts.max()), device=device)
        x = self.embed_places(table, tokens, places).repeat(branches, 1, 1)
        before = self.rotary(torch.arange(-length, 0, device=device))
        if not self.shares_prefixes:  # in one pass, and each row with a prefix of its own
            cache = KVCache(length + self.image_places, static=self.compiled)
            layers = self.pass_over(torch.cat([prefix.embeddings, x], 1), FullAttention(True, before, cache=cache))
            cache.lengths = length + counts.repeat(branches)
            return cache, [layer[:, length - 1 :] for layer in layers], layers
        # Rows of a prompt read one copy, and so do their twins, though the pass may read twins of several prompts once.
        texts = rows[: len(tokens)]
        groups = torch.cat([texts + branch * (texts.max() + 1) for branch in range(branches)])
        source = rows.new_empty(int(groups.max()) + 1).scatter(0, groups, rows)
        shared = SharedPrefix(prefix.padding[source], length, groups, device, source)
        cache = KVCache(self.image_places - 1, shared, self.compiled)
        words = self.pass_over(prefix.embeddings, FullAttention(True, before, prefix.padding, cache))
        layers = [layer[rows.to(device), -1:] for layer in words]
        if len(places):
            attention = ExtendAttention(cache, counts.repeat(branches), len(places), self.rotary(places), device)
            layers = [torch.cat(both, 1) for both in zip(layers, self.pass_over(x, attention), strict=True)]
        return cache, layers, words

    def _predict(
        self, table: Tensor, layers: Sequence[Tensor], branches: int, guidance: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of hidden states [R, ..., dim] the `feature_states`, and the logits; see `NextTokenState`."""
        read = self.head_input(layers[-1])
        if self.feature_layers:
            return self.feature_states(layers), self.logits(table, read)
        conditional, *unconditional = read.chunk(branches)
        guided = guide(conditional, unconditional[0], guidance) if unconditional else conditional
        return read.new_empty(*read.shape[:-1], 0), self.logits(table, guided)

    def _advance(self, state: NextTokenState, layers: Sequence[Tensor], last: Tensor) -> None:
        """Take what a pass predicts for `state.position`, and the features of fixed tokens that it read on the way.

        The hidden states of every layer, [R, S, dim], are those at S places from that of position last[b] on.
        """
        passed = (state.position - last - 1).clamp(min=0)  # number of fixed tokens before the next one
        start = self.places(last) + 1
        column = (self.places(state.position) - start).clamp(min=0).repeat(state.branches)
        if not self.feature_layers:  # nothing else of the pass is read
            layers, column = [layers[-1][torch.arange(len(column)), column, None]], torch.zeros_like(column)
        scale = state.sampling.guidance_at(state.position.to(layers[-1].device)[:, None])
        hidden, logits = self._predict(state.table, layers, state.branches, scale)
        state.hidden = self._moved(state, hidden, column, last, state.hidden)
        state.logits = self._moved(state, logits, column[: len(logits)], last, state.logits)
        if state.features is None or not passed.any():
            return
        offset = torch.arange(int(passed.max()))
        positions = (last[:, None] + 1 + offset).clamp(max=self.num_tokens - 1)
        read = (self.places(positions) - start[:, None]).clamp(max=hidden.shape[1] - 1).repeat(state.branches, 1)
        every, positions = torch.arange(len(read))[:, None], positions.to(state.tokens.device)
        log_p, tokens = logits[every, read].log_softmax(-1), state.tokens.gather(1, positions)
        features = self.describe(state.prompt, state.table, tokens, positions, hidden[every, read], log_p)
        rows, columns = (offset < passed[:, None]).nonzero(as_tuple=True)
        state.features.write(rows, last[rows] + 1 + columns, features, columns)

    @staticmethod
    def _moved(state: NextTokenState, found: Tensor, column: Tensor, last: Tensor, before: Tensor) -> Tensor:
        """The column of each row of `found` [R, S, ...], or what was there before for images that are complete."""
        picked = found[torch.arange(len(found)), column]
        moved = state.position > last
        if moved.all():
            return picked
        return torch.where(moved.repeat(len(found) // len(moved)).to(found.device)[:, None], picked, before)

    @torch.no_grad()
    def propose(self, state: NextTokenState, k: int, distinct: bool = False) -> Proposal:
        """k candidates for the next token; a fixed token is its own only candidate, k times. See `Decoder`."""
        logits = state.logits
        if state.features is not None:
            conditional, unconditional = state.logits.chunk(2)
            scale = state.sampling.guidance_at(state.position.to(conditional.device))
            logits = guide(conditional, unconditional, scale)
        tokens, log_probs = draw(logits, state.sampling, state.noise.candidates[:, :k, state.step], distinct)
        position = state.position.to(tokens.device)[:, None]
        fixed = state.fixed.gather(1, position)
        tokens = torch.where(fixed, state.tokens.gather(1, position), tokens)
        features = None
        if state.features is not None:
            log_p = state.logits[:, None].log_softmax(-1)
            features = self.describe(state.prompt, state.table, tokens, position, state.hidden[:, None], log_p)
        return Proposal(tokens[..., None], log_probs.masked_fill(fixed, 0.0), features)

    @torch.no_grad()
    def commit(self, state: NextTokenState, proposal: Proposal, choice: Tensor) -> None:
        """Take candidate `choice` [B] and, unless that was the last step, run the next forward pass."""
        rows, last = torch.arange(len(choice), device=choice.device), state.position
        here = rows, last.to(choice.device)
        state.tokens[here], state.fixed[here] = proposal.tokens[rows, choice, 0], True
        state.log_probs[:, state.step] = proposal.log_probs[rows, choice]
        if state.features is not None and proposal.features is not None:
            state.features.write(*here, proposal.features.pick(choice), torch.zeros_like(choice))
        state.step += 1
        if state.is_done:
            return
        first = self.places(last)
        counts = self.places(state.position) - first  # the decided token, what is fixed after it; 0 for complete rows
        places = (first[:, None] + torch.arange(int(counts.max()))).clamp(max=self.image_places - 1)
        rotary = state.rotary_at(places)
        state.cost.count_pass(len(state.hidden), places.shape[1])
        if (counts == 1).all():
            attention = StepAttention.of(state.cache, rotary, choice.device)
            run = NextTokenDecoder.compiled_pass if self.compiled else NextTokenDecoder.token_pass
            position = here[1][:, None]
            tokens, scale = state.tokens.gather(1, position), state.sampling.guidance_at(position + 1)
            found = run(self, state.table, tokens, position, attention, state.branches, scale)
            # CUDA graphs write what the next pass finds to the same memory.
            state.hidden, state.logits = (part[:, 0].clone() if self.compiled else part[:, 0] for part in found)
            state.cache.candidates = attention.candidates
            state.cache.commit(torch.zeros(len(state.hidden), dtype=torch.int64, device=choice.device))
            return
        x = self.embed_places(state.table, state.tokens, places.to(choice.device)).repeat(state.branches, 1, 1)
        extending = ExtendAttention(state.cache, counts.repeat(state.branches), x.shape[1], rotary, x.device)
        self._advance(state, self.pass_over(x, extending), last)

    def token_pass(
        self,
        table: Tensor,
        tokens: Tensor,
        positions: Tensor,
        attention: StepAttention,
        branches: int,
        guidance: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A forward pass of one token of each image, [B, 1] at positions [B, 1] -> what it predicts; see `_predict`."""
        x = self.embed(table, tokens, positions).repeat(branches, 1, 1)
        return self._predict(table, self.pass_over(x, attention), branches, guidance)

    def preview(self, state: NextTokenState, proposal: Proposal | None = None) -> Tensor:
        """The tokens so far as pixels; what is not decided yet is grey. See `Decoder`."""
        tokens, known = state.tokens, state.fixed
        if proposal is not None:
            k = proposal.tokens.shape[1]
            position = state.position.to(tokens.device).repeat_interleave(k)[:, None]
            tokens = tokens.repeat_interleave(k, 0).scatter(1, position, proposal.tokens.flatten(0, 1))
            known = known.repeat_interleave(k, 0).scatter(1, position, True)
        pixels, grid = self.pixels(tokens, state.cost), self.image_tokenizer.grid
        known = upsample_patches(known.view(-1, grid, grid), pixels.shape[-1])
        return torch.where(known.view(-1, 1, *pixels.shape[2:]), pixels, 0.5)

    def frames(self, tokens: Tensor, trajectory: Trajectory | None, most: int) -> Frames:
        counts = [self.num_tokens * (i + 1) // most for i in range(most)]
        shown = torch.arange(self.num_tokens) < torch.tensor(counts)[:, None]
        return Frames("tokens decided", tokens.expand(len(counts), -1), shown, [str(n) for n in counts])

    @torch.no_grad()
    def confidence(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures | None, cost: Cost
    ) -> Tensor:
        """Log-probability given the tokens before it, from when it was drawn, or else from a pass; see `Decoder`."""
        if features is not None:
            return features.log_probs
        cost.count_pass(*tokens.shape)
        return self.token_log_probs(prompts, tokens)

    def value_gains(
        self, prompts: Sequence[str], tokens: Tensor, features: DecoderFeatures, value: Values, patches: int, cost: Cost
    ) -> Tensor:
        """The value of each prefix minus that of the one before; see `Decoder`."""
        after = value(features, range(1, self.num_tokens + 1)).exp()
        cost.verifier_calls += after.numel()
        return after.diff(dim=1, prepend=after[:, :1])


NextTokenDecoder.compiled_pass = torch.compile(NextTokenDecoder.token_pass, mode="reduce-overhead", fullgraph=True)
