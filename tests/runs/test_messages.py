"""What the user is told: one sentence that names the key, the file or what was meant, and nothing left behind."""

import ast
import builtins
import errno
import shutil
import sys
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.photographs import Photographs
from datamodules.prompt_templates import clause, make_row
from lightning_modules.backbone.loading import pretrained
from lightning_modules.backbone.text import PublishedTokenizer
from lightning_modules.files import BUNDLED
from lightning_modules.image_reader import UnreadableImage
from lightning_modules.runs.checks import (
    refuse_missing_devices,
    refuse_unread,
    refuse_wrong_values,
)
from lightning_modules.runs.command_line import wrong_option, wrong_setting
from lightning_modules.runs.judges import refuse_unknown_judges
from lightning_modules.runs.messages import MENDABLE, sentence
from tests.helpers.launch import command, launch
from tests.helpers.overrides import ROOT, TINY
from tests.helpers.pictures import write_folder

EVALUATE = ["task=evaluate", "module=evaluation", "~data", "logger=csv"]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 333\n"


def refusal(tmp_path: Path, *overrides: str, **env: str) -> str:
    """The one line that a refused command line ends in, without `Error: `; it leaves no run behind."""
    done = command(tmp_path, *overrides, check=False, **env)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Error: ") and not (tmp_path / "run").exists() and not (tmp_path / "rollouts").exists()
    return line.removeprefix("Error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["sampling.temp=1"], "there is no key sampling.temp; did you mean sampling.temperature?"),
        (["experiment=shapes_prm"], "there is no experiment=shapes_prm; did you mean experiment=shapes_"),
        (["--max_steps", "5"], "there is no option --max_steps; did you mean trainer.max_steps=5?"),
        (["ckpt_path=a=b.ckpt"], "ckpt_path=a=b.ckpt cannot be read: write 'ckpt_path=\"a=b.ckpt\"'"),
        (["-cn", "nothing"], "--config-name: there is no config nothing; there is train"),
        (["--multirun", "seed=0,1", "experiment=dpo,dpo_guide"], "there is no experiment=dpo_guide; did you mean"),
        (["--multirun", "seed=0,1", "trainer.max_steps=-7"], "trainer.max_steps must be a whole number, -1 for no"),
        (["name=${nothing}"], "name refers to the key nothing, and there is none"),
        (["hydra.run.dir=/proc/nothing"], "hydra.run.dir: /proc/nothing: there is no such file or folder"),
    ],
)
def test_a_command_line_that_hydra_refuses_is_answered(tmp_path: Path, overrides: list[str], answer: str) -> None:
    done = launch(overrides, tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"Error: {answer}"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_hydras_own_answer_and_traceback_are_there_for_who_asks(tmp_path: Path) -> None:
    asked = command(tmp_path, "sampling.temp=1", check=False, HYDRA_FULL_ERROR="1")
    assert "Traceback" in asked.stderr and "Could not override 'sampling.temp'" in asked.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("experimemt=dpo", "did you mean experiment=dpo?"),
        ("+debug=minute", "did you mean +debug=minutes or "),
        ("+experiment=dpo", "experiment is chosen already: write experiment=dpo"),
        ("experiment=", "there is no experiment=; there are: compute_curve, dpo, "),
        ("callbacks=null", "callbacks=null chooses nothing; there are: decoder, "),
        ("experiment=dpo,dpo_guided", "experiment has several values: add --multirun for a run of each"),
        ("seed=1,2", "a list is written 'seed=[1,2]', a text 'seed=\"1,2\"'"),
        ("~callbacks.genval", "did you mean ~callbacks.geneval?"),
        ("~data=rollouts", "~data is written without a value"),
        ("+seed=1", "seed is there already: write seed=1"),
        ("strategies.verified_best_of_4.strategy.kk=3", "did you mean strategies.verified_best_of_4.strategy.k?"),
        ("strategies.verified_best_of_4.k=3", "did you mean strategies.verified_best_of_4.strategy.k=3?"),
        ("strategies.parm.nope=3", "there is no key strategies.parm.nope; strategies has sample, "),
        (
            "+strategy@strategies.x=verified strategies.x.n=3",
            "no key strategies.x.n; strategies.x has sampling",
        ),
        (
            "+strategy@strategies.x=verifid",
            "no strategy=verifid; did you mean +strategy@strategies.x=verified",
        ),
        ("module.refit._target_=x", "there is no key module.refit._target_; module has"),
        ("experiment=grpo module.refit._target_=x", "as module.refit is null: write 'module.refit={_target_: x}'"),
        ("decoder.modules.x=1", "there is no key decoder.modules.x; decoder has checkpoint, module"),
        (
            "judges=open_clip judges.rewards.open_clip.clip.pretrained=a",
            "did you mean judges.rewards.clip.clip.pretrained=a?",
        ),
        ("strategies.verified_best_of_3.n=3", "did you mean strategies.verified_best_of_4.n=3?"),
        ("generating.strategy=beam", "there is no key generating.strategy; there is with task=generate"),
        ("debug=minutes", "write +debug=minutes"),
        ("-debug minutes", "did you mean +debug=minutes?"),
        ("--+debug=minutes", "there is no option --+debug; did you mean +debug=minutes?"),
        (
            "callbacks.geneval.test_strategies=[sample, verified]",
            "write 'callbacks.geneval.test_strategies=[sample, verified]'",
        ),
        ("strategy=beam", "a strategy is chosen for a name: write +strategy@strategies.NAME=beam"),
        ("decoder.module.rotary_dims=4", "there is with decoder=shapes_flow or decoder=shapes_masked"),
        ("max_steps=5", "did you mean trainer.max_steps=5?"),
        ("lr=1e-3", "did you mean module.optimizer.lr=1e-3?"),
        ("sampling.xyz=1", "there is no key sampling.xyz; sampling has temperature, top_k, top_p, guidance"),
        ("trainer.max_time=00:01:00:00", "trainer.max_time is set nowhere yet: write +trainer.max_time=00:01:00:00"),
        ("hydra.run.dri=x", "hydra.run has dir"),
        ("--trainer.max_steps=5", "did you mean trainer.max_steps=5?"),
        ("--seed 3 max_steps=5", "did you mean seed=3?"),
        ("-max-steps 5", "did you mean trainer.max_steps=5?"),
        ("--gpus 2", "there is no option --gpus; a setting is written KEY=VALUE, without dashes"),
        ("seed=1 -m task=fit", "write options such as -m first"),
        ("minutes", "'minutes' is no setting; did you mean debug=minutes?"),
        ("trainer.max_steps 5", "trainer.max_steps has no value: write trainer.max_steps=VALUE, without spaces"),
        ("trainer.max_steps= 5", "'5' is no setting; if it belongs to the one before, write trainer.max_steps=5"),
        ("name=a, b", "write 'name=\"a, b\"'"),
        ("images=cfg 7.5 [best]", "write 'images=\"cfg 7.5 [best]\"'"),
        (
            "evaluator.independent_judges=[clip",
            "a list is written 'evaluator.independent_judges=[a,b]'",
        ),
        ('name="abc', "write 'name=\"abc\"'"),
        ("ckpt_path=~/last.ckpt", "write ckpt_path=$HOME/last.ckpt"),
    ],
)
def test_what_was_meant_is_found_in_the_tree_of_settings(arguments: str, answer: str) -> None:
    given = arguments.split(" ")
    assert answer in str(wrong_option(given) or wrong_setting(given))


def test_settings_and_options_that_are_right_are_not_complained_about() -> None:
    for given in (
        ["experiment=dpo", "+debug=minutes", "~fid", "data.batch_size=3", "callbacks.geneval.test_strategies=[sample]"],
        ["--multirun", "seed=0,1", "experiment=dpo,dpo_guided", "strategies.verified_best_of_4.n=range(1,3)"],
        ["--cfg", "job", "--resolve", "-p", "trainer", "decoder=shapes_masked", "decoder.module.rotary_dims=4"],
        [
            "hydra.run.dir='a=b'",
            "+callbacks.more._target_=x",
            "++strategies.verified_best_of_4.n=3",
            "sampling={temperature: 1}",
        ],
    ):
        assert wrong_option(given) is None and wrong_setting(given) is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("callbacks.geneval.test_strategies=sample", "must be a list, [sample], not 'sample'"),
        ("evaluator.independent_judges=clip", "must be a list, [clip], not 'clip'"),
        ("evaluator.independent_judges=[1]", "must be a list, each a text, not [1]"),
        ("decoder.module.feature_layers=4", "must be a list, [4], not 4"),
        ("module.optimizer.lr=-1", "must be a number of at least 0, not -1"),
        ("module.optimizer.lr=abc", "must be a number of at least 0, not 'abc'"),
        ("module.optimizer.weight_decay=-0.1", "must be a number of at least 0, not -0.1"),
        ("module.optimizer.betas=[2,1]", "must be two numbers from 0 to below 1, not [2, 1]"),
        ("module.optimizer.betas=0.9", "must be two numbers from 0 to below 1, not 0.9"),
        ("module.optimizer.betas=[0.9,nan]", "must be finite, not [0.9, nan]"),
        ("module.optimizer.lr=inf", "must be finite, not inf"),
        ("module.objective.clause_weight=nan", "must be finite, not nan"),
        ("sampling.guidance=inf", "must be finite, not inf"),
        ("sampling.temperature=nan", "must be finite, not nan"),
        ("strategies.verified_reflection.stop_score=nan", "must be finite, not nan"),
        ("callbacks.geneval.test_strategies=[]", "must be a list of at least one name, not []"),
        ("trainer.val_check_interval=0", "must be a fraction up to 1, or a whole number of batches, not 0"),
        ("+trainer.accumulate_grad_batches=0", "must be a whole number of at least 1, not 0"),
        ("name=[a]", "must be a text, not ['a']"),
        ("ckpt_path=5", "must be a path, auto or null, not 5"),
        ("ckpt_path=[a,b]", "must be a path, auto or null, not ['a', 'b']"),
        ("ckpt_path={a:1}", "must be a path, auto or null, not {'a': 1}"),
        ("ckpt_path=", "must be a path, auto or null, not ''"),
        ("images=5", "must be a path or null, not 5"),
        ("module.warmup_steps=-1", "must be at least 0, not -1"),
        ("seed=abc", "must be a whole number from 0 to 4294967295, not 'abc'"),
        ("trainer.max_steps=1.5", "must be a whole number, -1 for no limit, not 1.5"),
        ("trainer.max_steps=abc", "must be a whole number, -1 for no limit, not 'abc'"),
        ("trainer.precision=foo", "must be one of 64, 32, 16, transformer-engine"),
        ("trainer.check_val_every_n_epoch=0", "must be a whole number of at least 1, not 0"),
        ("data.batch_size=0", "must be a whole number of at least 1, not 0"),
        ("evaluator.batch_size=many", "must be a whole number of at least 1, not 'many'"),
        ("logger.wandb.offline=maybe", "must be true or false, not 'maybe'"),
        (
            "geneval.test_prompts.per_task=many",
            "must be a whole number of at least 1 or named values, {a: 1}, not 'many'",
        ),
        ("geneval.test_prompts.per_task=-1", "must be a whole number of at least 1 or named values, {a: 1}, not -1"),
        ("sampling.temperature=null", "must be a number, not null"),
        ("strategies.verified_best_of_4.n=2.5", "must be a whole number of at least 1, not 2.5"),
        (
            "+sampling.temp=1",
            ": Sampling, which sampling is, takes no temp; it takes temperature, top_k, top_p, guidance",
        ),
        ("+strategies.verified_best_of_4.judg=parm", "did you mean judge? It takes strategy, n, judge"),
        (
            "strategies.sample=3",
            " must be a node with _target_, Strategy, not 3; +strategy@strategies.sample=FILE takes",
        ),
        (
            "+strategies.more={_target_: lightning_modules.decoding.verified.Nope}",
            ".more._target_: there is no lightning_modules.decoding.verified.Nope",
        ),
        ("+callbacks.more={a: 1}", " must be a node with _target_, the class that it makes, not {'a': 1}"),
        ("callbacks.geneval=5", "must be a node with _target_, the class that it makes, not 5"),
    ],
)
def test_a_value_that_does_not_fit_blames_its_own_key(compose_config: Any, override: str, said: str) -> None:
    config = compose_config(override)
    unresolved: Any = OmegaConf.to_container(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    with pytest.raises(ValueError, match=r"\w") as refused:
        refuse_wrong_values(plain, unresolved)
    assert str(refused.value).startswith(f"{override.lstrip('+').partition('=')[0]}") and said in str(refused.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("module", "module must be a group of settings, not null"),
        ("decoder._target_", "decoder must be a node with _target_, the class that it makes, not settings alone"),
        ("module.objective._target_", "module.objective must be a node with _target_, PARMObjective, not {"),
        ("strategies.verified._target_", "strategies.verified must be a node with _target_, Strategy, not settings"),
        ("parm.module.grid", "there is no key parm.module.grid, which PARM needs"),
        ("data.train", "there is no key data.train, which RolloutsDataModule needs"),
    ],
)
def test_what_is_left_out_is_named(compose_config: Any, key: str, said: str) -> None:
    config = compose_config(f"~{key}")
    unresolved: Any = OmegaConf.to_container(config)
    with pytest.raises(ValueError, match=r"\w") as refused:
        refuse_wrong_values(OmegaConf.to_container(config, resolve=True), unresolved)  # type: ignore[arg-type]
    assert str(refused.value).startswith(said)


def test_an_accelerator_may_be_left_out() -> None:
    refuse_missing_devices({"devices": 1})


def test_a_distance_needs_references(compose_config: Any) -> None:
    config: Any = OmegaConf.to_container(compose_config("fid=shapes", "fid.references=null"))
    with pytest.raises(ValueError, match=r"^fid\.references must be images to compare with, not null$"):
        refuse_wrong_values(config, config)


def test_infinity_is_fine_where_it_means_never_and_log_values_below_0_are(compose_config: Any) -> None:
    log_value = "strategies.verified_reflection.stop_score=-1"
    for overrides in (["strategies=reflection"], ["experiment=dpo", "module.max_fall=inf"], [log_value]):
        config = compose_config(*overrides)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        refuse_wrong_values(plain, plain)


@pytest.mark.parametrize("value", ["layer: -2", "depth: [2, 2, 6]", "finished: true", "steps: all", "inner: {n: 0}"])
def test_what_names_mean_to_a_class_of_yours_is_not_known(
    compose_config: Any, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_judges.py").write_text("class Mine:\n    def __init__(self, **settings):\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    plain: Any = OmegaConf.to_container(compose_config("strategies=decoder"), resolve=True)
    plain["judges"]["rewards"]["mine"] = {"_target_": "own_judges.Mine", **OmegaConf.create(f"{{{value}}}")}
    refuse_wrong_values(OmegaConf.to_container(OmegaConf.create(plain)), plain)  # type: ignore[arg-type]


def test_data_and_strategies_of_yours_may_call_other_things_as_ours_call_judges(compose_config: Any) -> None:
    plain: Any = OmegaConf.to_container(compose_config("strategies=parm"), resolve=True)
    plain["strategies"]["mine"] = {"_target_": "my_package.Mine", "verifier": "majority"}
    for named in (0.1, "eval.jsonl", ["eval.jsonl"]):
        refuse_unknown_judges(plain | {"data": {"_target_": "my_package.Mine", "independent_judges": named}})


def test_a_judge_that_is_not_there_is_found_wherever_a_strategy_names_it(compose_config: Any) -> None:
    config = compose_config("strategies=parm", "+strategies.verified_best_of_4.strategy.verifier=magic")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    with pytest.raises(ValueError, match=r"^strategies\.verified_best_of_4 names the judge 'magic'; there are: parm"):
        refuse_unknown_judges(plain)


def test_new_keys_that_nothing_reads_are_refused() -> None:
    refuse_unread(["+debug=minutes", "+callbacks.more=1", "+step=3", "~data", "seed=1"], {"a": "${step}"})
    with pytest.raises(ValueError, match=r"nothing reads the key foo\.bar; it has no effect"):
        refuse_unread(["+foo.bar=1"], {"foo": {"bar": 1}})
    with pytest.raises(ValueError, match=r"nothing reads the key debugs; did you mean \+debug=minutes\?"):
        refuse_unread(["+debugs=minutes"], {})


def test_all_names_of_lightnings_are_known() -> None:
    for name in ("auto", "DDP", *StrategyRegistry.available_strategies()):
        refuse_missing_devices({"accelerator": "cpu", "strategy": name})
    for name in {"auto", *AcceleratorRegistry.available_accelerators()} - {"tpu"}:
        with pytest.MonkeyPatch.context() as machine:
            machine.setattr("torch.cuda.is_available", lambda: True)
            machine.setattr("torch.backends.mps.is_available", lambda: True)
            refuse_missing_devices({"accelerator": name})


def test_more_processes_than_cores_are_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, most in ((1, 2), (2, 2), (8, 8)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        for fine in (1, most, str(most), "auto"):
            refuse_missing_devices({"accelerator": "cpu", "devices": fine})
        with pytest.raises(ValueError, match=r"trainer\.devices=-1 names GPUs, and there is none here"):
            refuse_missing_devices({"accelerator": "cpu", "devices": -1})
        with monkeypatch.context() as gpus:
            gpus.setattr("torch.cuda.is_available", lambda: True)
            refuse_missing_devices({"accelerator": "gpu", "devices": 99})
        for many in (most + 1, "99"):
            with pytest.raises(ValueError, match=rf"trainer\.devices={many} .* on the CPU, which has {cores} cores"):
                refuse_missing_devices({"accelerator": "cpu", "devices": many})


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_are_refused_before_work(tmp_path: Path) -> None:
    refuse_missing_devices({"accelerator": "auto"})
    for trainer in ("ddp", "fsdp"):
        said = refusal(tmp_path, *EVALUATE, f"devices={trainer}")
        assert "devices=ddp_cpu" in said and "trainer.accelerator=cpu" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampling=masked"], "sampling must be a group of settings, not 'masked'"),
        (["sampling.temperature=0"], "sampling.temperature must be above 0, not 0"),
        (["strategies.verified.k=0"], "strategies.verified.k must be a whole number of at least 1, not 0"),
        (
            ["strategies.verified_best_of_4.strategy.k=0"],
            "strategies.verified_best_of_4.strategy.k must be a whole number of at least 1, not 0",
        ),
        (
            ["task=train"],
            "there is no task=train; there are: evaluate, export, fit, generate, pipeline, rollout, score",
        ),
        (["ckpt_path=nowhere.ckpt"], "there is no file nowhere.ckpt"),
        (["task=export"], "task=export needs ckpt_path"),
        (["logger=wandb", "logger.wandb.log_model=true"], "logger.wandb.log_model needs logger.wandb.offline=false"),
        (["decoder.checkpoint=nowhere"], "checkpoint 'nowhere': there is no such folder"),
        (["decoder.checkpoint=bundled:shapes_decoder", *TINY[3:4]], "was made for another model"),
        (["task=export", "ckpt_path=."], "ckpt_path: . is a folder; only task=evaluate takes all checkpoints of one"),
        (["geneval.test_prompts.split=testing"], "split must be one of train, validation, evaluation"),
        (["task=evaluate", "module=evaluation"], "module=evaluation has no use for data: add ~data"),
        (["trainer.devices=0"], "trainer.devices must be above 0, or -1 for all there are, not 0"),
        (["experiment=shapes_clip", "test_ckpt_path=best"], "test_ckpt_path=best needs callbacks.checkpoint_best, and"),
        (["experiment=shapes_tokenizer", "task=rollout"], "needs before training; this data needs nothing"),
        (["task=generate", "images=new", "generating.strategy=x"], "generating.strategy is 'x'; there are: sample"),
        (["experiment=shapes_masked", "decoder.start=bundled:x"], "decoder.start: checkpoint 'bundled:x': there is no"),
        (["fid=inception", "fid.references.folder=/nowhere"], "fid.references.folder: there is no /nowhere"),
        (["seed=${oc.env:NOTHING}"], "seed: Environment variable 'NOTHING' not found"),
        (["monitored_strategy=best_of_8_parm"], "monitored_strategy is 'best_of_8_parm', and that is not among valid"),
        (
            ["experiment=dpo", "+data.scores.cliip=1"],
            "data.scores names the judge 'cliip'; there are: parm",
        ),
        (
            ["experiment=grpo", "+data.rewards.parm=1"],
            "evaluator.independent_judges: 'parm' decides what is trained on",
        ),
        (["evaluator.independent_judges=[parm]"], "evaluator.independent_judges: 'parm' is trained"),
        (
            ["experiment=grpo", "+data.rewards.clip=1", "evaluator.independent_judges=[parm]"],
            "data.independent_judges names 'clip'",
        ),
        (
            ["experiment=grpo", "+data.potentials.strict=parm", "evaluator.independent_judges=[]"],
            "data.potentials.strict: data.rewards has no 'strict'",
        ),
        (
            ["experiment=grpo", "+data.potentials.geneval=parm"],
            "evaluator.independent_judges: 'parm' decides what is trained on",
        ),
        (
            ["experiment=grpo", "+data.rewards.parm=1", "parm=compact", "evaluator.independent_judges=[]"],
            "parm.checkpoint is null: a PARM of random weights would decide what is trained on",
        ),
        (
            ["experiment=grpo", "callbacks.divergence.reward=train/reward/strict"],
            "callbacks.divergence.reward is train/reward/strict, and data.rewards has no 'strict'",
        ),
        (
            ["experiment=rejection_sampling", "module.objective.ratio=step"],
            "data.spec.strategy.sampling differs from module.sampling: what is trained is the distribution that",
        ),
        (
            ["experiment=grpo", "strategy@data.spec.strategy=reflection", "evaluator.independent_judges=[]"],
            "data.spec.strategy decodes images anew in part: module.objective.ratio must be likelihood",
        ),
        (
            ["experiment=grpo", "data.spec.strategy.sampling={temperature: 0.5}"],
            "data.spec.strategy.sampling must be a node with _target_, not {'temperature': 0.5}",
        ),
        (
            ["experiment=grpo", "data.spec.strategy.sampling.temperature=0.5"],
            "data.spec.strategy.sampling is that of sampling: write sampling.temperature=0.5",
        ),
        (
            ["experiment=grpo", "+data.spec.strategy.sampling.temperature=0.5"],
            "data.spec.strategy.sampling is that of sampling: write sampling.temperature=0.5",
        ),
        (["trainer.max_steps=-1"], "trainer.max_steps and trainer.max_epochs are both -1: the learning rate needs an"),
        (
            ["experiment=grpo", "data.independent_judges=[]"],
            "callbacks.divergence.independent is train/independent/clip, and data.ind",
        ),
        (["experiment=grpo", "data.spec.samples=1"], "data.spec.samples must be at least 2: images of one prompt are"),
        (
            ["experiment=dpo", "data.train.plain.samples=1"],
            "data.train.plain.samples must be at least 2: images of one",
        ),
        (["experiment=grpo", "+data.potentials.geneval=x"], "data.potentials names the judge 'x'; there are: parm"),
        (["+strategy@strategies=verified"], "is chosen for a name: write +strategy@strategies.NAME=verified"),
        (["task=generate", f"images={ROOT}/train.py"], "train.py is a file, and a folder is made there"),
        (["task=score", "images=.", "evaluator.independent_judges=[parm]"], "the judge 'parm'; there are: geneval,"),
        (["module.optimizer.lr=-1"], "module.optimizer.lr must be a number of at least 0, not -1"),
        (["geneval=file"], "geneval.test_prompts.path needs a value"),
        (["+foo.bar=1"], "nothing reads the key foo.bar"),
        (["ckpt_path="], "ckpt_path must be a path, auto or null, not ''"),
        (["name=[a]"], "name must be a text, not ['a']"),
        (["logger.wandb=false"], "logger.wandb=false is no logger: ~logger.wandb leaves it out, logger=csv has"),
        (["module=dpo"], "module=dpo learns from pairs: use experiment=dpo, or data=preferences or preference_files"),
        (["module=grpo"], "module=grpo and data=groups go together: use experiment=grpo"),
        (["data=groups"], "module=grpo and data=groups go together: use experiment=grpo"),
        (["data=preferences"], "module=parm learns from rollouts, not from pairs: use data=rollouts, or module=dpo"),
        (
            ["experiment=dpo", "+debug=minutes"],
            "; +debug=minutes sets keys too, for the job that conf/debug/minutes.yaml names",
        ),
        (["task=evaluate", "module=evaluation", "+debug=minutes"], "; +debug=minutes sets keys too"),
        (["tokenizer.module=null"], "tokenizer.module must have settings: tokenizer.module.grid is needed"),
        (["geneval.reward._target_=null"], "Expected a callable target, got 'None'"),
        (["task=score", "geneval=file", "images=nowhere"], "images: there is no folder nowhere"),
        (["experiment=pipeline", "+debug=minutes"], "the jobs of task=pipeline do not read debug: leave it out"),
        (["experiment=pipeline", "seed=1"], "the jobs of task=pipeline do not read seed: leave it out"),
        (["experiment=pipeline", "pipeline.rows=null"], "pipeline.rows must be named values, {a: 1}, not null"),
        (["experiment=pipeline", "~pipeline.jobs.dpo"], "pipeline.rows: 'DPO' names the job 'dpo'; there are: parm, "),
        (
            ["experiment=grpo", "+data.spec.per_round.colour=3"],
            "data.spec.per_round names the task 'colour'; there are:",
        ),
        (
            ["experiment=shapes_masked_grpo", "+data.potentials.geneval=parm", "evaluator.independent_judges=[]"],
            "only next-token decoders decide these",
        ),
        (
            ["data.train.verified.strategy.stride=8"],
            "strategy.stride must be 1 where random_stop is true, not 8",
        ),
        (["task=pipeline"], "task=pipeline needs jobs to run: use experiment=pipeline"),
        (["trainer.devices=99", "trainer.accelerator=cpu"], "trainer.devices=99 means as many processes on the CPU"),
        (["module.objective.finished=2"], "module.objective.finished must be a number from 0 to 1, not 2"),
        (["test_ckpt_path=last"], "test_ckpt_path must be null (the last weights) or best, not 'last'"),
        (
            ["judges=open_clip", "judges.rewards.clip.clip.model_name=ViT-B-32"],
            "judges.rewards.clip.clip: openai weights need ViT-B-32-quickgelu, not ViT-B-32: they were trained with",
        ),
    ],
)
def test_bad_config_ends_in_one_sentence_and_leaves_nothing(tmp_path: Path, overrides: list[str], said: str) -> None:
    assert said in refusal(tmp_path, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "evaluator.independent_judges=[magic]",
            "evaluator.independent_judges names the judge 'magic'; there are: parm,",
        ),
        (
            "strategies.verified_best_of_4.judge=magic",
            "strategies.verified_best_of_4 names the judge 'magic'; there are: parm, likelihood, geneval",
        ),
    ],
)
def test_judges_that_are_not_there_are_refused_before_rollouts(tmp_path: Path, override: str, said: str) -> None:
    done = command(tmp_path, override, "logger=csv", check=False)
    assert done.returncode == 1 and f"Error: {said}" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "rollouts").exists()


def checkpoints(folder: Path) -> dict[str, bytes]:
    """Files that are no checkpoints, by what is said of each."""
    whole = folder / "whole"
    torch.save({"state_dict": {"a": torch.zeros(1000)}, "global_step": 1}, whole)
    torch.save({"a": torch.zeros(3)}, folder / "old", _use_new_zipfile_serialization=False)
    torch.save([1], folder / "list")
    torch.save({"state_dict": {}, "global_step": 1, "path": folder}, folder / "objects")
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    content = whole.read_bytes()
    return {
        "is a git-lfs pointer: run `git lfs pull`": LFS,
        "is an HTML page": b"<!DOCTYPE html>\n<html>Sign in</html>",
        "is cut off": content[: len(content) // 2],
        "is empty": b"",
        "holds nothing but zeros": bytes(1000),
        "is a text that begins with 'Entry not found'": b"Entry not found",
        "is a zip archive that torch has not written": (folder / "zip").read_bytes(),
        "is of torch's old format": (folder / "old").read_bytes(),
        "is no checkpoint of training: it has no 'state_dict'": (folder / "list").read_bytes(),
        "holds more than tensors and is not loaded": (folder / "objects").read_bytes(),
        "holds weights alone, as safetensors": (BUNDLED / "shapes_decoder" / "model.safetensors").read_bytes(),
    }


@pytest.mark.slow
def test_a_file_that_is_no_checkpoint_is_named_with_what_it_is(tmp_path: Path) -> None:
    for said, content in checkpoints(tmp_path).items():
        path = tmp_path / "my.ckpt"
        path.write_bytes(content)
        assert refusal(tmp_path, *EVALUATE, f"ckpt_path={path}").startswith(f"ckpt_path: {path} {said}")


def _weights(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _pickled(value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return change


WEIGHTS = (BUNDLED / "shapes_decoder" / "model.safetensors").read_bytes()
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_weights("model.safetensors", LFS), "model.safetensors is a git-lfs pointer"),
        (_weights("model.safetensors", b""), "model.safetensors is empty"),
        (_weights("model.safetensors", WEIGHTS[:-5]), f"is cut off: it has {len(WEIGHTS) - 5} of {len(WEIGHTS)} bytes"),
        (_weights("model.safetensors", WEIGHTS[:99]), "model.safetensors is cut off: it has 99 of "),
        (_weights("model.safetensors", b"\x93" * 99), "model.safetensors is not a safetensors file"),
        (
            _weights("model.safetensors", b"\x02" + bytes(7) + b"{}"),
            "holds the weights of a CompactDecoder, not of a Linear",
        ),
        (
            _weights(
                "model.safetensors",
                b"\x43" + bytes(7) + b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}      ' + bytes(4),
            ),
            "model.safetensors is not a safetensors file: ",
        ),
        (_weights("config.json", '{"a": '), "config.json is not valid JSON: "),
        (_weights("config.json", "[]"), "config.json holds a list instead of settings"),
        (_weights(INDEX, "{"), f"{INDEX} is not valid JSON: "),
        (_weights(INDEX, "{}"), f"{INDEX} has no 'weight_map'"),
        (_weights(INDEX, '{"weight_map": {"a": "b.safetensors"}}'), f"b.safetensors is missing, which {INDEX} names"),
        (_pickled({"a": ROOT}), "pytorch_model.bin holds more than tensors and is not loaded"),
        (_pickled([1]), "pytorch_model.bin does not hold tensors with names alone"),
    ],
)
def test_broken_weights_are_named_with_what_is_wrong(
    tmp_path: Path, compose_config: Any, change: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(BUNDLED / "shapes_decoder", tmp_path / "weights")
    change(tmp_path / "weights")
    module = torch.nn.Linear(2, 2)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        pretrained(module, str(tmp_path / "weights"))
    assert said in str(refused.value)


def test_a_text_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    for content, said in (
        ("<html>", "is an HTML page"),
        ('{"model": 1', "is not valid JSON"),
        ("{}", "is not a tokenizer"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            PublishedTokenizer(str(tmp_path))


PLACES = {
    "rewards/stored_detections.py": (
        ["task=score", "images={folder}", "geneval=detections", "geneval.reward.detector.path={folder}/x.jsonl"],
        "x.jsonl:1: not valid JSON: Expecting value at column 1",
    ),
    "rewards/self_test.py": (
        ["geneval.reward.self_test.folder={folder}"],
        "prompts.jsonl:1: not valid JSON: Expecting value at column 1",
    ),
    "rewards/geneval_metadata.py": (
        ["geneval=file", "geneval.test_prompts.path={folder}/x.jsonl"],
        "x.jsonl:1: not valid JSON: Expecting value at column 1",
    ),
    "datamodules/prompt_folders.py": (["task=score", "images={folder}/a"], "metadata.jsonl:1: not valid JSON: "),
    "backbone/text.py": (
        [
            "experiment=showo_evaluate",
            "+debug=tiny_showo",
            "~decoder.module.text_tokenizer",
            "+decoder.module.text_tokenizer._target_=lightning_modules.backbone.text.PublishedTokenizer",
            "+decoder.module.text_tokenizer.checkpoint={folder}",
        ],
        "tokenizer.json is not a tokenizer: ",
    ),
    "train.py": (["logger.wandb.offline=false"], "logger: No API key configured"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_sentence_that_was_raised_from_another_error_is_what_is_printed(tmp_path: Path, place: str) -> None:
    overrides, said = PLACES[place]
    (tmp_path / "a" / "00000").mkdir(parents=True)
    for name in ("x.jsonl", "prompts.jsonl", "a/00000/metadata.jsonl"):
        (tmp_path / name).write_text("nothing\n")
    write_folder(tmp_path, [make_row("single_object", clause("cat"))], {(0, 0): np.zeros((64, 64, 3), np.uint8)})
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    given = [item.format(folder=tmp_path) for item in overrides]
    done = command(
        tmp_path, "task=evaluate", *given, check=False, WANDB_MODE="online", WANDB_API_KEY="", HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ") and said in last


def test_everything_that_is_raised_from_another_error_is_told_in_its_own_words() -> None:
    raised = []
    rooms = ("callbacks", "datamodules", "lightning_modules")
    for path in [ROOT / "train.py", *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.cause is not None:
                assert isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name), path
                raised.append(getattr(builtins, node.exc.func.id, None) or UnreadableImage)
    assert len(raised) > 10 and all(issubclass(kind, MENDABLE) for kind in raised)


def raised(make: Callable[[], Any]) -> BaseException:
    """What a call raises."""
    with pytest.raises(Exception) as found:
        make()
    return found.value


def test_our_messages_stay_whole_and_those_of_others_are_cut_to_a_line(tmp_path: Path) -> None:
    def lines() -> None:
        raise ValueError("one\n  two")

    ours = {"__file__": str(ROOT / "callbacks" / "x.py"), "lines": None}
    exec(compile("def lines():\n    raise ValueError('one\\n  two')", ours["__file__"], "exec"), ours)
    assert sentence(raised(lines), {}) == "one"
    assert sentence(raised(ours["lines"]), {}) == "one\n  two"
    # A constructor's error, one level down: what that was raised from is not looked at.
    node = {"_target_": "lightning_modules.backbone.text.PublishedTokenizer", "checkpoint": str(tmp_path)}
    (tmp_path / "tokenizer.json").write_text("{}")
    error = raised(lambda: instantiate({"text": node}))
    assert sentence(error, {}) == f"text tokenizer: {tmp_path}/tokenizer.json is not a tokenizer: " + (
        f"{error.__cause__.__cause__} (in text)"
    )
    missing = raised(lambda: instantiate({"a": {"_target_": "builtins.dict", "_args_": [[1]]}}))
    assert sentence(missing, {"a": "${b}"}).startswith("TypeError: ") and sentence(missing, {"a": "${b}"}).endswith(
        "(in b)"
    )


@pytest.mark.parametrize(
    ("package", "node", "said"),
    [
        (
            "transformers",
            {"_target_": "lightning_modules.rewards.tiny_judge.save_tiny_judge"},
            "transformers is not installed: pip install -e '.[showo]' (in a)",
        ),
        ("peft", {"_target_": "lightning_modules.backbone.lora.LoRA"}, "peft is not installed: pip install"),
        (
            "transformers",
            {"_target_": "lightning_modules.backbone.emu3_vq.Emu3VQ"},
            "Emu3VQ needs transformers: pip install -e '.[janus]' (in a)",
        ),
    ],
)
def test_a_package_that_is_not_there_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, node: dict[str, Any], said: str
) -> None:
    module = node["_target_"].rpartition(".")[0]
    room, _, name = module.rpartition(".")
    monkeypatch.delattr(import_module(room), name, raising=False)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    error = raised(lambda: instantiate({"a": node | ({"folder": str(tmp_path / "x")} if "tiny" in module else {})}))
    assert sentence(error, {}).startswith(said)


def test_what_a_data_loaders_process_raised_is_told_as_if_raised_here(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    images = Photographs(str(tmp_path), 8)
    here = sentence(raised(lambda: images[0]), {})
    there = raised(lambda: list(DataLoader(images, num_workers=1)))  # type: ignore[arg-type]
    assert "DataLoader worker" in str(there) and sentence(there, {}) == here
    assert here.startswith(f"fid.references.folder: {tmp_path}/a.png cannot be read: ")
    lost = raised(lambda: list(DataLoader([tmp_path / "nothing"], num_workers=1, collate_fn=lambda row: row[0].open())))  # type: ignore[arg-type]
    assert sentence(lost, {"data": {"path": str(tmp_path)}}) == (
        f"data.path: {tmp_path}/nothing: there is no such file or folder"
    )


def test_what_the_system_refuses_is_told_with_key_and_path(tmp_path: Path) -> None:
    unresolved = {
        "name": "a",
        "rollouts_dir": str(tmp_path),
        "data": {"folder": "${rollouts_dir}"},
        "hydra": {"run": {"dir": "/"}},
    }
    (tmp_path / "file").write_text("")
    for make, said in (
        (lambda: (tmp_path / "file" / "x").mkdir(), f"{tmp_path}/file/x: it is below a file, not a folder"),
        (lambda: tmp_path.read_text(), f"{tmp_path}: it is a folder, not a file"),
        (
            lambda: _raise(OSError(errno.EACCES, "Permission denied", f"{tmp_path}/x")),
            f"{tmp_path}/x: there is no permission",
        ),
        (
            lambda: _raise(OSError(errno.EROFS, "Read-only", f"{tmp_path}/x")),
            f"{tmp_path}/x: the file system is read-only",
        ),
    ):
        assert sentence(raised(make), unresolved) == f"rollouts_dir: {said}"
    assert sentence(OSError(errno.EMFILE, "Too many open files", "/x"), {}).startswith(
        "/x: too many files are open; raise"
    )
    assert sentence(BrokenPipeError(errno.EPIPE, "Broken pipe"), {}).startswith("nobody reads the output any more")
    full = sentence(OSError(errno.ENOSPC, "No space left on device"), {"rollouts_dir": str(tmp_path)})
    assert full == f"there is no space left on the disk, where rollouts_dir={tmp_path} is"
    assert sentence(ConnectionError(f"Couldn't reach '{tmp_path}'\nmore"), unresolved) == (
        f"rollouts_dir: Couldn't reach '{tmp_path}'"
    )


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.slow
def test_a_run_whose_folders_cannot_be_written_says_which(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = command(tmp_path, *TINY, "task=rollout", f"rollouts_dir={tmp_path}/file/x", "logger=csv", check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith(f"Error: rollouts_dir: {tmp_path}/file/x") and last.endswith(
        "it is below a file, not a folder"
    )
