"""The page of an evaluation, read by a parser as a browser would."""

import io
import json
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import Region, TokenConfidence
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Decoded, Strategy
from lightning_modules.decoding.trace import Choice, ReflectionRound
from lightning_modules.decoding.verified import Verified
from lightning_modules.report.drawing import format_score, trace_views
from lightning_modules.report.page import write_page
from lightning_modules.report.results import EvaluationResult, StrategyResult
from lightning_modules.rewards.geneval_reward import to_uint8
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import Likelihood, StepJudge
from tests.helpers.models import make_masked, make_parm


class Unsure(StepJudge):
    """Never sees enough, and finds no image good."""

    def cache_key(self):
        return type(self).__name__

    def clear_and_potential(self, prompts: Sequence[str], pixels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(pixels)), torch.zeros(len(pixels))

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels))


SAMPLING = Sampling(guidance=0.5)
STRATEGIES: dict[str, Strategy] = {
    "plain": Sample(SAMPLING),
    "verified": BestOfN(Verified(SAMPLING, k=3), 2, "parm"),
    "reflection": Reflection(Sample(SAMPLING), Sample(SAMPLING), Region(TokenConfidence(), quantile=0.25), rounds=2),
}
ABOUT = {"decoder": "NextTokenDecoder", "seed": 0, "prompts": 12, "images_per_prompt": 1}
HOSTILE = "a photo of <script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """Tags with their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(url: str) -> Image.Image:
    kind, data = url.split(",")
    assert kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(b64decode(data, validate=True)))
    image.load()
    return image


@pytest.fixture(scope="module")
def made(decoder: NextTokenDecoder, parm: PARM, rows: list) -> tuple[dict[str, Decoded], dict[str, StrategyResult]]:
    judges = {"parm": parm, "likelihood": Likelihood()}
    images, results = {}, {}
    for name, strategy in STRATEGIES.items():
        decoded = strategy.decode(decoder, judges, Request(rows, list(range(12))))
        told = trace_views(decoder, judges, ["parm", "likelihood"], rows, decoded, with_trace=True)
        found = [
            {
                "filename": f"{i:05d}/samples/0000.png",
                "tag": row["tag"],
                "prompt": HOSTILE if i == 3 else row["prompt"],
                "correct": i % 2 == 0,
                "reason": "" if i % 2 == 0 else "expected star<1, found 2",
                "details": json.dumps({"star": [[1, 2, 30, 40, 0.91], [8, 2, 30, 40, 0.5]]} if i == 1 else {}),
            }
            for i, row in enumerate(rows)
        ]
        pixels = to_uint8(decoder.image_tokenizer.decode(decoded.tokens))
        tasks = dict.fromkeys([row["tag"] for row in rows], 0.5)
        results[name] = StrategyResult(
            name, 0.5, tasks, found, dict(enumerate(pixels)), 1, 1, 1, 1, {}, traces=dict(enumerate(told))
        )
        images[name] = decoded
    return images, results


@pytest.fixture(scope="module")
def page(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, EvaluationResult(ABOUT, [], made[1]))
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    text = path.read_text()
    assert "http:" not in text and "https:" not in text
    assert all(target.startswith("data:image/png") for target in re.findall(r"url\(([^)]*)", text))
    return Page(text)


def test_every_prompt_is_there_and_none_is_markup(page: Page, made: Any) -> None:
    prompts = [row["prompt"] for row in made[1]["plain"].rows]
    assert HOSTILE in prompts and all(prompt in page.texts for prompt in prompts)
    assert len(page.all("script")) == 1  # the page's own
    assert [card["data-index"] for card in page.all("article")] == [str(i) for i in range(12)]
    assert [card["data-task"] for card in page.all("article")] == [row["tag"] for row in made[1]["plain"].rows]
    assert not page.all("link") and not any("src" in script for script in page.all("script"))


def test_every_picture_decodes(page: Page, made: Any) -> None:
    images = [picture(image["src"]) for image in page.all("img")]
    shown = [result.thumbnails[i] for i in range(12) for result in made[1].values()]
    assert all(np.array_equal(np.asarray(image), pixels) for image, pixels in zip(images, shown, strict=True))
    strips = [figure["style"] for figure in page.all("figure") if figure["class"] == "strip"]
    assert len(strips) > 36
    for style in strips:
        url, width, height, frames = re.fullmatch(
            r"--picture:url\((.*)\);--w:(\d+);--h:(\d+);--n:(\d+)", style
        ).groups()
        assert picture(url).size == (int(width) * int(frames), int(height))


def test_scores_and_verdicts_are_those_of_the_decode(page: Page, made: Any, parm: PARM) -> None:
    panels = page.all("section")
    assert len(panels) == 36
    for name, decoded in made[0].items():
        own = [panel for panel in panels if panel["data-strategy"] == name]
        assert [panel["data-verdict"] for panel in own] == ["right", "wrong"] * 6
        scores = torch.tensor([json.loads(panel["data-scores"])["parm"] for panel in own])
        torch.testing.assert_close(scores, parm.values(decoded.features, [16])[:, 0].exp())
    choice = made[0]["verified"].trace[-1]
    assert {format_score(value) for value in choice.scores.exp().flatten().tolist()} <= set(page.texts)
    assert page.texts.count("✗ expected star<1, found 2") == 18
    labels = [text for text in page.texts if re.fullmatch(r"star 0\.\d\d", text)]
    assert labels == ["star 0.91", "star 0.50"] * 3 and len(page.all("rect")) == 6


def test_the_story_ends_with_the_image(made: Any, decoder: NextTokenDecoder) -> None:
    """The last frame on the way is the image as it was before reflection; its rounds go on from there."""
    for name, decoded in made[0].items():
        result = made[1][name]
        for i, view in result.traces.items():
            way = view.sections[0].strips[0]
            frames = np.asarray(Image.open(io.BytesIO(way.picture)))
            side = way.width
            assert (frames[:, :side, 3] == 0).sum() == side * side * 7 // 8  # an eighth is decided
            rounds = [event for event in decoded.select(torch.tensor([i])).trace if isinstance(event, ReflectionRound)]
            before = rounds[0].before if rounds else decoded.tokens[i : i + 1]
            first = to_uint8(decoder.image_tokenizer.decode(before))[0]
            assert np.array_equal(frames[:, -side:, :3], first)
            told = [strip for strip in view.sections[-1].strips if strip.title.startswith("round")]
            for strip, event in zip(told, rounds, strict=True):
                before, region_mask, after = np.split(np.asarray(Image.open(io.BytesIO(strip.picture))), 3, axis=1)
                cells = (region_mask != before).any(-1).reshape(4, 16, 4, 16).any((1, 3)).flatten()
                assert np.array_equal(cells, event.region_mask[0].numpy())
                assert np.array_equal(after, to_uint8(decoder.image_tokenizer.decode(event.after))[0])
                assert bool(strip.frames[2].kept) == bool(event.accepted[0])


def test_candidates_are_drawn_where_their_scores_differ_most(made: Any) -> None:
    decoded, result = made[0]["verified"], made[1]["verified"]
    steps = [event for event in decoded.trace if isinstance(event, Choice)][:-1]
    values = torch.stack([event.scores[0].exp() for event in steps])
    spread = values.amax(1) - values.amin(1)
    section = result.traces[0].sections[1]
    chance = [bool((event.tokens[0] != event.tokens[0, :1]).any()) for event in steps]
    wanted = sorted([i for i in spread.argsort(descending=True, stable=True).tolist() if chance[i]][:8])
    assert [strip.title for strip in section.strips] == [f"{i + 1} of 16 tokens" for i in wanted]
    kept = [int(steps[i].kept[0].argmax()) for i in wanted]
    assert [[bool(frame.kept) for frame in strip.frames].index(True) for strip in section.strips] == kept
    assert section.curve is not None and section.curve.high == pytest.approx(values.amax(1).tolist())


def test_mask_token_decoders_show_previews(rows: list) -> None:
    """Nothing is blank, every candidate is a whole image, and paths that nobody judges have no curve."""
    masked, sampling = make_masked(), MaskSampling(steps=5, guidance=0.5)
    judges = {"parm": make_parm(masked), "unsure": Unsure()}
    for strategy in (Verified(sampling, k=3), Potential(sampling, 3, "unsure")):
        decoded = strategy.decode(masked, judges, Request(rows[:2], [0, 1]))
        for view in trace_views(masked, judges, list(judges), rows[:2], decoded, with_trace=True):
            section = view.sections[-1]
            strip = section.strips[-1]
            assert (strip.width, strip.height) == (64, 64) and Image.open(io.BytesIO(strip.picture)).mode == "RGB"
            if decoded.trajectory is None:
                assert [frame.caption for frame in strip.frames] == ["not judged"] * 3 and section.curve is None
                assert list(view.scores) == ["unsure"]  # there is no features to read
            else:
                assert len(view.sections[0].strips[0].frames) == 5 and section.curve is not None
