"""What decoding had to choose from on its way, and what it took: enough to replay it and to draw it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """At one time, c candidates for each of B images, and which of them went on.

    Nothing is copied for it: these are tensors that decoding has at hand anyway.

    Attributes:
        judge: the name of who scored them.
        tokens: images as far as they were made, [B, c, T], or of each the newest token alone, [B, c, 1], where all
            candidates share those before, which are the image's own.
        decided: tokens that were decided with these, counted from the first, [B], on the CPU; None where all are, or
            where the others are previews.
        scores: of verifiers log-values, [B, c]; NaN of candidates that were not there, or not judged.
        kept: how often each went on, [B, c].
    """

    judge: str
    tokens: Tensor
    decided: Tensor | None
    scores: Tensor
    kept: Tensor

    def select(self, rows: Tensor) -> "Choice":
        """Of some of the images."""
        decided = None if self.decided is None else self.decided[rows.cpu()]
        return Choice(self.judge, self.tokens[rows], decided, self.scores[rows], self.kept[rows])


@dataclass(frozen=True)
class ReflectionRound:
    """A round of reflection on b of the images.

    Attributes:
        judge: the name of who scored them.
        rows: which ones, [b].
        region_mask: what was decoded again, bool [b, T].
        before, after: tokens [b, T].
        scores: of the judge, before and after, [b, 2].
        accepted: bool [b].
    """

    judge: str
    rows: Tensor
    region_mask: Tensor
    before: Tensor
    after: Tensor
    scores: Tensor
    accepted: Tensor

    def select(self, rows: Tensor) -> "ReflectionRound":
        """Of some of the images, whose numbers are those in `rows`."""
        new, old = (rows[:, None] == self.rows).nonzero(as_tuple=True)
        parts = (part[old] for part in (self.region_mask, self.before, self.after, self.scores, self.accepted))
        return ReflectionRound(self.judge, new, *parts)
