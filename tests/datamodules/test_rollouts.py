"""Rollouts: resumable, keyed by what made them, the same whatever the batch size."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.utilities.exceptions import SIGTERMException

from datamodules.data_sets import ArrowRows
from datamodules.rollouts import RolloutCollector, RolloutSpec, collate
from datamodules.shapes.detector import ShapesDetector
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.denoising_sampling import FlowSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.sample import Sample
from lightning_modules.rewards.geneval_reward import GenEvalReward
from tests.helpers.models import FEATURES, make_decoder, make_flow


@pytest.fixture(scope="module")
def reward() -> GenEvalReward:
    return GenEvalReward(ShapesDetector())


class Alone:
    """A Trainer of one process, which is asked to stop once some batches are done."""

    global_rank, world_size = 0, 1
    strategy = SimpleNamespace(barrier=lambda name: None)

    def __init__(self, batches: int = 1000) -> None:
        self.batches = batches

    @property
    def received_sigterm(self) -> bool:
        self.batches -= 1
        return self.batches < 0


@pytest.fixture
def collect(tmp_path: Path, decoder: CompactDecoder, reward: GenEvalReward) -> Callable[..., Dataset]:
    """Collect a set of rollouts below `tmp_path`."""

    def run(spec: RolloutSpec, batch_size: int, trainer: Any = None, **settings: Any) -> Dataset:
        values = {"decoder": decoder, "judges": {}, "labels": reward, "seed": 0} | settings
        collector = RolloutCollector(batch_size=batch_size, **values)
        return collector.collect(spec, collector.parts(tmp_path, "plain", spec), trainer or Alone())

    return run


def columns(rows) -> list[tuple]:
    return [(r["prompt_index"], r["sample"], r["seed"], tuple(r["tokens"]), r["reward"]) for r in rows]


def test_an_interrupted_collection_is_resumed(tmp_path: Path, collect, rows: list[dict]) -> None:
    class Killed(Exception):
        pass

    class Mortal(Sample):
        calls = 0

        def decode(self, *args):
            type(self).calls += 1
            if type(self).calls == 3:
                raise Killed
            return super().decode(*args)

    spec = RolloutSpec(rows, 2, Mortal(Sampling()))
    straight = collect(spec, 24)
    whole = set(tmp_path.glob("plain-*/part-*"))
    with pytest.raises(Killed):
        collect(spec, 5)
    (done,) = set(tmp_path.glob("plain-*/part-*")) - whole
    time = done.stat().st_mtime_ns
    resumed = collect(spec, 5)
    assert done.stat().st_mtime_ns == time
    assert columns(resumed) == columns(straight)
    assert len(resumed) == 24
    assert json.loads(resumed[0]["metadata"]) == rows[0]


def test_a_collection_stops_between_batches_when_asked_to(tmp_path: Path, collect, rows) -> None:
    with pytest.raises(SIGTERMException):
        collect(RolloutSpec(rows, 2, Sample(Sampling())), 5, Alone(batches=2))
    assert len(list(tmp_path.glob("plain-*/part-*"))) == 2


def test_rollouts_of_another_decoder_strategy_or_seed_are_others(tmp_path: Path, collect, rows) -> None:
    spec, other = (RolloutSpec(rows[:2], 1, Sample(Sampling(temperature=t))) for t in (1.0, 2.0))
    found = [collect(spec, 2), collect(spec, 2, decoder=make_decoder(depth=2)), collect(other, 2)]
    found += [collect(spec, 2, seed=1), collect(spec, 2, store_features=True)]
    assert len({str(columns(each)) for each in found}) == 4  # what the decoder knew changes no image
    assert len(list(tmp_path.glob("plain-*"))) == 5
    provenance = json.loads(next(tmp_path.glob("plain-*/provenance.json")).read_text())
    assert provenance["samples"] == 1 and provenance["decoder"]["class"].endswith("CompactDecoder")


def test_a_set_is_whole_when_all_its_batches_are_there(tmp_path: Path, collect, decoder, reward, rows) -> None:
    spec, collector = RolloutSpec(rows[:4], 1, Sample(Sampling())), RolloutCollector(decoder, {}, reward, 0, 2)
    parts = collector.parts(tmp_path, "plain", spec)
    assert not collector.is_whole(spec, parts.root)
    collect(spec, 2)
    assert collector.is_whole(spec, parts.root)
    shutil.rmtree(next(parts.root.glob("part-*")))
    assert not collector.is_whole(spec, parts.root)


def test_batches_hold_what_parm_trains_on(collect, decoder, rows) -> None:
    collected = collect(RolloutSpec(rows, 1, Sample(Sampling())), 12)
    batch = collate(ArrowRows(collected).__getitems__([0, 11]))
    assert batch["tokens"].shape == (2, decoder.num_tokens)
    assert batch["clauses"].shape == (2, 6)
    assert batch["grounding"].shape == (2, decoder.num_tokens, 12)
    assert batch["grounding"][0, 0].isnan().tolist() == [place != 4 for place in range(12)]  # a photo of a NAME
    assert batch["clauses"][0].isnan().tolist() == [False, True, True, True, True, True]
    assert batch["group"].tolist() == [0, 11]
    assert batch["correct"].tolist() == [collected[0]["reward"], collected[11]["reward"]]


def test_stored_features_are_those_of_a_decoder_pass(collect, decoder, rows) -> None:
    collected = collect(RolloutSpec(rows, 1, Sample(Sampling())), 12, store_features=True)
    batch = collate(ArrowRows(collected).__getitems__(list(range(12))))
    stored = decoder.features_from_cache(batch["prompt"], batch["tokens"], **batch["features"])
    fresh = decoder.features(batch["prompt"], batch["tokens"])
    for name in FEATURES:
        torch.testing.assert_close(getattr(stored, name), getattr(fresh, name), atol=5e-3, rtol=5e-3)


def test_denoised_images_are_stored_as_vectors_with_the_times_of_their_steps(collect, rows) -> None:
    flow, sampling = make_flow(image_size=64), FlowSampling(3, solver="sde", eta=0.5)
    collected = collect(RolloutSpec(rows, 1, Sample(sampling)), 5, decoder=flow, store_features=True)
    batch = collate(ArrowRows(collected).__getitems__([0, 7]))
    requests = Request(rows, collected["seed"])
    fresh = Sample(sampling).decode(flow, {}, requests)
    torch.testing.assert_close(batch["tokens"], fresh.tokens[[0, 7]], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch["trajectory"]["times"], torch.tensor([sampling.times] * 2))
    batch["first_unverified"] = torch.tensor([1, 3])
    seen = [flow.training_features(batch).entropy[:, 0] for _ in range(20)]
    assert all(drawn[0] <= sampling.times[1] and drawn[1] == seen[0][1] for drawn in seen)


def test_empty_requests_are_refused(rows) -> None:
    with pytest.raises(ValueError, match="samples of at least 1 a prompt, not 0"):
        RolloutSpec(rows, 0, Sample(Sampling()))
    with pytest.raises(ValueError, match="per_round names 'juggling', a task of which there are no prompts"):
        RolloutSpec(rows, 1, Sample(Sampling()), per_round={"juggling": 3})


def test_rounds_take_up_prompts_where_the_last_one_left_them() -> None:
    rows = [{"tag": "colors", "prompt": str(i)} for i in range(5)] + [{"tag": "counting", "prompt": "many"}]
    spec = RolloutSpec(rows, 2, Sample(Sampling()), per_round={"counting": 1, "colors": 3})
    taken = [[row["prompt"] for row in spec.of_round(index).prompts] for index in range(3)]
    assert taken == [["many", "0", "1", "2"], ["many", "3", "4", "0"], ["many", "1", "2", "3"]]
    every = RolloutSpec(rows, 2, Sample(Sampling()))
    assert every.of_round(7) is every


def test_a_broken_part_is_named(tmp_path: Path, collect, rows: list[dict]) -> None:
    spec = RolloutSpec(rows[:2], 1, Sample(Sampling()))
    collect(spec, 2)
    (arrow,) = tmp_path.glob("plain-*/part-*/*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-000000-\w+ is broken \(.*\): remove it, and it is made again"):
        collect(spec, 2)
