"""Rollouts: resumable, keyed by what made them, the same whatever the batch size."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from lightning.pytorch.utilities.exceptions import SIGTERMException

from datamodules.rollouts import RolloutSpec, collate, collect, find, open_folder, store
from datamodules.shapes.detector import ShapesDetector
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.sample import Sample
from lightning_modules.rewards.geneval_reward import GenEvalReward
from tests.helpers.models import FEATURES, make_decoder


@pytest.fixture(scope="module")
def reward() -> GenEvalReward:
    return GenEvalReward(ShapesDetector())


def columns(rows) -> list[tuple]:
    return [(r["prompt_index"], r["sample"], r["seed"], tuple(r["tokens"]), r["reward"]) for r in rows]


def test_interrupted_collection_goes_on_where_it_was(
    tmp_path, decoder: NextTokenDecoder, reward: GenEvalReward, rows: list[dict]
) -> None:
    class Killed(Exception):
        pass

    class Mortal(Sample):
        calls = 0

        def decode(self, *args):
            type(self).calls += 1
            if type(self).calls == 3:
                raise Killed
            return super().decode(*args)

    straight = collect(RolloutSpec(rows, 2, Mortal(Sampling())), tmp_path / "a", decoder, {}, reward, 0, 24)
    spec = RolloutSpec(rows, 2, Mortal(Sampling()))
    with pytest.raises(Killed):
        collect(spec, tmp_path / "b", decoder, {}, reward, 0, 5)
    done = sorted((tmp_path / "b").glob("part-*"))
    times = [part.stat().st_mtime_ns for part in done]
    resumed = collect(spec, tmp_path / "b", decoder, {}, reward, 0, 5)
    assert len(done) == 1
    assert [part.stat().st_mtime_ns for part in done] == times
    assert columns(resumed) == columns(straight)
    assert len(resumed) == 24
    assert json.loads(resumed[0]["metadata"]) == rows[0]


def test_a_collection_stops_between_batches_when_asked_to(tmp_path, decoder, reward, rows) -> None:
    spec, answers = RolloutSpec(rows, 2, Sample(Sampling())), iter([False, False, True])
    with pytest.raises(SIGTERMException):
        collect(spec, tmp_path, decoder, {}, reward, 0, 5, asked_to_stop=lambda: next(answers))
    assert len(list(tmp_path.glob("part-*"))) == 2


def test_rollouts_of_another_decoder_are_refused(tmp_path, decoder, reward, rows) -> None:
    spec = RolloutSpec(rows[:2], 1, Sample(Sampling()))
    collect(spec, tmp_path, decoder, {}, reward, 0, 2)
    with pytest.raises(ValueError, match="was made with another decoder"):
        collect(spec, tmp_path, make_decoder(depth=2), {}, reward, 0, 2)
    with pytest.raises(ValueError, match="was made with another strategy and another seed"):
        other = RolloutSpec(rows[:2], 1, Sample(Sampling(temperature=2.0)))
        collect(other, tmp_path, decoder, {}, reward, 1, 2)


def test_batches_hold_what_parm_trains_on(tmp_path, decoder, reward, rows) -> None:
    collected = collect(RolloutSpec(rows, 1, Sample(Sampling())), tmp_path, decoder, {}, reward, 0, 12)
    batch = collate([collected.with_format("numpy")[i] for i in (0, 11)])
    assert batch["tokens"].shape == (2, decoder.num_tokens)
    assert batch["clauses"].shape == (2, 6)
    assert batch["grounding"].shape == (2, decoder.num_tokens, 12)
    assert batch["grounding"][0, 0].isnan().tolist() == [place != 4 for place in range(12)]  # a photo of a NAME
    assert batch["clauses"][0].isnan().tolist() == [False, True, True, True, True, True]
    assert batch["group"].tolist() == [0, 11]
    assert batch["correct"].tolist() == [collected[0]["reward"], collected[11]["reward"]]


def test_stored_features_is_that_of_a_decoder_pass(tmp_path, decoder, reward, rows) -> None:
    spec = RolloutSpec(rows, 1, Sample(Sampling()))
    collected = collect(spec, tmp_path, decoder, {}, reward, 0, 12, store_features=True)
    arrays = ["tokens", "clauses", "grounding", "reward", "first_unverified", "prompt_index"]
    arrays += ["log_probs", "unconditional_log_probs", "entropy"]
    numpy_rows = collected.with_format("numpy", columns=arrays, output_all_columns=True)
    batch = collate([numpy_rows[i] for i in range(12)])
    stored = decoder.features_from_cache(batch["prompt"], batch["tokens"], **batch["features"])
    fresh = decoder.features(batch["prompt"], batch["tokens"])
    for name in FEATURES:
        torch.testing.assert_close(getattr(stored, name), getattr(fresh, name), atol=5e-3, rtol=5e-3)


def test_empty_requests_are_refused(rows) -> None:
    with pytest.raises(ValueError, match="samples of at least 1 a prompt, not 0"):
        RolloutSpec(rows, 0, Sample(Sampling()))
    with pytest.raises(ValueError, match="per_round names 'juggling', a task of which there are no prompts"):
        RolloutSpec(rows, 1, Sample(Sampling()), per_round={"juggling": 3})


def test_rounds_take_up_prompts_where_the_last_one_left_them() -> None:
    rows = [{"tag": "colors", "prompt": str(i)} for i in range(5)] + [{"tag": "counting", "prompt": "many"}]
    spec = RolloutSpec(rows, 2, Sample(Sampling()), per_round={"counting": 1, "colors": 3})
    taken = [[row["prompt"] for row in spec.of_round(turn).prompts] for turn in range(3)]
    assert taken == [["many", "0", "1", "2"], ["many", "3", "4", "0"], ["many", "1", "2", "3"]]
    every = RolloutSpec(rows, 2, Sample(Sampling()))
    assert every.of_round(7) is every


def test_of_two_runs_that_want_the_same_rows_one_makes_them(tmp_path) -> None:
    made = []

    def make() -> Dataset:
        made.append(time.sleep(0.3))  # long enough for the other one to come and find nothing yet
        return Dataset.from_dict({"number": [1, 2]})

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(store, tmp_path / "rows", make) for _ in range(2)]:
            done.result()
    assert len(made) == 1
    assert load_from_disk(str(tmp_path / "rows"))["number"][:] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_what_a_checkpoint_knows_is_found_by_its_name_wherever_its_folder_has_moved(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, before = tmp_path / "disk2" / "plain-a", tmp_path / "outputs" / "rollouts" / "plain-a"
    monkeypatch.chdir(tmp_path)
    known = "outputs/rollouts/plain-a"  # as checkpoints held it before they held whole paths
    assert find(known, now.parent) is None
    before.mkdir(parents=True)
    assert find(known, now.parent) == Path(known)
    now.mkdir(parents=True)
    assert find(known, now.parent) == find(str(before), now.parent) == now


def test_a_folder_that_was_opened_stays_what_it_was(tmp_path) -> None:
    open_folder(tmp_path / "x", {"decoder": "a", "seed": 1})
    open_folder(tmp_path / "x", {"decoder": "a", "seed": 1})
    with pytest.raises(ValueError, match="another seed"):
        open_folder(tmp_path / "x", {"decoder": "a", "seed": 2})


def test_a_folder_of_others_stays_what_it_was(tmp_path) -> None:
    (tmp_path / ".DS_Store").touch()  # what is hidden is nobody's work
    open_folder(tmp_path, {"seed": 1})
    (tmp_path / "provenance.json").unlink()
    for name in "abcd":
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r" holds a, b, c and 1 more, and no provenance\.json .*: name another folder"):
        open_folder(tmp_path, {"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".DS_Store", "a", "b", "c", "d"]


@pytest.mark.parametrize("text", ["[]", "{", '{"source": "a camera"}'])
def test_a_folder_that_others_marked_stays_what_it_was(tmp_path, text: str) -> None:
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(ValueError, match=r"provenance\.json is not of this project, or of another version"):
        open_folder(tmp_path, {"seed": 1})
    assert (tmp_path / "provenance.json").read_text() == text


def test_a_broken_part_is_named(tmp_path, decoder: NextTokenDecoder, reward: GenEvalReward, rows: list[dict]) -> None:
    spec = RolloutSpec(rows[:2], 1, Sample(Sampling()))
    collect(spec, tmp_path, decoder, {}, reward, 0, 2)
    (arrow,) = tmp_path.glob("part-*/*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-2-00000 is broken \(.*\): remove it, and it is made again"):
        collect(spec, tmp_path, decoder, {}, reward, 0, 2)
