"""The shared decoder: a Transformer that predicts an image's tokens one after the other, given a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbone.decoder import Cost, DecodingState, Frames, Proposal, Request, TokenDecoder, Values
from lightning_modules.backbone.features import DecoderFeatures
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.sampling import Sampling, draw, sampling_log_probs, uniform_noise
from lightning_modules.backbone.text import PromptEncoder, WordTokenizer
from lightning_modules.backbone.trajectory import Trajectory
from lightning_modules.backbone.transformer import KVCache, Transformer, TransformerConfig
from lightning_modules.cache_key import class_name, key_of


@dataclass(frozen=True)
class NextTokenProposal(Proposal):
    """k candidates for the next token; see `Proposal`.

    Attributes:
        sampled: log-probability of each under the sampling distribution (temperature, top-k, top-p, guidance), [B, k].
    """

    tokens: Tensor
    sampled: Tensor
    features: DecoderFeatures

    @property
    def log_probs(self) -> Tensor:
        return self.sampled

    @property
    def repeats(self) -> Tensor:
        tokens = self.tokens.squeeze(2)
        return (tokens[:, :, None] == tokens[:, None]).tril(-1).any(2)

    def select(self, rows: Tensor) -> "NextTokenProposal":
        return NextTokenProposal(self.tokens[rows], self.sampled[rows], self.features.select(rows))

    def unfold(self) -> "NextTokenProposal":
        tokens, sampled = self.tokens.flatten(0, 1)[:, None], self.sampled.flatten()[:, None]
        return NextTokenProposal(tokens, sampled, self.features.unfold())


@dataclass
class NextTokenState(DecodingState):
    """Every step decides one token of each image, not necessarily at the same position; see `DecodingState`.

    Attributes:
        fixed: tokens that stay as they are, bool [B, T]; decided ones are among them.
        order: positions to decide, ascending, [B, steps], on the CPU; see `decision_order`.
        sampling: how candidates are drawn.
        codes: embeddings of all codes, [V, dim].
        cache: keys and values, conditional rows first, then the unconditional ones.
        hidden: hidden states that predict the next token, [2B, F]; conditional rows first.
        logits: of the next token, [2B, V].
    """

    noise: Tensor  # uniform, [B, 1 + K, T], by step; row 0 is for choosing, row 1 + j for candidate j
    features: DecoderFeatures  # about the tokens before `position`, in room for all T
    fixed: Tensor
    order: Tensor
    sampling: Sampling
    codes: Tensor
    cache: KVCache
    hidden: Tensor
    logits: Tensor

    @property
    def steps(self) -> int:
        return self.order.shape[1]

    @property
    def position(self) -> Tensor:
        return self.order[:, self.step]

    @property
    def decided(self) -> Tensor:
        return self.position

    @property
    def choice_noise(self) -> Tensor:
        return self.noise[:, 0, self.step]

    @property
    def is_complete(self) -> Tensor:
        return self.fixed.all(1)

    def select(self, rows: Tensor) -> "NextTokenState":
        both = torch.cat([rows, rows + len(self.tokens)])
        return replace(
            self,
            tokens=self.tokens[rows],
            prompt=self.prompt[rows],
            log_probs=self.log_probs[rows],
            fixed=self.fixed[rows],
            order=self.order[rows.cpu()],
            noise=self.noise[rows],
            features=self.features.select(rows),
            cache=self.cache.select(both),
            hidden=self.hidden[both],
            logits=self.logits[both],
        )

    def fork(self, k: int) -> "NextTokenState":
        rows = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(k)
        paths = self.select(rows)
        lane = 1 + torch.arange(k, device=rows.device).repeat(len(self.tokens))
        own = paths.noise[torch.arange(len(rows), device=rows.device), lane]
        return replace(paths, noise=torch.stack([paths.noise[:, 0], own], dim=1))


def decision_order(fixed: Tensor) -> Tensor:
    """Positions to decide, [B, steps], ascending, for tokens that stay, bool [B, T].

    A row decides what it does not keep, and at the end its last token, whether kept or not: then all others have been
    read. A row that has fewer open tokens than others decides its last token again and again; a token that is kept has
    only itself as a candidate.
    """
    length = fixed.shape[1]
    due = torch.where(fixed, length, torch.arange(length))
    due[:, -1] = length - 1
    steps = int((due < length).sum(1).max())
    return due.sort(1).values[:, :steps].clamp(max=length - 1)


class NextTokenDecoder(TokenDecoder):
    """Prompts in, image tokens out, one token a step (`H0 = concat(prompt embeddings, image tokens < t)`).

    Args:
        image_tokenizer: fixes the number of tokens and the codebook; turns tokens into pixels.
        vocabulary: the words that prompts consist of.
        max_words: longest prompt, words.
        transformer: sizes of the decoder.
        text_depth: layers of the prompt encoder, which has the decoder's width and heads.
        feature_layers: after which layers (1 = first) hidden states are read by verifiers.
    """

    causal = True

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        vocabulary: Sequence[str],
        max_words: int,
        transformer: TransformerConfig,
        text_depth: int,
        feature_layers: Sequence[int],
    ) -> None:
        super().__init__()
        if not all(1 <= depth <= transformer.depth for depth in feature_layers):
            raise ValueError(f"feature_layers={list(feature_layers)} must lie in 1..{transformer.depth}")
        dim = transformer.dim
        self.image_tokenizer = image_tokenizer.eval().requires_grad_(False)
        self.feature_layers = tuple(feature_layers)
        self.prompt_encoder = PromptEncoder(
            WordTokenizer(vocabulary, max_words), replace(transformer, depth=text_depth)
        )
        self.codes = nn.Parameter(torch.zeros(image_tokenizer.codebook_size, dim))
        self.code_proj = nn.Linear(image_tokenizer.code_vectors.shape[1], dim, bias=False)
        self.rows = nn.Parameter(torch.zeros(image_tokenizer.grid, 1, dim))
        self.columns = nn.Parameter(torch.zeros(1, image_tokenizer.grid, dim))
        self.transformer = Transformer(transformer)
        self.norm = nn.LayerNorm(dim)
        for weight in (self.codes, self.rows, self.columns):
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.code_proj.weight, std=0.05 * self.code_proj.in_features**-0.5)

    def cache_key(self) -> dict[str, Any]:
        """Its weights, its sizes, its words, and the layers that verifiers read."""
        return {
            "class": class_name(self),
            "weights": fingerprint(self),
            "transformer": key_of(self.transformer.config),
            "text": self.prompt_encoder.tokenizer.cache_key(),
            "feature_layers": list(self.feature_layers),
        }

    @property
    def dim(self) -> int:
        return self.transformer.config.dim

    @property
    def max_words(self) -> int:
        """Longest prompt; see `Decoder`."""
        return self.prompt_encoder.tokenizer.max_words

    def word_spans(self, prompt: str) -> list[tuple[int, int]]:
        return self.prompt_encoder.tokenizer.spans(prompt)

    @property
    def _positions(self) -> Tensor:
        """Position embeddings, [T, dim]."""
        return (self.rows + self.columns).flatten(0, 1)

    def word_ids(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> word ids [B, L] on the decoder's device; raises ValueError for unknown words."""
        return self.prompt_encoder.tokenizer(prompts).to(self.rows.device)

    def _code_embeddings(self) -> Tensor:
        """Embeddings of all codes, [V, dim]: a map of what they look like, and a part of each one's own.

        The map carries what is learned of one code over to its look-alikes, a red rim's to a blue one's: without it
        the decoder hardly combines classes and colours that no training prompt names together.
        """
        return self.code_proj(self.image_tokenizer.code_vectors) + self.codes

    def _embed(self, codes: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings, with positions, of an image's first tokens [B, S], given those of all codes."""
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

    def _read(self, hidden: Sequence[Tensor]) -> Tensor:
        """Hidden states of every layer [..., dim] -> those that verifiers read, side by side, [..., F]."""
        return torch.cat([hidden[depth - 1] for depth in self.feature_layers], dim=-1)

    def _token_logits(self, word_ids: Tensor, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of each token of images [B, T] given the prompt and the tokens before it."""
        codes = self._code_embeddings()
        return self._logits(codes, self._run(codes, word_ids, tokens)[1][-1])

    def token_log_probs(self, word_ids: Tensor, tokens: Tensor) -> Tensor:
        """log p(token t | prompt, tokens < t) for word ids [B, L] and tokens [B, T] -> [B, T]. Differentiable."""
        logits = self._token_logits(word_ids, tokens).float()
        return -nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if a prompt has an unknown word or too many; see `Decoder`."""
        self.word_ids(prompts)

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
        """Features of every token of finished images, from a pass with each prompt and one without any.

        Args:
            prompts: B * c of them.
            tokens: images, [B, T]; each stands for c prompts, which are neighbours.
        """
        word_ids = self.word_ids(prompts)
        copies = len(word_ids) // len(tokens)
        codes = self._code_embeddings()
        _, hidden = self._run(codes, torch.zeros_like(word_ids[::copies]), tokens)
        unconditional = self._logits(codes, hidden[-1]).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        unconditional_hidden = self._read(hidden)
        tokens = tokens.repeat_interleave(copies, 0)
        prompt, hidden = self._run(codes, word_ids, tokens)
        log_p = self._logits(codes, hidden[-1]).log_softmax(-1)
        return DecoderFeatures(
            prompt=self.prompt_encoder.read(word_ids, prompt),
            embeddings=self._embed(codes, tokens),
            hidden=self._read(hidden),
            unconditional_hidden=unconditional_hidden.repeat_interleave(copies, 0),
            log_probs=log_p.gather(-1, tokens[..., None]).squeeze(-1),
            unconditional_log_probs=unconditional.repeat_interleave(copies, 0),
            entropy=-(log_p.exp() * log_p).sum(-1),
        )

    @torch.no_grad()
    def features_from_cache(self, prompts: Sequence[str], tokens: Tensor, **stored: Tensor) -> DecoderFeatures:
        """Features that were stored while decoding B images [B, T], with what follows cheaply from prompts and tokens.

        Args:
            prompts: B of them.
            tokens: [B, T].
            stored: the other fields of `DecoderFeatures`.
        """
        word_ids = self.word_ids(prompts)
        embeddings = self._embed(self._code_embeddings(), tokens)
        prompt = self.prompt_encoder.read(word_ids, self.prompt_encoder(word_ids))
        return DecoderFeatures(prompt=prompt, embeddings=embeddings, **stored)

    def training_features(
        self, batch: Mapping[str, Any], finished: float = 0.0, fraction: float | None = None
    ) -> DecoderFeatures:
        if "features" in batch:
            return self.features_from_cache(batch["prompt"], batch["tokens"], **batch["features"])
        return self.features(batch["prompt"], batch["tokens"])

    def preview(self, state: NextTokenState, proposal: NextTokenProposal | None = None) -> Tensor:
        """The tokens so far as pixels; what is not decided yet is grey. See `Decoder`."""
        tokens, known = state.tokens, state.fixed
        if proposal is not None:
            k, position = proposal.tokens.shape[1], state.position.to(tokens.device)[:, None]
            newest = proposal.tokens.flatten(0, 1)
            position = position.repeat_interleave(k, 0)
            tokens = tokens.repeat_interleave(k, 0).scatter(1, position, newest)
            known = known.repeat_interleave(k, 0).scatter(1, position, True)
        pixels = self.image_tokenizer.decode(tokens)
        side = pixels.shape[-1] // self.image_tokenizer.grid
        cells = known.view(-1, 1, self.image_tokenizer.grid, self.image_tokenizer.grid)
        return torch.where(cells.repeat_interleave(side, 2).repeat_interleave(side, 3), pixels, 0.5)

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
        self,
        prompts: Sequence[str],
        tokens: Tensor,
        features: DecoderFeatures,
        values: Values,
        patches: int,
        cost: Cost,
    ) -> Tensor:
        """What each token added when it came; see `Decoder`."""
        after = values(features, range(1, self.num_tokens + 1)).exp()
        cost.verifier_calls += after.numel()
        return after.diff(dim=1, prepend=after[:, :1])

    def noise(self, seeds: Sequence[int], k: int, sampling: Sampling) -> Tensor:
        """Uniform noise [B, 1 + k, T]; see `Decoder`."""
        return uniform_noise(seeds, k, self.num_tokens)

    @torch.no_grad()
    def begin(self, request: Request, sampling: Sampling, k: int = 1) -> NextTokenState:
        """Encode the prompts, with their unconditional twin, and read what is fixed; see `Decoder`.

        Tokens that stay are read, not decided: those before the first open one in the same pass as the prompt, later
        ones in the pass of the decided token before them. So there are as many passes as the row with most has open
        tokens, and at most one more.
        """
        ids = self.word_ids(request.prompts)
        tokens, fixed = request.tokens, request.fixed_mask
        if tokens is None or fixed is None:
            tokens = ids.new_zeros(len(ids), self.num_tokens)
            fixed = torch.zeros_like(tokens, dtype=torch.bool)
        order = decision_order(fixed.cpu())
        prompt = self.prompt_encoder(torch.cat([ids, torch.zeros_like(ids)]))
        cache = KVCache(prompt.shape[1] + self.num_tokens)
        codes = self._code_embeddings()
        tokens = tokens.to(ids.device, copy=True)
        first = order[:, 0]
        known = self._embed(codes, tokens[:, : int(first.max())]).repeat(2, 1, 1)
        hidden = self.transformer(torch.cat([prompt, known], 1), causal=True, cache=cache)
        cache.lengths = prompt.shape[1] + first.repeat(2)
        hidden = [h[:, prompt.shape[1] - 1 :] for h in hidden]
        read = self.prompt_encoder.read(ids, prompt[: len(ids)])
        width = self.dim * len(self.feature_layers)
        state = NextTokenState(
            tokens=tokens,
            fixed=fixed.to(ids.device, copy=True),
            order=order,
            step=0,
            sampling=sampling,
            noise=self.noise(request.seeds, k, sampling).to(prompt.device),
            codes=codes,
            prompt=read,
            log_probs=torch.zeros(order.shape, device=prompt.device),
            cost=Cost(),
            features=DecoderFeatures.empty(read, self.num_tokens, self.dim, width),
            cache=cache,
            hidden=prompt.new_empty(len(prompt), width),
            logits=prompt.new_empty(len(prompt), len(codes)),
        )
        state.cost.count_pass(*known.shape[:2])
        self._advance(state, hidden, torch.full_like(first, -1))
        return state

    def _features(
        self, prompt: Tensor, codes: Tensor, tokens: Tensor, positions: Tensor, hidden: Tensor, logits: Tensor
    ) -> DecoderFeatures:
        """Features of tokens [B, S] at positions [B, S or 1], from hidden states and logits [2B, S or 1, ...]."""
        log_p, unconditional = logits.log_softmax(-1).chunk(2)

        def of_tokens(log_probs: Tensor) -> Tensor:
            return log_probs.expand(-1, tokens.shape[1], -1).gather(-1, tokens[..., None]).squeeze(-1)

        return DecoderFeatures(
            prompt=prompt,
            embeddings=codes[tokens] + self._positions[positions],
            hidden=hidden[: len(tokens)],
            unconditional_hidden=hidden[len(tokens) :],
            log_probs=of_tokens(log_p),
            unconditional_log_probs=of_tokens(unconditional),
            entropy=-(log_p.exp() * log_p).sum(-1),
        )

    def _advance(self, state: NextTokenState, hidden: Sequence[Tensor], last: Tensor) -> None:
        """Note what a pass says of the tokens it read, and go on to the next one to decide.

        Args:
            state: whose `position` is the next one to decide.
            hidden: of every layer, [2B, S, dim]; entry i of row b predicts position last[b] + 1 + i.
            last: [B], on the CPU.
        """
        ahead = (state.position - last - 1).clamp(min=0)  # tokens that were kept and are passed
        logits, read = self._logits(state.codes, hidden[-1]), self._read(hidden)
        both, column = torch.arange(len(logits)), ahead.repeat(2)
        moved = (state.position > last).repeat(2).to(logits.device)[:, None]
        state.hidden = torch.where(moved, read[both, column], state.hidden)
        state.logits = torch.where(moved, logits[both, column], state.logits)
        if not ahead.any():
            return
        offset = torch.arange(int(ahead.max()))
        positions = (last[:, None] + 1 + offset).clamp(max=self.num_tokens - 1).to(state.tokens.device)
        tokens = state.tokens.gather(1, positions)
        passed = self._features(
            state.prompt, state.codes, tokens, positions, read[:, : len(offset)], logits[:, : len(offset)]
        )
        rows, columns = (offset < ahead[:, None]).nonzero(as_tuple=True)
        state.features.write(rows, last[rows] + 1 + columns, passed, columns)

    @torch.no_grad()
    def propose(self, state: NextTokenState, k: int, distinct: bool = False) -> NextTokenProposal:
        """k candidates for the next token, all from the one forward pass that led to this state.

        Candidates are independent draws, or `distinct` ones (drawn without replacement); a token that is kept is its
        own only candidate, k times.
        """
        conditional, unconditional = state.logits.chunk(2)
        noise = state.noise[:, 1 : k + 1, state.step]
        tokens, log_probs = draw(conditional, unconditional, state.sampling, noise, distinct)
        position = state.position.to(tokens.device)[:, None]
        fixed = state.fixed.gather(1, position)
        tokens = torch.where(fixed, state.tokens.gather(1, position), tokens)
        log_probs = log_probs.masked_fill(fixed, 0.0)
        features = self._features(
            state.prompt, state.codes, tokens, position, state.hidden[:, None], state.logits[:, None]
        )
        return NextTokenProposal(tokens[..., None], log_probs, features)

    @torch.no_grad()
    def commit(self, state: NextTokenState, proposal: NextTokenProposal, choice: Tensor) -> None:
        """Candidate `choice` [B] is the next token; unless it is the last one, run the next forward pass."""
        rows, last = torch.arange(len(choice), device=choice.device), state.position
        here = rows, last.to(choice.device)
        state.tokens[here], state.fixed[here] = proposal.tokens[rows, choice, 0], True
        state.log_probs[:, state.step] = proposal.log_probs[rows, choice]
        state.features.write(*here, proposal.features.pick(choice), torch.zeros_like(choice))
        state.step += 1
        if state.is_done:
            return
        counts = state.position - last  # the decided token and the kept ones after it; none of finished rows
        positions = (last[:, None] + torch.arange(int(counts.max()))).clamp(max=self.num_tokens - 1).to(choice.device)
        x = (state.codes[state.tokens.gather(1, positions)] + self._positions[positions]).repeat(2, 1, 1)
        if (counts == 1).all():
            hidden = self.transformer.step(x, state.cache)
            state.cache.commit(torch.zeros(len(x), dtype=torch.int64, device=x.device))
        else:
            hidden = self.transformer.extend(x, counts.repeat(2), state.cache)
        state.cost.count_pass(*x.shape[:2])
        self._advance(state, hidden, last)
