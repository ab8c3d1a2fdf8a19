"""The page of an evaluation, read by a parser as a browser would."""

import io
import json
import math
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import Region, TokenConfidence
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Decoded, Strategy
from lightning_modules.decoding.trace import Choice, ReflectionRound
from lightning_modules.decoding.verified import Verified
from lightning_modules.report.compute_plot import compute_figure
from lightning_modules.report.drawing import format_scores, trace_views
from lightning_modules.report.labels import Box
from lightning_modules.report.page import _fitting, _numbers, write_page
from lightning_modules.report.results import EvaluationResult, StrategyResult
from lightning_modules.rewards.geneval_reward import to_uint8
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import Likelihood, StepJudge
from tests.helpers.models import make_masked, make_parm
from tests.helpers.results import RUN


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
ABOUT = {"decoder": "CompactDecoder", "seed": 0, "prompts": 12, "images_per_prompt": 1}
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
def made(decoder: CompactDecoder, parm: PARM, rows: list) -> tuple[dict[str, Decoded], dict[str, StrategyResult]]:
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
                "metadata": json.dumps(row),
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
    (path.parent / "geneval.json").write_text("{}")
    evaluation = EvaluationResult(ABOUT, ["plain is a ceiling"], made[1])
    write_page(path, evaluation, RUN, compute_figure(evaluation, RUN))
    assert sorted(file.name for file in path.parent.iterdir()) == ["geneval.json", "page.html"]
    text = path.read_text()
    assert "http:" not in text and "https:" not in text
    assert all(target.startswith(("data:image/png", "#")) for target in re.findall(r"url\(([^)]*)", text))
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
    for scores in choice.scores.double().exp().tolist():
        assert set(format_scores(scores)) <= set(page.texts)
    assert page.texts.count("✗ should have no star, has 2") == 18
    labels = [text for text in page.texts if re.fullmatch(r"star 0\.\d\d", text)]
    assert labels == ["star 0.91", "star 0.50"] * 3
    boxes = [box for box in page.all("rect") if box["height"] == "38"]  # the plot has rectangles as well
    assert len(boxes) == 6


def test_the_header_says_which_run_it_is_and_links_to_what_is_there(page: Page) -> None:
    assert any(text.startswith("parm: GenEval") for text in page.texts)
    assert {"last.ckpt", "python train.py seed=3", "plain is a ceiling."} <= set(page.texts)
    assert [link["href"] for link in page.all("a")] == ["geneval.json"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", page.texts[page.texts.index("evaluated") + 1])
    assert {"decoder passes", "verifier calls", "seconds"} <= set(page.texts)
    assert {"plain", "verified", "reflection"} <= set(page.texts)  # of the plot, the table and the panels


@pytest.mark.parametrize("count", [1, 4, 9])
def test_numbers_are_beside_their_shapes_and_cover_none(count: int) -> None:
    boxes = [Box(20 * (i % 3), 20 * (i // 3), 20 * (i % 3) + 12, 20 * (i // 3) + 12) for i in range(count)]
    numbers = _numbers(boxes, 64, 64)
    assert len(numbers) == count
    for i, number in enumerate(numbers):
        others = [*boxes, *numbers[:i]]
        assert all(number.overlap(other) == 0 for other in others)
        gaps = [max(box.x0 - number.x1, number.x0 - box.x1, box.y0 - number.y1, number.y0 - box.y1) for box in boxes]
        assert min(gaps) == pytest.approx(gaps[i])  # none is nearer to another shape


def test_prompts_are_left_out_before_the_page_is_too_large() -> None:
    indices = list(range(0, 72, 2))
    assert _fitting(indices, lambda index, is_whole: 1000) == dict.fromkeys(indices, True)
    shown = _fitting(indices, lambda index, is_whole: 500_000 if is_whole else 100_000)
    assert sum(shown.values()) == 4 and len(shown) == 30 and list(shown) == sorted(shown)
    whole = [index for index, is_whole in shown.items() if is_whole]
    assert whole[0] == 0 and whole[-1] > 50  # from all of them
    shown = _fitting(indices, lambda index, is_whole: 200_000 if is_whole else 10_000)
    assert sum(shown.values()) == 21 and len(shown) == len(indices)  # the room that others leave is used
    sizes = {index: 100_000 if index == 0 else 900_000 for index in indices}
    shown = _fitting(indices, lambda index, is_whole: sizes[index])
    assert len(shown) > 3 and sum(sizes[index] for index in shown) < 4_900_000
    assert _fitting([], lambda index, is_whole: 1) == {}


def test_scores_have_as_many_digits_as_tell_them_apart() -> None:
    assert format_scores([0.5, 0.25, 100]) == ["0.500", "0.250", "100"]
    assert format_scores([0.99981, 0.99984, math.nan]) == ["0.99981", "0.99984", "not judged"]
    assert format_scores([0.7, 0.7]) == ["0.700", "0.700"]


def test_what_was_drawn_by_chance_is_said(decoder: CompactDecoder, parm: PARM, rows: list) -> None:
    """Among drawn candidates every one that was kept and not the best says so, among others none."""
    drawn = {}
    for choose in ("sample", "argmax"):
        decoded = Verified(SAMPLING, k=3, choose=choose).decode(decoder, {"parm": parm}, Request(rows, list(range(12))))
        views = trace_views(decoder, {"parm": parm}, ["parm"], rows, decoded, with_trace=True)
        sections = [section for view in views for section in view.sections if "candidates" in section.title]
        assert all(("by chance" in section.title) == (choose == "sample") for section in sections)
        frames = [frame for section in sections for strip in section.strips for frame in strip.frames]
        drawn[choose] = [frame for frame in frames if frame.drawn]
        assert all(frame.kept for frame in drawn[choose])
    assert drawn["sample"] and not drawn["argmax"]


@pytest.mark.parametrize(("stop_score", "said"), [(-100.0, "Satisfied at once"), (0.0, "Stopped after 2 rounds")])
def test_reflection_says_how_it_ended(
    decoder: CompactDecoder, parm: PARM, rows: list, stop_score: float, said: str
) -> None:
    strategy = replace(STRATEGIES["reflection"], stop_score=stop_score)
    decoded = strategy.decode(decoder, {"parm": parm}, Request(rows[:2], [0, 1]))
    for view in trace_views(decoder, {"parm": parm}, ["parm"], rows[:2], decoded, with_trace=True):
        assert view.sections[-1].title.startswith("Reflection") and view.sections[-1].note.startswith(said)


def test_the_story_ends_with_the_image(made: Any, decoder: CompactDecoder) -> None:
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
