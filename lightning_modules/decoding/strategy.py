"""What every strategy is given and gives back."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbone.decoder import Cost, Decoder, TokenDecoder
from lightning_modules.backbone.evidence import Evidence
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.mask_state import MaskState, Trajectory
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.next_token import DecodingState, NextTokenDecoder
from lightning_modules.backbone.sampling import Sampling, image_seed
from lightning_modules.decoding.trace import Choice, Round
from lightning_modules.identity import Keyed, fields_key
from lightning_modules.rewards.verifier import Reward, StepJudge, Verifier

Judges = Mapping[str, Verifier[Any] | Reward]


@dataclass(frozen=True)
class Decoded:
    """B finished images.

    Attributes:
        tokens: [B, T].
        evidence: what the decoder knew about each token when it was chosen; None from decoders that do not say.
        cost: of the whole batch, candidates that were not kept included.
        free_from: tokens (of mask-token decoders: steps) from this one on were drawn from the decoder alone, [B]; 0 in
            plain sampling.
        trajectory: of mask-token decoders: how each grid was filled.
        trace: what was chosen on the way, and what reflection did.
        notes: numbers about how each image was made, to be logged, [B] each.
    """

    tokens: Tensor
    evidence: Evidence | None
    cost: Cost
    free_from: Tensor
    trajectory: Trajectory | None = None
    trace: Sequence[Choice | Round] = ()
    notes: Mapping[str, Tensor] = field(default_factory=dict)

    def select(self, rows: Tensor) -> "Decoded":
        """Some of the images; the cost stays that of all."""
        return Decoded(
            self.tokens[rows],
            self.evidence and self.evidence.select(rows),
            self.cost,
            self.free_from[rows.cpu()],
            self.trajectory and self.trajectory.select(rows),
            [event.select(rows) for event in self.trace],
            {name: note[rows] for name, note in self.notes.items()},
        )

    def put(self, rows: Tensor, other: "Decoded") -> "Decoded":
        """With the images of `other` in the place of those at `rows`; the cost stays this one's.

        Of a trajectory it is the end that is replaced.
        """
        tokens, free_from = self.tokens.index_put((rows,), other.tokens), self.free_from.clone()
        free_from[rows.cpu()] = other.free_from.to(free_from.dtype)
        evidence = self.evidence and other.evidence and self.evidence.put(rows, other.evidence)
        trajectory = self.trajectory and other.trajectory and self.trajectory.put(rows, other.trajectory)
        return replace(self, tokens=tokens, evidence=evidence, free_from=free_from, trajectory=trajectory)

    def all_chosen(self, rows: Tensor) -> "Decoded":
        """With images of which nothing is left that the decoder drew without a judge's say, but the finished image."""
        last = self.tokens.shape[1] if self.trajectory is None else self.trajectory.previews.shape[1] - 1
        return replace(self, free_from=self.free_from.index_fill(0, rows.cpu(), last))


def finished(state: DecodingState | MaskState, free_from: Tensor, trace: Sequence[Choice] = ()) -> Decoded:
    """What a state that is done has come to."""
    trajectory = state.trajectory if isinstance(state, MaskState) else None
    return Decoded(state.tokens, state.evidence, state.cost, free_from, trajectory, trace)


class Strategy(Keyed):
    """A way to decode; strategies know judges by name, so that a config can be read before anything is trained."""

    def cache_key(self) -> Any:
        """Its class and all its fields, of what it wraps as well; strategies that are no dataclasses say their own."""
        return fields_key(self)

    @property
    @abstractmethod
    def judge_names(self) -> Sequence[str]:
        """Names of all judges by which it, or what it wraps, chooses."""

    @property
    @abstractmethod
    def images_at_once(self) -> int:
        """Images, or candidates for one, that are decoded side by side for each image that is asked for."""

    @abstractmethod
    def decode(
        self,
        decoder: Decoder,
        judges: Judges,
        prompts: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Decoded:
        """Decode one image for each prompt (GenEval metadata), each with the noise of its own seed.

        With `tokens` [B, T] and `keep`, bool [B, T], the kept tokens stay as they are and the others are decoded anew.
        """


def judge_named(judges: Judges, name: str) -> Verifier[Any] | Reward:
    """Look up a judge of finished images; raises ValueError with the names there are."""
    if name not in judges:
        raise ValueError(f"judge {name!r} does not exist here; there are: {', '.join(judges)}")
    return judges[name]


def judged(
    judge: Verifier[Any] | Reward,
    decoder: Decoder,
    prompts: Sequence[Mapping[str, Any]],
    tokens: Tensor,
    evidence: Evidence | None,
) -> Tensor:
    """What a judge says of finished images [B, T]: a verifier's log-value, or a reward, [B]."""
    if isinstance(judge, Verifier):
        if evidence is None:
            raise ValueError(f"{type(judge).__name__} reads what {type(decoder).__name__} does not tell; name a reward")
        return judge.values(evidence, [decoder.num_tokens])[:, 0]
    return judge(prompts, decoder.image_tokenizer.decode(tokens))


def candidate_seeds(seeds: Sequence[int], n: int) -> list[int]:
    """Seeds of n candidates for each image, neighbours; the first of them is the image's own."""
    return [seed if j == 0 else image_seed(seed, j) for seed in seeds for j in range(n)]


def next_token(decoder: Decoder, strategy: str) -> NextTokenDecoder:
    """The decoder, which must be a next-token one; raises ValueError."""
    if not isinstance(decoder, NextTokenDecoder):
        raise ValueError(f"{strategy} needs a next-token decoder, and {type(decoder).__name__} is none")
    return decoder


def begin_paths(
    decoder: Decoder,
    verifier: Verifier[Any],
    prompts: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    n: int,
    k: int,
    sampling: Sampling | MaskSampling,
    tokens: Tensor | None,
    keep: Tensor | None,
) -> tuple[Any, Any]:
    """Paths of B images, n of each, neighbours, with a verifier beside them: n paths share one pass over the prompt.

    Args:
        n: paths of each image; the first has the image's own noise.
        k: candidates a step of each.
        prompts, seeds, tokens, keep: see `Strategy.decode`.
    """
    check_readable(decoder)
    own, noise = (decoder.noise(each, k, sampling) for each in (seeds, candidate_seeds(seeds, n)))
    state = decoder.begin([row["prompt"] for row in prompts], own, sampling, tokens, keep)
    paths = torch.arange(len(prompts), device=state.tokens.device).repeat_interleave(n)
    watch = verifier.begin(state.prompt, decoder.num_tokens).select(paths)
    return replace(state.select(paths), noise=noise.to(paths.device)), watch


def decided_before(state: DecodingState | MaskState) -> Tensor | None:
    """The `decided` of a `Choice` among tokens that come after what a state has decided."""
    return None if isinstance(state, MaskState) else state.position


def check_readable(decoder: Decoder) -> None:
    """Raise ValueError if a decoder gives verifiers in token space nothing to read."""
    if not (isinstance(decoder, TokenDecoder) and decoder.evidence_depths):
        raise ValueError(f"verification needs evidence, and this {type(decoder).__name__} has no evidence_depths")


def previewing(decoder: Decoder, strategy: str) -> MaskTokenDecoder:
    """The decoder, which must preview the whole image at every step; raises ValueError."""
    if not isinstance(decoder, MaskTokenDecoder):
        raise ValueError(f"{strategy} need previews, which {type(decoder).__name__} does not give")
    return decoder


def step_judge_named(judges: Judges, name: str) -> StepJudge:
    """Look up a judge that must be one of unfinished images; raises ValueError with the names there are."""
    judge = judges.get(name)
    if not isinstance(judge, StepJudge):
        known = ", ".join(key for key, value in judges.items() if isinstance(value, StepJudge))
        raise ValueError(f"judge {name!r} cannot judge unfinished images; there are: {known or 'none'}")
    return judge


def verifier_named(judges: Judges, name: str) -> Verifier[Any]:
    """Look up a judge that must be a verifier; raises ValueError with the names there are."""
    judge = judges.get(name)
    if not isinstance(judge, Verifier):
        known = ", ".join(key for key, value in judges.items() if isinstance(value, Verifier))
        raise ValueError(f"verifier {name!r} does not exist here; there are: {known}")
    return judge
