"""Groups: a stream that mixes tasks, groups that teach nothing replaced, a step that a checkpoint holds."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from torch import Tensor

from datamodules.groups import Curriculum, GroupSpec
from datamodules.online_groups import GroupsDataModule
from datamodules.shapes.detector import ShapesDetector
from lightning_modules.backbone.denoising_sampling import FlowSampling
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.sample import Sample
from lightning_modules.grpo import GRPOModule, GRPOObjective
from lightning_modules.parm import PARMObjective
from lightning_modules.rewards.geneval_reward import GenEvalReward, to_uint8
from lightning_modules.rewards.registry import JudgeRegistry
from lightning_modules.rewards.verifier import Reward
from tests.helpers.models import make_decoder, make_flow, make_masked, make_parm

PER_ROUND = {"colors": 1, "counting": 2, "position": 1}


class Darkness(Reward):
    """How dark an image is; of prompts about colours all are alike."""

    def cache_key(self) -> str:
        return "darkness"

    def __call__(self, prompts: Any, pixels: Tensor) -> Tensor:
        dark = -pixels.mean((1, 2, 3))
        return torch.where(torch.tensor([row["tag"] == "colors" for row in prompts]), 0.5, dark)


def make_data(rows: list, decoder: Any = None, trainer: dict | None = None, **settings: Any) -> GroupsDataModule:
    """A data module beside a tiny decoder, in the fourth epoch of a Trainer."""
    decoder = decoder or make_decoder()
    judges = JudgeRegistry(GenEvalReward(ShapesDetector()), {"dark": Darkness()}, decoder, settings.pop("parm", None))
    sampling, refit = settings.pop("sampling", Sampling(guidance=0.5)), settings.pop("refit", None)
    wanted = {"per_round": PER_ROUND, "samples": 3, "refills": 2, "curriculum": 0.0}
    spec = GroupSpec(rows, Sample(sampling), **{key: settings.pop(key, value) for key, value in wanted.items()})
    values = {"rewards": {"dark": 1.0}, "potentials": {}, "independent_judges": ["likelihood"], "rounds": 2,
              "inner_epochs": 2, "batch_size": 4, "collect_batch_size": 5, "seed": 3}  # fmt: skip
    data = GroupsDataModule(judges, spec, **(values | settings))
    advantages = GRPOObjective(min_spread=1e-6).advantages
    module = SimpleNamespace(decoder=decoder, advantages=advantages, refit=refit)
    precision = SimpleNamespace(forward_context=nullcontext)
    facts = {"current_epoch": 3, "world_size": 1, "global_rank": 0, "lightning_module": module,
             "accumulate_grad_batches": 2}  # fmt: skip
    strategy = SimpleNamespace(precision_plugin=precision)
    data.trainer = SimpleNamespace(**(facts | (trainer or {})), strategy=strategy)  # type: ignore[assignment]
    return data


def test_the_stream_takes_up_each_task_where_it_left_it(rows: list) -> None:
    prompts = [{"tag": task, "prompt": f"{task} {i}"} for task in PER_ROUND for i in range(3)]
    spec = GroupSpec(prompts, Sample(Sampling()), PER_ROUND | {"juggling": 0}, 2, 0)
    taken = [spec.prompt(place)["prompt"] for place in range(12)]
    steps = [sorted(taken[start : start + 4]) for start in (0, 4, 8)]
    assert steps == [
        sorted([f"colors {c}", f"counting {a}", f"counting {b}", f"position {c}"])
        for c, a, b in ((0, 0, 1), (1, 2, 0), (2, 1, 2))
    ]
    assert [text.split()[0] for text in taken[:4]] == ["counting", "colors", "position", "counting"]  # mixed evenly


def test_tasks_come_as_often_as_their_groups_teach() -> None:
    prompts = [{"tag": task, "prompt": f"{task} {i}"} for task in ("colors", "counting") for i in range(3)]
    spec = GroupSpec(prompts, Sample(Sampling()), {"colors": 1, "counting": 1}, 2, 0, curriculum=0.25)
    curriculum = Curriculum()
    assert curriculum.take(spec, 6) == [*range(6)]  # nothing is known yet
    curriculum.learn(spec, [0, 1], [True, False])  # colours, counting
    assert curriculum.teaches == {"colors": 1.0, "counting": 0.75}
    for _ in range(4):
        curriculum.learn(spec, [1], [False])
    again = Curriculum(**asdict(curriculum))
    taken = curriculum.take(spec, 50)
    assert taken == again.take(spec, 50) and asdict(again) == asdict(curriculum)
    shares = [sum(spec.prompt(place)["tag"] == task for place in taken) for task in ("colors", "counting")]
    assert shares[1] / shares[0] == pytest.approx(0.75**5, abs=0.05)
    for _ in range(100):
        curriculum.learn(spec, [1], [False])
    assert any(spec.prompt(place)["tag"] == "counting" for place in curriculum.take(spec, 20))  # tried now and then
    nothing = Curriculum(next_place=8, teaches={"colors": 0.0, "counting": 0.0})  # as small as numbers get
    assert nothing.take(spec, 4) == [8, 9, 10, 11]


def test_groups_that_teach_nothing_are_replaced_and_counted(rows: list) -> None:
    data = make_data(rows)
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(6)]
    prompts = [prompt for batch in batches for prompt in batch["prompt"]]
    assert all(prompts.count(prompt) % 6 == 0 for prompt in prompts)  # 3 images, twice
    colors = {row["prompt"] for row in rows if row["tag"] == "colors"}
    advantage = torch.tensor([value for batch in batches for value in batch["advantage"]])
    assert not colors & set(prompts) and (advantage != 0).any()
    stats = batches[0]["stats"]
    assert stats["dropped"] == pytest.approx(1 / 5) and stats["reward/dark/colors"] == pytest.approx(0.5)
    assert stats["independent/likelihood"] < 0 and stats["entropy"] > 0
    assert "independent/dark" not in stats and {"reward/dark", "spread/dark", "objects"} <= stats.keys()
    assert stats["images_made"] == 15  # 5 groups of 3
    later = next(loader)["stats"]  # of the next step
    assert later["images_made"] == pytest.approx(15 + 12 / (1 - later["dropped"]))


def test_what_cannot_be_replaced_stays_without_advantage(rows: list) -> None:
    data = make_data(rows, per_round={"colors": 1, "counting": 1}, refills=0, inner_epochs=1, batch_size=6)
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (6, 16) and sum(value == 0 for value in batch["advantage"]) == 3
    assert batch["stats"]["dropped"] == 0.5


def test_every_inner_epoch_has_each_image_once(rows: list) -> None:
    data = make_data(rows)
    batches = [next(iter_) for iter_ in [iter(data.train_dataloader())] for _ in range(6)]
    keys = [str(row) for batch in batches for row in batch["recorded"].tolist()]
    assert len(set(keys)) == 12 and set(keys[:12]) == set(keys[12:]) and keys[:12] != keys[12:]


@pytest.mark.parametrize("curriculum", [0.0, 0.5])
def test_a_checkpoint_in_a_step_brings_its_images_back(rows: list, curriculum: float) -> None:
    straight = make_data(rows, curriculum=curriculum)
    loader, resumable = iter(straight.train_dataloader()), make_data(rows, curriculum=curriculum)
    batches = [next(loader) for _ in range(12)]
    begun = resumable.train_dataloader()
    first = iter(begun)
    for _ in range(2):
        next(first)
    state, place = resumable.state_dict(), begun.state_dict()
    resumed = make_data(rows, make_decoder(depth=2).train(), curriculum=curriculum)  # its images would be others
    resumed.load_state_dict(state)
    again = resumed.train_dataloader()
    again.load_state_dict(place)
    for batch, wanted in zip([next(iter_) for iter_ in [iter(again)] for _ in range(4)], batches[2:6], strict=True):
        assert torch.equal(batch["tokens"], wanted["tokens"]) and batch["stats"] == wanted["stats"]
        assert all((batch[name] == wanted[name]).all() for name in ("advantage", "recorded"))


def test_values_along_the_way_are_taken_from_the_reward(rows: list) -> None:
    decoder = make_decoder()
    parm = make_parm(decoder)
    data = make_data(rows, decoder, parm=parm, potentials={"dark": "parm"})
    data.setup("fit")
    batch, plain = (next(iter(each.train_dataloader())) for each in (data, make_data(rows, decoder, parm=parm)))
    assert torch.equal(batch["tokens"], plain["tokens"]) and plain["advantage"].shape == (4, 1)
    values = data._columns["potential/dark"].view(-1, 3, decoder.num_tokens)  # of groups of 3
    assert not values[..., 0].any() and ((values[..., 1:] > 0) & (values[..., 1:] < 1)).all()
    first = parm.values(decoder.features([data.spec.prompt(0)["prompt"]], data._columns["tokens"][:1].long()), [5])
    torch.testing.assert_close(first.exp()[0], values[0, 0, 5:6], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(batch["advantage"][:, :1], plain["advantage"], rtol=1e-5)
    scores = data._columns["score/dark"].view(-1, 3)
    centred = (scores[..., None] - values) - (scores[..., None] - values).mean(1, keepdim=True)
    wanted = centred / scores.std(1, correction=0)[:, None, None]
    torch.testing.assert_close(data._columns["advantage"].view_as(values), wanted, atol=1e-4, rtol=1e-4)


def test_what_parm_learns_from_comes_along(rows: list) -> None:
    decoder = make_decoder()
    data = make_data(rows, decoder, parm=make_parm(decoder), refit=PARMObjective())
    batch = next(iter(data.train_dataloader()))
    labels, tokens = batch["labels"], batch["tokens"]
    assert labels["correct"].shape == labels["first_unverified"].shape == (4,)
    assert labels["grounding"].shape == (4, decoder.num_tokens, decoder.max_words)
    assert PARMObjective().losses(make_parm(decoder), decoder.features(batch["prompt"], tokens), labels)["loss"] > 0
    row = next(row for row in rows if row["prompt"] == batch["prompt"][0])
    (verdict,) = data.judges.geneval.verdicts([row], to_uint8(decoder.image_tokenizer.decode(tokens[:1])))
    torch.testing.assert_close(labels["clauses"][0], torch.tensor([*map(float, verdict.clauses)]), equal_nan=True)


def test_labels_are_joined_in_mixed_precision_on_the_cpu(rows: list) -> None:
    decoder = make_decoder()
    data = make_data(rows, decoder, parm=make_parm(decoder), refit=PARMObjective())
    mixed = SimpleNamespace(forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    data.trainer.strategy = SimpleNamespace(precision_plugin=mixed)  # type: ignore[assignment]
    assert data.batch(range(4))["labels"]["grounding"].shape == (4, decoder.num_tokens, decoder.max_words)


def test_a_rank_gets_its_share_of_each_minibatch(rows: list) -> None:
    whole = [batch["tokens"] for _, batch in zip(range(3), make_data(rows).train_dataloader(), strict=False)]
    for number in range(2):
        trainer = {"world_size": 2, "global_rank": number}
        half = make_data(rows, trainer=trainer, batch_size=2).train_dataloader()
        for tokens, batch in zip(whole, half, strict=False):
            assert torch.equal(batch["tokens"], tokens[number::2])


def test_grids_come_with_their_trajectory(rows: list) -> None:
    data = make_data(rows, make_masked(), sampling=MaskSampling(steps=4))
    batch = next(iter(data.train_dataloader()))
    assert batch["recorded"].shape == (4, 4) and batch["trajectory"]["previews"].shape == (4, 4, 16)
    assert torch.equal(batch["trajectory"]["previews"][:, -1], batch["tokens"])


def test_denoised_images_come_with_their_latents(rows: list) -> None:
    sampling, decoder = FlowSampling(4, solver="sde", eta=0.5), make_flow(image_size=64)
    data = make_data(rows, decoder, sampling=sampling, independent_judges=[])
    batch = next(iter(data.train_dataloader()))
    assert batch["recorded"].shape == (4, 4) and batch["trajectory"]["latents"].shape == (4, 5, 16, 768)
    assert torch.equal(torch.as_tensor(batch["trajectory"]["latents"][:, -1]), batch["tokens"])
    module = GRPOModule(decoder, None, torch.optim.AdamW, 1, GRPOObjective(), sampling)
    logged: dict[str, Tensor] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    loss = module.training_step(batch, 0)
    assert logged["train/kl_sampled"] < 1e-4  # ratios of the policy that drew them are 1
    loss.backward()
    assert decoder.head.weight.grad is not None and decoder.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rewards": {"dark": 0.0}}, r"data\.rewards names no judge with a weight other than 0"),
        (
            {"potentials": {"dark": "likelihood"}},
            r"data\.independent_judges names 'likelihood', a judge that has a say",
        ),
        ({"independent_judges": ["dark"]}, r"data\.independent_judges names 'dark', a judge that has a say"),
        (
            {"per_round": {"juggling": 1}},
            r"data\.spec\.per_round names 'juggling', a task of which there are no prompts",
        ),
        ({"per_round": {}}, r"data\.spec\.per_round must have at least 1 group"),
        ({"per_round": {"juggling": 0}}, r"data\.spec\.per_round must have at least 1 group"),
        ({"per_round": {"colors": 2, "counting": -1}}, r"data\.spec\.per_round must have .* of no task fewer than 0"),
        ({"curriculum": 1.0}, r"data\.spec\.curriculum must be at least 0 and below 1, not 1"),
        ({"samples": 0}, r"data\.spec\.samples must be at least 1, not 0"),
        ({"inner_epochs": 0}, r"data\.inner_epochs must be at least 1, not 0"),
    ],
)
def test_what_cannot_work_is_named(rows: list, settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_data(rows, **settings)


def test_a_round_is_kept_as_a_data_set_if_asked(rows: list, tmp_path: Path) -> None:
    data = make_data(rows, trainer={"is_global_zero": True}, folder=str(tmp_path / "rounds"))
    for _ in range(2):  # a run that is killed and resumed may come to a round again
        data._round = -1
        data.batch(range(4))
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == ["round-00006"]  # two rounds an epoch
    kept = load_from_disk(tmp_path / "rounds" / "round-00006").with_format("torch")
    for name in ("tokens", "objects", "advantage", "score/dark", "score/likelihood"):
        torch.testing.assert_close(kept[name][:].to(data._columns[name].dtype), data._columns[name])
    places = data._columns["place"].tolist()
    assert kept["prompt"][:] == [data.spec.prompt(place)["prompt"] for place in places]
    assert [json.loads(row) for row in kept["metadata"][:]] == [data.spec.prompt(place) for place in places]


def test_minibatches_divide_a_round_and_judges_exist(rows: list) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size=5 does not divide the 12 images of a round"):
        make_data(rows, batch_size=5).setup("fit")
    with pytest.raises(ValueError, match=r"data\.batch_size=4 on each of 2 processes does not divide the 12 images"):
        make_data(rows, trainer={"world_size": 2}).setup("fit")
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches=4 does not divide the 6 minibatches of a"):
        make_data(rows, trainer={"accumulate_grad_batches": 4}).setup("fit")
    with pytest.raises(ValueError, match=r"data\.potentials\.geneval: data\.rewards has no 'geneval'"):
        make_data(rows, potentials={"geneval": "likelihood"}, independent_judges=[]).setup("fit")
    with pytest.raises(ValueError, match=r"judge 'dark' values no prefixes; there are: likelihood"):
        make_data(rows, potentials={"dark": "dark"}).setup("fit")
    with pytest.raises(ValueError, match=r"data\.potentials are values of prefixes, and only next-token decoders"):
        masked = {"decoder": make_masked(), "sampling": MaskSampling(steps=4), "independent_judges": []}
        make_data(rows, **masked, potentials={"dark": "likelihood"}).setup("fit")
    with pytest.raises(ValueError, match=r"data\.independent_judges names the judge 'taste'"):
        make_data(rows, independent_judges=["taste"]).setup("fit")
    data = make_data(rows)
    data.setup("fit")
    assert data.judges.teachers == {"dark"}
