"""The shapes world: rendering, prompts and their splits, scenes that fulfil their prompt, altered captions."""

import pickle

import numpy as np
import pytest

from datamodules.prompt_templates import SPLITS
from datamodules.shapes.caption_pairs import CHANGES, CaptionPairs, altered, judge, truth
from datamodules.shapes.prompts import CLASSES, prompt_pool, shapes_prompts, vocabulary
from datamodules.shapes.scenes import ShapesStream
from datamodules.shapes.world import GAP, PALETTE
from lightning_modules.rewards.geneval_metadata import COLORS, TASKS, validate_metadata


def named(split: str) -> tuple[set, set, set]:
    """Class-colour pairs, class pairs and class-relation-class triples that a split's prompts name."""
    colors, pairs, triples = set(), set(), set()
    for rows in prompt_pool(split).values():  # type: ignore[arg-type]
        for row in rows:
            clauses = row["include"]
            colors |= {(c["class"], c["color"]) for c in clauses if "color" in c}
            if row["tag"] == "two_object":
                pairs.add(frozenset(c["class"] for c in clauses))
            if row["tag"] == "position":
                triples.add((clauses[1]["class"], clauses[1]["position"][0], clauses[0]["class"]))
    return colors, pairs, triples


def test_no_combination_is_named_in_two_splits() -> None:
    for first, second in (("train", "evaluation"), ("train", "validation"), ("validation", "evaluation")):
        for mine, other in zip(named(first), named(second), strict=True):
            assert mine
            assert not mine & other


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_valid_geneval_metadata_in_the_vocabulary(split) -> None:
    rows = shapes_prompts(split, 50)
    assert [row["tag"] for row in rows[::50]] == list(TASKS)
    words = set(vocabulary())
    for row in rows:
        validate_metadata(row, CLASSES, "row")
        assert set(row["prompt"].split()) <= words


def test_templates_are_geneval_s() -> None:
    pool = prompt_pool("train")
    prompts = {row["prompt"] for rows in pool.values() for row in rows}
    assert "a photo of two crosses" in prompts
    assert "a photo of a star" in prompts
    assert any(prompt.startswith("a photo of an orange ") for prompt in prompts)
    position = pool["position"][0]
    target, placed = (clause["class"] for clause in position["include"])
    assert position["prompt"] == f"a photo of a {placed} {position['include'][1]['position'][0]} a {target}"
    counting = pool["counting"][0]
    assert counting["exclude"][0]["count"] == counting["include"][0]["count"] + 1


def test_the_palette_is_geneval_s() -> None:
    assert tuple(PALETTE) == COLORS
    assert len(CLASSES) >= 8


def test_images_are_a_function_of_the_index_and_streams_pickle() -> None:
    stream = ShapesStream(seed=3)
    twin = pickle.loads(pickle.dumps(stream))
    for index in (0, 17, 10**9):
        assert np.array_equal(stream[index].image, twin[index].image)
        assert stream[index].metadata == twin[index].metadata
    assert not np.array_equal(stream[0].image, ShapesStream(seed=4)[0].image)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_fulfil_their_prompt_without_touching(split) -> None:
    stream = ShapesStream(split=split, seed=11)
    for index in range(300):
        sample = stream[index]
        assert sample.image.shape == (64, 64, 3)
        assert judge(truth(sample.scene), sample.metadata).correct, sample.metadata["prompt"]
        for i, a in enumerate(sample.scene.objects):
            assert min(a.box) >= 0 and max(a.box) <= 64
            for b in sample.scene.objects[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


@pytest.mark.parametrize("split", SPLITS)
def test_vague_prompts_say_shape_and_are_fulfilled(split) -> None:
    tasks = ("two_object", "colors", "position", "color_attr")
    stream = ShapesStream(split=split, seed=12, vagueness=dict.fromkeys(tasks, 1.0))
    colored = set()
    for index in range(400):
        sample = stream[index]
        vague = [clause["class"] for clause in sample.metadata["include"]].count("shape")
        assert vague == (sample.metadata["tag"] in tasks)
        assert judge(truth(sample.scene), sample.metadata).correct, sample.metadata["prompt"]
        if sample.metadata["tag"] == "colors":
            colored |= {(item.name, item.color) for item in sample.scene.objects}
    assert len(colored) > 50  # any class, whatever the split may name together with the colour


def test_training_captions_never_name_a_held_out_combination() -> None:
    others = [row for split in ("validation", "evaluation") for rows in prompt_pool(split).values() for row in rows]
    held_out = {row["prompt"] for row in others if row["tag"] not in ("single_object", "counting")}
    colored = {(c["class"], c["color"]) for row in others if row["tag"] == "colors" for c in row["include"]}
    pairs = CaptionPairs(ShapesStream(seed=6, vagueness={"colors": 0.5, "position": 0.5}), max_words=12, grid=8)
    for index in range(500):
        for caption in pairs[index].captions:
            named = {(clause["class"], clause.get("color")) for clause in caption["include"]}
            assert caption["prompt"] not in held_out and not named & colored, caption["prompt"]


def test_altered_captions_differ_in_one_thing_and_stay_in_their_split() -> None:
    pairs = CaptionPairs(ShapesStream(seed=5), max_words=12, grid=8)
    known = {row["prompt"] for rows in prompt_pool("train").values() for row in rows}
    wrong = 0
    for index in range(300):
        pair = pairs[index]
        true, other = pair.captions
        assert true["tag"] == other["tag"] and true["prompt"] != other["prompt"]
        assert {true["prompt"], other["prompt"]} <= known
        assert pair.verdicts[0].correct
        wrong += not pair.verdicts[1].correct
    assert wrong > 290


@pytest.mark.parametrize("split", ["validation", "evaluation"])
def test_every_prompt_of_a_small_split_can_be_altered(split) -> None:
    rng = np.random.default_rng(0)
    for rows in prompt_pool(split).values():
        for row in rows:
            assert altered(row, ShapesStream(split), CHANGES, rng)["prompt"] != row["prompt"]


def test_altering_changes_everything_that_can_change() -> None:
    rng = np.random.default_rng(0)
    row = next(r for r in prompt_pool("train")["position"])
    others = [altered(row, ShapesStream(), CHANGES, rng) for _ in range(200)]
    relations = {other["include"][1]["position"][0] for other in others}
    classes = {other["include"][0]["class"] for other in others}
    assert len(relations) > 2
    assert len(classes) > 3


@pytest.mark.parametrize("split", SPLITS)
def test_a_stream_names_only_its_relations(split) -> None:
    """Neither do altered captions; each of them turns the image's relation round, where the split has such a prompt."""
    positions = {task: float(task == "position") for task in TASKS}
    stream = ShapesStream(split, seed=7, task_weights=positions, relations=["left of", "right of"])
    pairs = CaptionPairs(stream, max_words=12, grid=8, changes=["relation", "order"])
    said, turned = set(), 0
    for index in range(200):
        pair = pairs[index]
        true, other = ([clause["class"] for clause in row["include"]] for row in pair.captions)
        assert pair.captions[0]["prompt"] != pair.captions[1]["prompt"]
        said |= {row["include"][1]["position"][0] for row in pair.captions}
        turned += {*true} == {*other} and not pair.verdicts[1].correct
    assert said == {"left of", "right of"}
    assert turned > 150


@pytest.mark.parametrize("relations", [[], ["left"], ["above", "next to"]])
def test_unknown_relations_are_refused(relations) -> None:
    with pytest.raises(ValueError, match="relations must be some of left of, right of, above, below, not "):
        ShapesStream(relations=relations)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"task_weights": {"shape": 1}}, "are of single_object, .*, not of 'shape'"),
        ({"vagueness": {"color": 0.5}}, "are of single_object, .*, not of 'color'"),
        ({"task_weights": {"colors": 0, "counting": 0.0}}, "task_weights must be at least 0, and one more than that"),
        ({"task_weights": {"colors": 2, "counting": -1}}, "task_weights must be at least 0, and one more than that"),
        ({"task_weights": {}}, "task_weights must be at least 0, and one more than that"),
        ({"vagueness": {"colors": 1.5}}, "vagueness must be from 0 to 1, not {'colors': 1.5}"),
    ],
)
def test_weights_and_vagueness_that_mean_nothing_are_refused(wrong, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        ShapesStream(**wrong)


@pytest.mark.parametrize("changes", [[], ["colour"], ["class", "size"]])
def test_unknown_changes_are_refused(changes) -> None:
    with pytest.raises(ValueError, match="changes must be some of class, color, relation, count, order, not "):
        CaptionPairs(ShapesStream(), max_words=12, grid=8, changes=changes)


def test_tasks_can_have_numbers_of_prompts_of_their_own() -> None:
    rows = shapes_prompts("train", {"position": 3, "colors": 70})
    assert [row["tag"] for row in rows] == ["position"] * 3 + ["colors"] * 70
    assert rows[3] == rows[3 + 64]  # there are 64 of these prompts; then they repeat
    with pytest.raises(ValueError, match="names the task 'position '"):
        shapes_prompts("train", {"position ": 3})
    with pytest.raises(ValueError, match=r"at least 1, not 0 \(colors\)"):
        shapes_prompts("train", {"colors": 0})
