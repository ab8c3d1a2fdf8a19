"""The shared decoder: a Transformer that predicts an image's tokens one after the other, given a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightning_modules.backbone.decoder import Cost, Decoder
from lightning_modules.backbone.evidence import Evidence
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.sampling import Sampling, draw, uniform_noise
from lightning_modules.backbone.text import PromptEncoder, WordTokenizer
from lightning_modules.backbone.transformer import KVCache, Transformer, TransformerConfig


@dataclass(frozen=True)
class Proposal:
    """k candidates for the next token.

    Attributes:
        tokens: [B, k].
        sampling_log_probs: log-probability of each under the sampling distribution (temperature, top-k, top-p,
            guidance), [B, k].
        evidence: what the decoder knows about each, for a verifier.
    """

    tokens: Tensor
    sampling_log_probs: Tensor
    evidence: Evidence

    def unfold(self) -> "Proposal":
        """k candidates of B rows as one candidate each of B * k rows."""
        return Proposal(
            self.tokens.flatten()[:, None], self.sampling_log_probs.flatten()[:, None], self.evidence.unfold()
        )


@dataclass
class DecodingState:
    """B half-decoded images.

    Attributes:
        tokens: [B, T], filled up to `length`.
        length: tokens decided.
        sampling: how candidates are drawn.
        noise: uniform noise, [B, 1 + K, T]; row 0 is for choosing, row 1 + j for candidate j.
        prompt: what verifiers read of it, [B, L, 2 dim].
        codes: embeddings of all codes, [V, dim].
        cache: keys and values, conditional rows first, then the unconditional ones.
        hidden: hidden states that predict the next token, [2B, F]; conditional rows first.
        logits: of the next token, [2B, V].
        cost: shared by all states that come from one `begin`.
    """

    tokens: Tensor
    length: int
    sampling: Sampling
    noise: Tensor
    prompt: Tensor
    codes: Tensor
    cache: KVCache
    hidden: Tensor
    logits: Tensor
    cost: Cost = field(default_factory=Cost)

    @property
    def done(self) -> bool:
        return self.length == self.tokens.shape[1]

    def select(self, rows: Tensor) -> "DecodingState":
        """A state of rows `rows` [B'], in that order and as often as they occur."""
        both = torch.cat([rows, rows + len(self.tokens)])
        return replace(
            self,
            tokens=self.tokens[rows],
            noise=self.noise[rows],
            prompt=self.prompt[rows],
            cache=self.cache.select(both),
            hidden=self.hidden[both],
            logits=self.logits[both],
        )

    def fork(self, k: int) -> "DecodingState":
        """k paths per row, neighbours in the batch; path j draws with the noise of candidate j."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(k)
        paths = self.select(rows)
        lane = 1 + torch.arange(k, device=rows.device).repeat(len(self.tokens))
        own = paths.noise[torch.arange(len(rows), device=rows.device), lane]
        return replace(paths, noise=torch.stack([paths.noise[:, 0], own], dim=1))


class NextTokenDecoder(Decoder):
    """Prompts in, image tokens out, one token a step (`H0 = concat(prompt embeddings, image tokens < t)`).

    Args:
        image_tokenizer: fixes the number of tokens and the codebook; turns tokens into pixels.
        vocabulary: the words that prompts consist of.
        max_words: longest prompt, words.
        transformer: sizes of the decoder.
        text_depth: layers of the prompt encoder, which has the decoder's width and heads.
        evidence_depths: after which layers (1 = first) hidden states are read by verifiers.
    """

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        vocabulary: Sequence[str],
        max_words: int,
        transformer: TransformerConfig,
        text_depth: int,
        evidence_depths: Sequence[int],
    ) -> None:
        super().__init__()
        if not all(1 <= depth <= transformer.depth for depth in evidence_depths):
            raise ValueError(f"evidence_depths={list(evidence_depths)} must lie in 1..{transformer.depth}")
        dim = transformer.dim
        self.image_tokenizer = image_tokenizer.eval().requires_grad_(False)
        self.evidence_depths = tuple(evidence_depths)
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

    @property
    def dim(self) -> int:
        return self.transformer.config.dim

    @property
    def max_words(self) -> int:
        """Longest prompt; see `Decoder`."""
        return self.prompt_encoder.tokenizer.max_words

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
        return torch.cat([hidden[depth - 1] for depth in self.evidence_depths], dim=-1)

    def log_probs(self, word_ids: Tensor, tokens: Tensor) -> Tensor:
        """log p(token t | prompt, tokens < t) for word ids [B, L] and tokens [B, T] -> [B, T]. Differentiable."""
        codes = self._code_embeddings()
        logits = self._logits(codes, self._run(codes, word_ids, tokens)[1][-1])
        return -nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError if a prompt has an unknown word or too many; see `Decoder`."""
        self.word_ids(prompts)

    def nll(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood of images [B, T], nats a token; see `Decoder`."""
        return -self.log_probs(self.word_ids(prompts), tokens).mean()

    def pair_log_probs(
        self, prompts: Sequence[str], chosen: Tensor, rejected: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """log p of both images of B pairs, exact; see `Decoder`."""
        word_ids = self.word_ids(prompts).repeat(2, 1)
        first, second = self.log_probs(word_ids, torch.cat([chosen, rejected])).sum(1).chunk(2)
        return first, second

    @torch.no_grad()
    def evidence(self, prompts: Sequence[str], tokens: Tensor) -> Evidence:
        """Evidence about every token of finished images, from a pass with each prompt and one without any.

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
        return Evidence(
            prompt=self.prompt_encoder.read(word_ids, prompt),
            embeddings=self._embed(codes, tokens),
            hidden=self._read(hidden),
            unconditional_hidden=unconditional_hidden.repeat_interleave(copies, 0),
            log_probs=log_p.gather(-1, tokens[..., None]).squeeze(-1),
            unconditional_log_probs=unconditional.repeat_interleave(copies, 0),
            entropy=-(log_p.exp() * log_p).sum(-1),
        )

    @torch.no_grad()
    def recall(self, prompts: Sequence[str], tokens: Tensor, **stored: Tensor) -> Evidence:
        """Evidence that was stored while decoding, without what follows from prompts and tokens cheaply.

        Args:
            prompts: B of them.
            tokens: [B, T].
            stored: the other fields of `Evidence`.
        """
        word_ids = self.word_ids(prompts)
        embeddings = self._embed(self._code_embeddings(), tokens)
        prompt = self.prompt_encoder.read(word_ids, self.prompt_encoder(word_ids))
        return Evidence(prompt=prompt, embeddings=embeddings, **stored)

    def noise(self, seeds: Sequence[int], k: int, sampling: Sampling) -> Tensor:
        """Uniform noise [B, 1 + k, T]; see `Decoder`."""
        return uniform_noise(seeds, k, self.num_tokens)

    @torch.no_grad()
    def begin(self, prompts: Sequence[str], noise: Tensor, sampling: Sampling) -> DecodingState:
        """Start decoding one image per prompt; the prompt is encoded once, with its unconditional twin.

        Args:
            prompts: B prompts.
            noise: of the images, [B, 1 + K, T], for up to K candidates a step.
            sampling: how candidates are drawn.
        """
        ids = self.word_ids(prompts)
        prompt = self.prompt_encoder(torch.cat([ids, torch.zeros_like(ids)]))
        cache = KVCache(prompt.shape[1] + self.num_tokens)
        codes = self._code_embeddings()
        hidden = [h[:, -1] for h in self.transformer(prompt, causal=True, cache=cache)]
        state = DecodingState(
            tokens=ids.new_zeros(len(ids), self.num_tokens),
            length=0,
            sampling=sampling,
            noise=noise.to(prompt.device),
            prompt=self.prompt_encoder.read(ids, prompt[: len(ids)]),
            codes=codes,
            cache=cache,
            hidden=self._read(hidden),
            logits=self._logits(codes, hidden[-1]),
        )
        state.cost.decoder_passes += len(prompt)
        return state

    @torch.no_grad()
    def propose(self, state: DecodingState, k: int, distinct: bool = False) -> Proposal:
        """k candidates for the next token, all from the one forward pass that led to this state.

        Candidates are independent draws, or `distinct` ones (drawn without replacement).
        """
        conditional, unconditional = state.logits.chunk(2)
        noise = state.noise[:, 1 : k + 1, state.length]
        tokens, sampling_log_probs = draw(conditional, unconditional, state.sampling, noise, distinct)
        log_p = conditional.log_softmax(-1)
        evidence = Evidence(
            prompt=state.prompt,
            embeddings=state.codes[tokens] + self._positions[state.length],
            hidden=state.hidden[: len(tokens), None],
            unconditional_hidden=state.hidden[len(tokens) :, None],
            log_probs=log_p.gather(-1, tokens),
            unconditional_log_probs=unconditional.log_softmax(-1).gather(-1, tokens),
            entropy=-(log_p.exp() * log_p).sum(-1, keepdim=True),
        )
        return Proposal(tokens, sampling_log_probs, evidence)

    @torch.no_grad()
    def commit(self, state: DecodingState, proposal: Proposal, choice: Tensor) -> None:
        """Candidate `choice` [B] is the next token; unless it is the last one, run the next forward pass."""
        tokens = proposal.tokens.gather(1, choice[:, None]).squeeze(1)
        state.tokens[:, state.length] = tokens
        state.length += 1
        if state.done:
            return
        x = (state.codes[tokens] + self._positions[state.length - 1])[:, None].repeat(2, 1, 1)
        hidden = [h[:, 0] for h in self.transformer.step(x, state.cache)]
        state.cache.commit(torch.zeros(len(x), dtype=torch.int64, device=x.device))
        state.hidden = self._read(hidden)
        state.logits = self._logits(state.codes, hidden[-1])
        state.cost.decoder_passes += len(x)
