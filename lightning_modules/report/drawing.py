"""How an image came about, in small pictures: the steps on the way, the candidates, what reflection changed."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.decoding.strategy import Decoded, Judges, judged
from lightning_modules.decoding.trace import Choice, ReflectionRound
from lightning_modules.rewards.verifier import Ability, Judge

_MOMENTS = 8  # drawn of what may have hundreds of steps
_LARGEST = 96  # pixels along the longer side of a frame
_MARKED = (255, 96, 0)  # the colour over what reflection marked


@dataclass(frozen=True)
class Frame:
    """A caption, how often what is shown was kept, and whether by chance, though another one scored higher."""

    caption: str
    kept: int = 0
    drawn: bool = False


@dataclass(frozen=True)
class ImageStrip:
    """Frames of one size side by side, as one PNG, transparent where nothing is decided yet."""

    title: str
    picture: bytes
    width: int
    height: int
    frames: list[Frame]


@dataclass(frozen=True)
class Curve:
    """Scores over all steps: the lowest and the highest candidate's and that of what was kept."""

    low: list[float]
    high: list[float]
    kept: list[float]


@dataclass(frozen=True)
class Section:
    """A part of how an image was made, with a title and how it ended, where that needs to be said."""

    title: str
    strips: list[ImageStrip]
    curve: Curve | None = None
    note: str = ""


@dataclass(frozen=True)
class TraceView:
    """What judges say of a finished image, by name, and how it was made. Values of verifiers are probabilities."""

    scores: dict[str, float]
    sections: list[Section]


def trace_views(
    decoder: Decoder,
    judges: Judges,
    asked: Sequence[str],
    prompts: Sequence[Mapping[str, Any]],
    decoded: Decoded,
    with_trace: bool,
) -> list[TraceView]:
    """Return a view of each of B images.

    Args:
        decoder: of the images.
        judges: by name.
        asked: names of those that score the finished images; verifiers only where there are features.
        prompts: GenEval metadata.
        decoded: the images, with their trace.
        with_trace: draw how they were made; otherwise there are scores alone.
    """
    scores = {}
    for name in asked:
        if decoded.features is not None or Ability.PREFIXES not in judges[name].abilities:
            values = judged(judges[name], decoder, prompts, decoded.tokens, decoded.features)
            scores[name] = judges[name].as_probability(values).tolist()
    views = []
    for i in range(len(prompts)):
        image = decoded.select(torch.tensor([i], device=decoded.tokens.device))
        own = {name: values[i] for name, values in scores.items()}
        views.append(TraceView(own, _sections(decoder, judges, image) if with_trace else []))
    return views


def format_score(score: float) -> str:
    """Return a score in few digits."""
    return f"{score:.3g}"


def format_scores(scores: Sequence[float]) -> list[str]:
    """Return scores in as many digits as it takes to tell different ones apart; NaN is not judged."""
    known = {score for score in scores if score == score}
    digits = next((n for n in range(3, 9) if len({f"{score:.{n}g}" for score in known}) == len(known)), 9)
    return [f"{score:#.{digits}g}".rstrip(".") if score == score else "not judged" for score in scores]


def _sections(decoder: Decoder, judges: Judges, image: Decoded) -> list[Section]:
    """The sections of one image (B = 1)."""
    rounds = [event for event in image.trace if isinstance(event, ReflectionRound) and len(event.rows)]
    first = rounds[0].before[0] if rounds else image.tokens[0]
    sections = []
    if (on_the_way := decoder.frames(first, image.trajectory, _MOMENTS)) is not None:
        frames = [Frame(caption) for caption in on_the_way.captions]
        sections.append(
            Section(
                "On the way", [_strip(on_the_way.title, _pixels(decoder, on_the_way.tokens, on_the_way.shown), frames)]
            )
        )
    choices = [event for event in image.trace if isinstance(event, Choice)]
    for (name, k), group in groupby(choices, key=lambda choice: (choice.judge, choice.scores.shape[1])):
        sections.append(_choices(decoder, judges[name], f"{k} candidates, scored by {name}", first, list(group)))
    for name, own in groupby(rounds, key=lambda event: event.judge):
        strips = [_round(decoder, judges[name], number, event) for number, event in enumerate(own, 1)]
        sections.append(Section(f"Reflection, scored by {name}", strips))
    if "satisfied" in image.stats:
        note = _end_of_reflection(len(rounds), bool(image.stats["satisfied"][0]))
        sections.append(replace(sections.pop(), note=note) if rounds else Section("Reflection", [], note=note))
    return sections


def _end_of_reflection(rounds: int, satisfied: bool) -> str:
    """Say why reflection stopped."""
    if not rounds:
        return "Satisfied at once: nothing was decoded again." if satisfied else "Found no part to decode again."
    times = f"{rounds} round{'s' if rounds > 1 else ''}"
    return f"Satisfied after {times}." if satisfied else f"Stopped after {times}, not satisfied."


def _choices(decoder: Decoder, judge: Judge, title: str, image: Tensor, group: Sequence[Choice]) -> Section:
    """Choices among as many candidates: a curve of all, and pictures of those whose scores differ most.

    Of many, those among equal candidates are not drawn at all.
    """
    scores = judge.as_probability(torch.cat([choice.scores for choice in group]).double()).cpu().numpy()  # [steps, k]
    kept = torch.cat([choice.kept for choice in group]).cpu().numpy()
    known = ~np.isnan(scores)
    low, high = np.where(known, scores, np.inf).min(1), np.where(known, scores, -np.inf).max(1)
    clearest = np.argsort(low - high, kind="stable").tolist()
    if len(group) > 1:
        clearest = [i for i in clearest if (group[i].tokens != group[i].tokens[:, :1]).any()]
    clearest = sorted(clearest[:_MOMENTS])
    strips = []
    for i in clearest:
        when = f"step {i + 1} of {len(group)}" if len(group) > 1 else "finished"
        captions = format_scores(scores[i].tolist())
        frames = [
            Frame(caption, int(times), bool(group[i].drawn and times and score < high[i]))
            for caption, score, times in zip(captions, scores[i], kept[i], strict=True)
        ]
        if (decided := group[i].decided) is not None:
            when = f"{int(decided[0])} of {decoder.num_tokens} tokens"
        strips.append(_strip(when, _candidates(decoder, image, group[i]), frames))
    if any(choice.drawn for choice in group):
        title += ", drawn by chance in favour of high scores"
    if len(group) > 1:
        title += f", {len(group)} times"
    if 0 < len(clearest) < len(group):
        title += "; shown where they differ most"
    best_kept = np.where(known & (kept > 0), scores, -np.inf).max(1)
    scored = np.isfinite(best_kept)
    if scored.sum() < 3:
        return Section(title, strips)
    return Section(title, strips, Curve(low[scored].tolist(), high[scored].tolist(), best_kept[scored].tolist()))


def _candidates(decoder: Decoder, image: Tensor, choice: Choice) -> np.ndarray:
    """Pixels of the candidates; of tokens one after the other, only the part that differs, and a token around it."""
    tokens = choice.tokens[0]
    if choice.decided is None:
        return _pixels(decoder, tokens)
    count = int(choice.decided[0])
    newest = torch.arange(decoder.num_tokens, device=tokens.device) == count - 1
    if tokens.shape[1] == 1:
        tokens = torch.where(newest, tokens, image)
    shown = torch.arange(decoder.num_tokens) < count
    grid = decoder.image_tokenizer.grid
    differ = ((tokens != tokens[0]).any(0) | newest).cpu() & shown
    rows, columns = differ.view(grid, grid).nonzero(as_tuple=True)
    pixels = _pixels(decoder, tokens, shown.expand(len(tokens), -1))
    side = pixels.shape[1] // grid
    top, left = (max(int(places.min()) - 1, 0) * side for places in (rows, columns))
    bottom, right = ((int(places.max()) + 2) * side for places in (rows, columns))
    return pixels[:, top:bottom, left:right]


def _round(decoder: Decoder, judge: Judge, number: int, event: ReflectionRound) -> ImageStrip:
    """Before, Ω over it, and after."""
    before, after = format_scores(judge.as_probability(event.scores[0].double()).tolist())
    pixels = _pixels(decoder, torch.cat([event.before, event.before, event.after]))
    side = pixels.shape[1] // decoder.image_tokenizer.grid
    region_mask = event.region_mask[0].view(decoder.image_tokenizer.grid, -1).cpu().numpy()
    marked = region_mask.repeat(side, 0).repeat(side, 1)
    pixels[1, marked, :3] = pixels[1, marked, :3] // 2 + np.array(_MARKED, np.uint8) // 2
    kept = int(event.accepted[0])
    captions = f"before {before}", f"Ω: {int(region_mask.sum())} tokens", f"after {after}"
    frames = [Frame(caption, kept * (i == 2)) for i, caption in enumerate(captions)]
    return _strip(f"round {number}: {'kept' if kept else 'not kept'}", pixels, frames)


def _pixels(decoder: Decoder, tokens: Tensor, shown: Tensor | None = None) -> np.ndarray:
    """Images of grids [n, T] as uint8 [n, H, W, 4], transparent where tokens are not `shown`, bool [n, T]."""
    colors = decoder.image_tokenizer.decode(tokens).mul(255).byte().permute(0, 2, 3, 1).cpu().numpy()
    opaque = np.full((*colors.shape[:3], 1), 255, np.uint8)
    if shown is not None:
        grid = decoder.image_tokenizer.grid
        side = colors.shape[1] // grid
        cells = shown.view(-1, grid, grid).cpu().numpy().repeat(side, 1).repeat(side, 2)
        opaque *= cells[..., None]
    return np.concatenate([colors, opaque], 3)


def _strip(title: str, pixels: np.ndarray, frames: list[Frame]) -> ImageStrip:
    """Frames from images [n, H, W, 4], made smaller where they are large."""
    pixels = np.stack([shrunk(image, _LARGEST) for image in pixels])
    return ImageStrip(title, png(np.concatenate(list(pixels), 1)), pixels.shape[2], pixels.shape[1], frames)


def shrunk(pixels: np.ndarray, largest: int) -> np.ndarray:
    """An image, uint8 [H, W, C], with at most so many pixels along its longer side."""
    height, width = pixels.shape[:2]
    if (longer := max(height, width)) <= largest:
        return pixels
    size = max(1, width * largest // longer), max(1, height * largest // longer)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def png(pixels: np.ndarray) -> bytes:
    """An image, uint8 [H, W, 3 or 4], as a PNG file."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")
    image.save(file, format="PNG")
    return file.getvalue()
