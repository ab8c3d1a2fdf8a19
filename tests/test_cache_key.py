"""Keys change with every setting and byte that changes results, and with nothing else."""

import copy
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import datamodules
import lightning_modules
from datamodules.rollouts import RolloutSpec, provenance
from datamodules.shapes.detector import ShapesDetector
from datamodules.shapes.prompts import vocabulary
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.backbone.text import WordTokenizer
from lightning_modules.cache_key import Keyed, key_of
from lightning_modules.decoding.beam import Beam
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import RandomScores, Region, TokenConfidence
from lightning_modules.decoding.strategy import Strategy
from lightning_modules.decoding.verified import Verified
from lightning_modules.evaluator import Evaluation, Evaluator
from lightning_modules.rewards.clip_score import CLIPScore
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.parm import PARM
from tests.helpers.cache_key_cases import CASES, PLAIN, SAMPLING, another_weight, make_clip
from tests.helpers.evaluators import make_evaluator
from tests.helpers.models import make_parm


def classes(base: type) -> Iterator[type]:
    """The package's classes below a class that can be built."""
    for each in base.__subclasses__():
        if each.__module__.startswith(("lightning_modules.", "datamodules.")) and not inspect.isabstract(each):
            yield each
        yield from classes(each)


def keyed() -> list[type]:
    for package in (lightning_modules, datamodules):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return sorted({*classes(Keyed), *CASES}, key=lambda kind: kind.__name__)


def plain(thing: Any) -> str:
    return json.dumps(key_of(thing), sort_keys=True)


@pytest.mark.parametrize("kind", keyed(), ids=lambda kind: kind.__name__)
def test_a_key_changes_with_what_decides_results_and_with_nothing_else(kind: type, tmp_path: Path) -> None:
    assert kind in CASES, f"say here what decides the results of {kind.__name__}"
    made = CASES[kind](tmp_path)
    key = plain(made.thing)
    assert type(made.thing) is kind
    keys = {name: plain(other) for name, other in made.others.items()}
    assert [name for name, other in keys.items() if other == key] == []
    assert len({*keys.values()}) == len(keys)
    assert [name for name, twin in made.same.items() if plain(twin) != key] == []
    made.use()
    assert plain(made.thing) == key


def test_classes_of_the_same_fields_are_told_apart_however_deep() -> None:
    """Also of settings: a sampling of another kind, a region selector."""

    @dataclass(frozen=True)
    class Cooler(Sampling):
        pass

    strategies = [Verified(SAMPLING, 4), Beam(SAMPLING, 4, 2), Verified(Cooler(0.5), 4)]  # type: ignore[arg-type]
    wrapped = [Reflection(BestOfN(each, 2, "a"), PLAIN, Region(look, 0.5), 2) for each in strategies
               for look in (RandomScores(), TokenConfidence())]  # fmt: skip
    assert len({plain(each) for each in wrapped}) == 6
    assert plain(Verified(SAMPLING, 4, value_weight=2)) == plain(Verified(SAMPLING, 4, value_weight=2.0))


@dataclass(frozen=True)
class Widest(Strategy):
    """A strategy of somebody else's, whose fields have names of their own."""

    scorer: str
    width: int
    judge_names = property(lambda self: [self.scorer])  # type: ignore[assignment]
    images_at_once = property(lambda self: self.width)  # type: ignore[assignment]

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_a_strategy_with_fields_of_its_own_names_takes_part_in_everything(decoder: CompactDecoder) -> None:
    parm, score = make_parm(decoder), CLIPScore(make_clip(), WordTokenizer(vocabulary(), 12))
    other = CLIPScore(another_weight(make_clip()), WordTokenizer(vocabulary(), 12))
    wide, wider = (BestOfN(Widest("clip", width), 2, "parm") for width in (3, 4))
    assert wide.images_at_once == 6
    evaluation = Evaluation(decoder, torch.device("cpu"), [], ["wide"], {})

    def evaluator(strategy: Strategy, clip: CLIPScore) -> Evaluator:
        return make_evaluator(GenEvalReward(ShapesDetector()), {"clip": clip}, parm=parm, strategies={"wide": strategy})

    made = [evaluator(*each) for each in ((wide, score), (wider, score), (wide, other))]
    assert len({json.dumps(each.cache_key(evaluation), sort_keys=True) for each in made}) == 3
    with pytest.raises(ValueError, match=r"strategies\.wide names the judge 'nobody'; there are: parm, geneval, "):
        evaluator(BestOfN(Widest("nobody", 3), 2, "parm"), score).prepare(evaluation)


def test_rollouts_are_keyed_by_all_that_makes_them(decoder: CompactDecoder, rows: list[dict]) -> None:
    parm, truth = make_parm(decoder), GenEvalReward(ShapesDetector())
    wide = BestOfN(Widest("clip", 3), 2, "parm")
    clips = [CLIPScore(clip, WordTokenizer(vocabulary(), 12)) for clip in (make_clip(), another_weight(make_clip()))]

    def key(
        spec: Mapping[str, Any] = {}, parm: PARM = parm, clip: CLIPScore = clips[0], labels: GenEvalReward = truth,
        unused: Any = None, **more: Any,
    ) -> str:  # fmt: skip
        whole = RolloutSpec(**{"prompts": rows, "samples": 2, "strategy": wide} | dict(spec))  # type: ignore[arg-type]
        judges = {"parm": parm, "clip": clip, "unused": unused}
        settings = {"decoder": decoder, "seed": 0, "store_features": False} | more
        return json.dumps(provenance(whole, judges=judges, labels=labels, **settings), sort_keys=True)

    others = [
        key({"prompts": rows[::-1]}), key({"samples": 3}), key({"strategy": BestOfN(Widest("clip", 2), 2, "parm")}),
        key(parm=another_weight(parm)), key(clip=clips[1]), key(decoder=another_weight(decoder)), key(seed=1),
        key(store_features=True), key(labels=GenEvalReward(ShapesDetector(), options={"threshold": 0.1})),
    ]  # fmt: skip
    assert len({key(), *others}) == 10
    labels = GenEvalReward(ShapesDetector(3), kind="strict")  # rows hold all kinds
    assert key() == key({"from_epoch": 2}) == key(unused=clips[1]) == key(labels=labels)


def test_what_does_not_say_its_key_is_named() -> None:
    @dataclass(frozen=True)
    class Careless(Widest):
        clip: Any = None

    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear decides results, and does not say its"):
        Careless("clip", 2, nn.Linear(2, 2)).cache_key()


def test_a_fingerprint_is_of_numbers_and_layers() -> None:
    first = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.MultiheadAttention(4, 2))
    assert fingerprint(first) == fingerprint(copy.deepcopy(first).eval().requires_grad_(False))
    heads, activation = copy.deepcopy(first), copy.deepcopy(first)
    heads[2].num_heads = 4
    activation[1] = nn.ReLU()
    assert len({fingerprint(each) for each in (first, heads, activation, copy.deepcopy(first).double())}) == 4
