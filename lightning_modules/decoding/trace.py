"""The trace of decoding: its choices on the way to an image, to replay and to draw them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A choice among c candidates for each of B images. Its tensors are those of decoding, not copies.

    Attributes:
        judge: name of the judge that scored them.
        tokens: images as far as they were made, [B, c, T], or the newest token alone, [B, c, 1], after the image's own.
        decided: number of tokens decided with these, [B], on the CPU; None where all are, or others are previews.
        scores: of verifiers log-values, [B, c]; NaN of candidates that were not there, or not judged.
        kept: how often each continues, [B, c].
        drawn: what continues was drawn by chance, the higher its score the likelier; otherwise the best continues.
    """

    judge: str
    tokens: Tensor
    decided: Tensor | None
    scores: Tensor
    kept: Tensor
    drawn: bool = False

    def select(self, rows: Tensor) -> "Choice":
        """Keep some of the images."""
        decided = None if self.decided is None else self.decided[rows.cpu()]
        return Choice(self.judge, self.tokens[rows], decided, self.scores[rows], self.kept[rows], self.drawn)


@dataclass(frozen=True)
class ReflectionRound:
    """A round of reflection on b of the images.

    Attributes:
        judge: name of the judge that scored them.
        rows: numbers of these images, [b].
        region_mask: the tokens that were decoded anew, bool [b, T].
        before, after: tokens [b, T], and `scores` of both, [b, 2].
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
        """Keep some of the images; their numbers become the places in `rows`."""
        new, old = (rows[:, None] == self.rows).nonzero(as_tuple=True)
        parts = (part[old] for part in (self.region_mask, self.before, self.after, self.scores, self.accepted))
        return ReflectionRound(self.judge, new, *parts)
