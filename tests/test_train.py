"""The command line: every config composes and builds, the jobs run, wrong input ends in one sentence."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from datamodules.pairs import reference_log_probs
from datamodules.shapes.scenes import ShapesStream
from lightning_modules.decoding.strategy import Strategy
from lightning_modules.report.results import BEFORE_TRAINING
from lightning_modules.rewards.geneval_metadata import TASKS
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.parm import PARM
from lightning_modules.runs.checks import refuse_wrong_values
from lightning_modules.tasks.run import Parts, run
from tests.helpers.configs import composed
from tests.helpers.launch import ENV, TRAIN, Start, command, launch_together
from tests.helpers.overrides import (
    BUNDLED,
    ROOT,
    SMALL,
    SMALL_DPO,
    SMALL_PARM,
    TINY,
    TINY_SHOWO,
    here,
    pair_files,
)
from tests.helpers.places import read_only
from tests.helpers.wandb_runs import artifacts, history, records, settings_of, table

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# What needs weights that tests have to make first: tests/test_geneval_tasks.py.
ELSEWHERE = ("judges=llava_onevision", "geneval=coco", "geneval=detections", "decoder=diffus", "decoder=sd",
             "decoder=flux", "decoder=sana", "decoder=qwen")  # fmt: skip
PARTS = ("strategy", "scoring", "generating")  # of other groups' files
GROUPS = [
    choice
    for folder in sorted((ROOT / "conf").iterdir())
    if folder.is_dir() and folder.name not in ("experiment", "hydra", "debug", "sweep", *PARTS)
    for path in sorted(folder.glob("*.yaml"))
    if not (choice := f"{folder.name}={path.stem}").startswith(ELSEWHERE)
]
CHOICES = ["", "+debug=minutes", "+debug=minutes_groups", *(f"experiment={name}" for name in EXPERIMENTS), *GROUPS]
STRATEGIES = sorted(path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml"))
PAIR_FILES = ["data.train.path=pairs.jsonl", "data.validation.path=pairs.jsonl"]
# What some choices need beside them; the others are built small.
COMPANIONS = {
    "+debug=minutes_groups": [*TINY, "experiment=grpo"],
    "data=preference_files": [*TINY, "module=dpo", *PAIR_FILES],
    "judges=open_clip": [
        *TINY,
        "judges.rewards.clip.clip.model_name=ViT-S-32-alt",
        "judges.rewards.clip.clip.pretrained=null",
        "judges.rewards.clip.clip.require_pretrained=false",
    ],
    "task=generate": [*TINY, "images=somewhere"],
    "task=score": [*TINY, "images=somewhere"],
    "decoder=full": [],
    "experiment=full_decoder": [],
    "experiment=shapes_parm_left_right": [*TINY, "parm.checkpoint=null"],
    "experiment=shapes_masked": [*TINY, "decoder.start=null"],
    "experiment=shapes_masked_parm_start": [*TINY, "parm.start=null"],
    "experiment=shapes_flow": [*TINY, "decoder.start=null"],
    "experiment=shapes_flow_parm_start": [*TINY, "parm.checkpoint=null"],
    "strategies=flow": [*TINY, "decoder=shapes_flow"],
    "decoder=showo": TINY_SHOWO,
    "strategies=janus": ["decoder=janus_pro_1b", "+debug=tiny_janus"],
    "experiment=showo_evaluate": TINY_SHOWO,
    "experiment=showo_parm": TINY_SHOWO,
    "experiment=showo_dpo": [*TINY_SHOWO, *PAIR_FILES],
    "decoder=janus_pro_1b": ["+debug=tiny_janus"],
    "decoder=janus_pro_7b": ["+debug=tiny_janus"],
    "experiment=janus_evaluate": ["+debug=tiny_janus"],
    "experiment=janus_parm": ["+debug=tiny_janus"],
    "experiment=janus_dpo": ["+debug=tiny_janus", *PAIR_FILES],
    "experiment=janus_grpo": ["+debug=tiny_janus"],
    "decoder=llamagen_256": ["+debug=tiny_llamagen"],
    "decoder=llamagen_512": ["+debug=tiny_llamagen"],
    "experiment=llamagen_evaluate": ["+debug=tiny_llamagen"],
    "decoder=emu3": ["+debug=tiny_emu3"],
    "strategies=diffusers": ["decoder=sd3", "+debug=tiny_sd3"],
    "experiment=sd3_evaluate": ["+debug=tiny_sd3"],
    "fid=inception": [*TINY, "evaluator.fid=null", "fid.references.folder=somewhere"],
    "geneval=file": [*TINY, f"geneval.test_prompts.path={ROOT}/tests/golden/shapes_prompts.jsonl"],
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_every_config_composes_and_builds(compose_config, choice: str, tmp_path: Path, monkeypatch: Any) -> None:
    pair_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = compose_config(*([choice] if choice else []), *COMPANIONS.get(choice, TINY))
    written: Any = OmegaConf.to_container(config)
    OmegaConf.resolve(config)
    refuse_wrong_values(OmegaConf.to_container(config), written)  # type: ignore[arg-type]
    parts = Parts(config)
    assert parts.module is not None and parts.callbacks and instantiate(config.logger) is not None
    assert parts.data is not None or not config.get("data")  # what is only measured needs no data
    if choice in ("devices=ddp", "devices=fsdp"):  # GPUs, which this machine may lack
        assert instantiate(config.trainer.strategy) is not None
    else:
        assert instantiate(config.trainer) is not None


def test_configs_of_tests_are_those_of_runs() -> None:
    few = [
        "+strategy@strategies.mine=beam",
        "strategies.mine.n=3",
        "~callbacks.geneval",
        "hydra.run.dir=x",
        "+a={b: c}",
    ]
    for overrides in ([*SMALL_PARM, *few], ["experiment=dpo", "~fid", *SMALL_DPO]):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            whole: Any = OmegaConf.to_container(compose("train", overrides, return_hydra_config=True))
        ours: Any = OmegaConf.to_container(composed(*overrides))
        for config in (ours, whole):
            del config["hydra"]["job"]["override_dirname"]  # which nothing reads
        assert ours == whole and [*ours] == [*whole]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_composes_under_a_name_of_its_own(compose_config, name: str) -> None:
    before = compose_config("strategies=sample").strategies
    config = compose_config("strategies=sample", f"+strategy@strategies.mine={name}")
    assert isinstance(instantiate(config.strategies.mine, _convert_="all"), Strategy)
    assert {key: value for key, value in config.strategies.items() if key != "mine"} == before


@pytest.mark.parametrize("choice", [path.stem for path in sorted((ROOT / "conf" / "strategies").glob("*.yaml"))])
def test_no_strategy_follows_from_another(compose_config, choice: str) -> None:
    """An override of one changes that one alone."""
    assert "${strategies." not in OmegaConf.to_yaml(compose_config(f"strategies={choice}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *EXPERIMENTS])
def test_the_same_job_runs_on_other_devices(compose_config, name: str) -> None:
    """A choice of devices changes nothing of an experiment's own settings."""
    choice = [f"experiment={name}"] if name else []
    one, two = (compose_config(*choice, *trainer).trainer for trainer in ([], ["devices=ddp_cpu"]))
    devices = ("accelerator", "devices", "num_nodes", "strategy")
    assert {k: v for k, v in one.items() if k not in devices} == {k: v for k, v in two.items() if k not in devices}


@pytest.mark.slow
def test_every_job_of_the_pipeline_composes(compose_config) -> None:
    pipeline = instantiate(compose_config("experiment=pipeline").pipeline, _convert_="all")
    configs = {}
    for name, job in pipeline.jobs.items():
        overrides = [re.sub("<(.*?)>", "outputs/seed-0/\\1", item) for item in job.overrides]
        config = configs[name] = compose_config(*overrides)
        if config.task == "export":  # of the networks that the exported job trained
            assert config.module == configs[Path(config.ckpt_path).parent.parent.name].module
        rows = {row.strategy for row in pipeline.rows.values() if row.job == name}
        needed = {strategy.removesuffix(BEFORE_TRAINING) for strategy in rows}
        assert needed == rows or config.callbacks.geneval.before_training
        assert needed <= set(config.callbacks.geneval.test_strategies or config.strategies) <= set(config.strategies)
        assert not any("<" in str(value) for value in (config.parm.checkpoint, config.ckpt_path, config.export_dir))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_their_command(name: str) -> None:
    first, second = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith(f"# python train.py experiment={name}")


@pytest.mark.slow
def test_the_full_size_decoder_trains_one_step(compose_config) -> None:
    config = compose_config("experiment=full_decoder")
    module = instantiate(config.module, _convert_="all")
    decoder = module.decoder
    assert (decoder.dim, decoder.num_tokens, decoder.image_tokenizer.codebook_size) == (768, 256, 8192)
    assert len(decoder.transformer.blocks) == 12 and decoder.transformer.config.heads == 12
    tokens = torch.randint(0, 8192, (1, 256))
    optimizer = module.optimizer(module.parameters())
    before = -decoder.token_log_probs(["a photo of a star"], tokens).mean()
    before.backward()
    optimizer.step()
    after = -decoder.token_log_probs(["a photo of a star"], tokens).mean()
    assert after < before


def check_what_wandb_holds(run: Path) -> None:
    """Settings, curves, pictures and checkpoints of the main job."""
    (path,) = run.glob("wandb/*run-*/run-*.wandb")
    kinds = [record.WhichOneof("record_type") for record in records(path)]
    assert kinds.count("run") == 1
    assert settings_of(path) == OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    logged = history(path)
    keys = ["val/geneval", "val/parm/auc", *(f"val/geneval/sample{task}" for task in ("", "/counting", "/color_attr"))]
    steps = {key: [row["trainer/global_step"] for row in logged if key in row] for key in keys}
    validated = steps["val/geneval"]
    assert validated and set(map(tuple, steps.values())) == {tuple(validated)}
    for stage, prompts, names in (
        ("val", 6, ["sample", "verified_best_of_4", "verified_reflection"]),
        ("test", 6, ["sample", "verified_best_of_4_before_training", "verified_best_of_4"]),
    ):
        rows = table(path, f"{stage}/images")
        assert len(rows) == prompts and all(row["prompt"].startswith("a photo of") for row in rows)
        for row in rows:
            for name in names:
                assert Image.open(row[name]).size == (64, 64)
                assert row[f"{name} correct"] == (not row[f"{name} reason"]) and 0 <= row[f"{name} parm"] <= 1
    assert sum(artifact.type == "model" for artifact in artifacts(path)) >= 2  # the last ones and the best


@pytest.mark.slow(seconds=60)
def test_the_main_job_leaves_everything_a_run_should(tmp_path: Path) -> None:
    folder = tmp_path
    overrides = [*SMALL_PARM, "trainer.log_every_n_steps=1", "callbacks.geneval.every_n_epochs=1",
                 "callbacks.checkpoint_last.save_top_k=-1", "callbacks.geneval.before_training=true"]  # fmt: skip
    logger = ["logger=default", "logger.wandb.offline=false", "logger.wandb.log_model=true"]
    printed = command(folder, *overrides, *logger, WANDB_DATA_DIR=str(folder)).stdout
    run = folder / "run"
    check_what_wandb_holds(run)
    alone, verified = (
        ["sample", "best_of_8_likelihood"],
        ["best_of_8_parm", "verified", "verified_best_of_4", "verified_reflection"],
    )
    before = [f"{name}_before_training" for name in verified]
    names = [*alone, *before, *verified]
    report = json.loads((run / "geneval.json").read_text())
    assert list(report["strategies"]) == names
    assert report["prompts"] == 6
    first = [line.split()[0] for line in printed[printed.index(" strategy ") :].splitlines() if line.strip()]
    rows = [word for word in first if word in {*names, "before", "after"}]
    assert rows == [*alone, "before", *verified, "after", *verified]
    for name in names:
        assert (run / "sheets" / f"{name}.png").is_file()
    assert len((run / "results.jsonl").read_text().splitlines()) == 6 * len(names)
    header = (run / "metrics" / "metrics.csv").read_text().splitlines()[0].split(",")
    for key in ("train/loss", "val/parm/auc_50", "val/likelihood/auc_50", "val/parm/ece", "val/geneval",
                "test/geneval/verified_best_of_4", "test/parm/auc"):  # fmt: skip
        assert key in header
    assert OmegaConf.load(run / "config.yaml").trainer.max_steps == 5
    assert {"last.ckpt", "best.ckpt"} <= {path.name for path in (run / "checkpoints").iterdir()}
    assert list(run.glob("wandb/*run-*/files/media/html/test/page_*.html"))
    assert "train/learning_rate" in header
    for picture, logged in (("curves", "train/curves"), ("compute", "test/compute"), ("sheets/side_by_side", "test/*")):
        assert (run / f"{picture}.png").is_file()
        assert list(run.glob(f"wandb/*run-*/files/media/images/{logged}_*.png"))
    assert (run / "page.html").read_text().count("<section") == 6 * len(names)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any(key.startswith("decoder.") for key in checkpoint["state_dict"])
    # Where all but its folder is read-only, the checkpoint evaluates to what the end of training printed; it exports.
    seeded = [*overrides, f"ckpt_path={run}/checkpoints/step-5.ckpt"]
    places = [folder / name for name in ("home", "scores", "rollouts")]
    for place in places:
        place.mkdir(exist_ok=True)
    line = [sys.executable, str(TRAIN), *here(folder), *seeded, "task=evaluate", "logger=default",
            f"scores_dir={folder}/scores", f"hydra.run.dir={folder}/again"]  # fmt: skip
    prefix, env = read_only(*places), ENV | {"HOME": str(folder / "home")}
    evaluated = subprocess.run([*prefix, *line], cwd=folder, env=env, capture_output=True, text=True)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert not prefix or f"scores_dir: nothing can be written to {folder}/scores" in evaluated.stdout
    (log,) = (folder / "again").glob("wandb/*run-*/run-*.wandb")
    assert all(Image.open(row["sample"]).size == (64, 64) for row in table(log, "test/images"))
    assert "Testing run/checkpoints/step-5.ckpt (step 5)" in evaluated.stdout and "Results in again" in evaluated.stdout
    rows, trained = ((path / "results.jsonl").read_text().splitlines() for path in (run, folder / "again"))
    assert trained == [row for row in rows if "_before_training" not in row]
    again = json.loads((folder / "again" / "geneval.json").read_text())["strategies"]
    assert list(again) == [*alone, *verified]
    assert all(result["tasks"] == report["strategies"][name]["tasks"] for name, result in again.items())
    # Before training the verifier was that of its start: here random numbers, the same in any run of this seed.
    start = [*overrides, "task=evaluate", "callbacks.geneval.test_strategies=[verified_best_of_4]"]
    command(folder, *start, f"hydra.run.dir={folder}/start")
    untrained = (
        (folder / "start" / "results.jsonl").read_text().replace("_best_of_4\\/", f"_best_of_4{BEFORE_TRAINING}\\/")
    )
    first = f'{{"filename":"verified_best_of_4{BEFORE_TRAINING}'
    assert untrained.splitlines() == [row for row in rows if row.startswith(first)]
    command(folder, *seeded, "task=export", f"export_dir={folder}/export", f"hydra.run.dir={folder}/exporting")
    exported = PARM.from_pretrained(folder / "export").state_dict()
    for key, value in exported.items():
        torch.testing.assert_close(value, checkpoint["state_dict"][f"parm.{key}"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_run_resumes_from_its_checkpoint_and_tests_the_best_weights_of_both(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    small = [*SMALL_PARM, "callbacks.geneval.every_n_epochs=1", "callbacks.geneval.test_strategies=[sample]"]
    command(tmp_path, *small, "trainer.max_steps=3")
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3
    overrides = ["trainer.max_steps=5", f"ckpt_path={checkpoints}/last.ckpt", "test_ckpt_path=best",
                 f"hydra.run.dir={tmp_path}/more", "trainer.log_every_n_steps=1"]  # fmt: skip
    printed = command(tmp_path, *small, *overrides).stdout
    more = tmp_path / "more" / "checkpoints"
    assert torch.load(more / "last.ckpt", weights_only=True)["global_step"] == 5
    rows = (tmp_path / "more" / "metrics" / "metrics.csv").read_text().splitlines()
    step = rows[0].split(",").index("step")
    assert min(int(row.split(",")[step]) for row in rows[1:]) >= 3  # trains on, not anew
    # Untrained decoders are never right, so the first weights stay the best.
    assert "Testing more/checkpoints/best.ckpt (step 3, val/geneval 0.000)" in printed
    assert (more / "best.ckpt").read_bytes() == (checkpoints / "best.ckpt").read_bytes()
    # A set of the frozen decoder alone is made again, what the PARM of a moment made cannot be.
    made = {path.name for path in (tmp_path / "rollouts").iterdir()}
    shutil.rmtree(tmp_path / "rollouts")
    last = tmp_path / "more" / "checkpoints" / "last.ckpt"
    gone = ["trainer.max_steps=6", f"ckpt_path={last}", f"rollouts_dir={tmp_path}/disk2"]
    done = command(tmp_path, *small, *gone, check=False)
    (verified,) = (name for name in made if name.startswith("verified-"))
    assert done.stderr.strip().splitlines()[-1] == (
        f"Error: {verified}, on which the run of this checkpoint was trained, is neither in {tmp_path}/disk2 nor in "
        f"{tmp_path}/rollouts, and the models or the code that made it have changed since: set rollouts_dir to the "
        "folder where it is now"
    )
    (plain,) = (path.name for path in (tmp_path / "disk2").iterdir())
    assert plain in made and plain.startswith("plain-")


@pytest.mark.slow(seconds=28)
def test_two_ranks_decode_what_one_does(tmp_path: Path) -> None:
    # 9 prompts: one process has more batches than the other, so that they would wait for ever if they met in between.
    tasks = "{single_object: 2, two_object: 1, counting: 2, colors: 2, position: 1, color_attr: 1}"
    names = ["sample", "best_of_8_parm", "verified_best_of_4", "reflection_clip"]
    common = [*BUNDLED, "task=evaluate", f"geneval.test_prompts.per_task={tasks}", "seed=5", "strategies=reflection",
              "strategies.reflection_clip.rounds=2",
              f"callbacks.geneval.test_strategies=[{','.join(names)}]"]  # fmt: skip
    command(tmp_path, *common, "evaluator.batch_size=9")
    command(tmp_path, *common, "evaluator.batch_size=4", "devices=ddp_cpu", f"hydra.run.dir={tmp_path}/two")
    one, two = ((tmp_path / name / "results.jsonl").read_text().splitlines() for name in ("run", "two"))
    assert len(one) == len(two) == len(names) * 9 and {json.loads(row)["correct"] for row in one} == {True, False}
    flipped = sum(a != b for a, b in zip(one, two, strict=True))
    assert flipped == 0, f"{flipped} of {len(one)} rows differ between one and two processes"
    for name in names:  # all of the images
        sheets = [tmp_path / folder / "sheets" / f"{name}.png" for folder in ("run", "two")]
        assert sheets[0].read_bytes() == sheets[1].read_bytes()
    first, second = (json.loads((tmp_path / name / "geneval.json").read_text()) for name in ("run", "two"))
    for name, scores in first["strategies"].items():
        assert second["strategies"][name]["tasks"] == scores["tasks"]
        if name != "reflection_clip":  # in which batches wait for the image with most to decode again
            assert second["strategies"][name]["decoder_passes_per_image"] == scores["decoder_passes_per_image"]


@pytest.mark.slow
def test_weights_are_measured_as_they_are_without_rollouts(tmp_path: Path, compose_config) -> None:
    common = [*(item for item in BUNDLED if not item.startswith("data")), "task=evaluate",
              "callbacks.geneval.test_strategies=[best_of_8_likelihood,best_of_8_parm]"]  # fmt: skip
    run(compose_config(*common, "data.test.samples=1"))
    rows = (tmp_path / "results.jsonl").read_text()
    run(compose_config(*common, "module=evaluation", "~data", "rollouts_dir=elsewhere"))
    assert (tmp_path / "results.jsonl").read_text() == rows
    assert not Path("elsewhere").exists()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(
    tmp_path: Path, compose_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*(item for item in BUNDLED if not item.startswith("data")), "task=evaluate", "module=evaluation", "~data",
              "seed=5", "evaluator.batch_size=4",
              "callbacks.geneval.test_strategies=[sample,best_of_8_parm]"]  # fmt: skip
    left = ("results.jsonl", "sheets/sample.png", "sheets/best_of_8_parm.png")
    judge, judged = GenEvalReward.verdicts, []  # of a batch, and first of the detector's self-test

    def counted(*given: Any) -> Any:
        judged.append(given)
        if len(judged) == 4:  # the first of two batches by the second strategy
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(*given)

    monkeypatch.setattr(GenEvalReward, "verdicts", counted)
    with pytest.raises(SystemExit, match="143"):
        run(compose_config(*common))
    assert len(judged) == 4 and not (tmp_path / "results.jsonl").exists()
    assert "the same command resumes it" in capsys.readouterr().out
    run(compose_config(*common))
    assert len(judged) == 6 and "batches decoded and judged before: 3" in capsys.readouterr().out
    went_on = {name: (tmp_path / name).read_bytes() for name in left}
    stories = (tmp_path / "page.html").read_text()
    run(compose_config(*common))  # what is complete is not kept
    assert len(judged) == 11 and went_on == {name: (tmp_path / name).read_bytes() for name in left}
    seconds = re.compile(r'(<td class="seconds">|<time>)[^<]*')
    assert seconds.sub("", stories) == seconds.sub("", (tmp_path / "page.html").read_text())
    assert not list((tmp_path / "scores").glob("unfinished-*"))


PLAIN_STRATEGY = ["strategies.best_of_8_likelihood.n=2"]
PRETRAINED = [
    "shapes_tokenizer",
    "shapes_decoder",
    "shapes_masked",
    "shapes_flow",
    "shapes_parm_start",
    "shapes_parm_left_right",
    "shapes_masked_parm_start",
    "shapes_flow_parm_start",
    "shapes_clip",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_pretraining_experiments_run(tmp_path: Path, name: str) -> None:
    overrides = [
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "data.validation_images=8",
        "data.batch_size=4",
    ]
    small = SMALL
    if name in ("shapes_tokenizer", "shapes_clip"):
        small = [item for item in SMALL if "callbacks" not in item]
    if name == "shapes_tokenizer":
        overrides += ["module.codebook_images=2048", "module.codebook_iterations=1"]
    else:
        overrides += ["data.num_workers=0"]
    if "flow" in name:
        small = [item for item in small if item not in PLAIN_STRATEGY]
        small += ["decoder.module.rotary_dims=4", "sampling.steps=4"]
    if name in ("shapes_masked", "shapes_flow"):
        small = [item for item in small if item not in PLAIN_STRATEGY] + ["decoder.start=null"]
    if name == "shapes_parm_left_right":
        overrides.append("parm.checkpoint=null")
    if name == "shapes_masked_parm_start":
        overrides.append("parm.start=null")
    if name == "shapes_flow_parm_start":
        overrides += ["parm.checkpoint=null", "callbacks.geneval.test_strategies=[sample,verified_best_of_2]"]
    if "masked" in name:
        small = [*small, "decoder.module.rotary_dims=4", "sampling.steps=4"]
    if "parm" in name:
        best = "verified_best_of_2" if "flow" in name else "verified_best_of_4"
        small = [*small, "strategies.best_of_8_parm.n=2", f"strategies.{best}.n=2"]
    command(tmp_path, f"experiment={name}", *small, *overrides)
    assert "val/" in (tmp_path / "run" / "metrics" / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.slow
def test_parm_of_a_mask_token_decoder_trains_on_how_grids_were_filled(tmp_path: Path) -> None:
    masked = ["decoder.module.rotary_dims=4", "sampling.steps=4"]
    once = ["data.train.reflected.from_epoch=1", "trainer.log_every_n_steps=1"]
    small = [item.replace("verified_best_of_4", "verified_best_of_2") for item in SMALL_PARM]
    done = command(tmp_path, "experiment=shapes_masked_parm", *small, *masked, *once)
    assert re.search("^ +verified  ", done.stdout, re.M)
    for name, earliest in (("verified", 0), ("reflected", 3)):
        rows = datasets.load_from_disk(str(next((tmp_path / "rollouts").glob(f"{name}-*/part-*"))))
        assert np.shape(rows["previews"][0]) == (4, 64)
        assert earliest <= min(rows["first_unverified"]) <= max(rows["first_unverified"]) <= 3
    header = (tmp_path / "run" / "metrics" / "metrics.csv").read_text().splitlines()[0].split(",")
    for key in ("train/loss", "val/parm/auc_10", "val/likelihood/auc"):
        assert key in header
    named = command(tmp_path, "experiment=shapes_masked_parm", *small, *masked, "parm.module.causal=true", check=False)
    assert "parm.module.causal must be false for a MaskTokenDecoder" in named.stderr


@pytest.mark.slow(seconds=28)
def test_dpo_aligns_the_decoder_and_its_checkpoints_are_what_training_saw(tmp_path: Path, compose_config) -> None:
    small = [*SMALL_DPO, "data.batch_size=4", "trainer.max_steps=3", "trainer.val_check_interval=1",
             "module.optimizer.lr=2e-4", "module.warmup_steps=1", "callbacks.checkpoint_last.save_top_k=-1",
             "callbacks.geneval.test_strategies=[sample,best_of_8_parm]"]  # fmt: skip
    done = command(tmp_path, "experiment=dpo", *small)
    assert "train: " in done.stdout + done.stderr and " pairs; dropped: " in done.stdout + done.stderr
    with (tmp_path / "run" / "metrics" / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    for key in ("train/loss", "train/rewards/margins", "train/grad_norm", "val/rewards/accuracies", "val/geneval"):
        assert key in logged[0]
    checkpoints = tmp_path / "run" / "checkpoints"
    last = checkpoints / "last.ckpt"
    assert not any(key.startswith("parm.") for key in torch.load(last, weights_only=True)["state_dict"])

    # Two processes give every checkpoint the scores that it had in training; started again, nothing is evaluated anew.
    curve = ["experiment=dpo", *small, "task=evaluate", f"ckpt_path={checkpoints}", f"scores_dir={tmp_path}/scores",
             "callbacks.geneval.test_strategies=[sample]", "geneval.test_prompts.split=validation",
             "geneval.test_prompts.per_task=1"]  # fmt: skip
    printed = command(tmp_path, *curve, "devices=ddp_cpu", f"hydra.run.dir={tmp_path}/curve").stdout
    with (tmp_path / "curve" / "checkpoints.csv").open() as file:
        found = {row["checkpoint"]: row for row in csv.DictReader(file)}
    assert found.keys() == {path.resolve().stem for path in checkpoints.glob("*.ckpt")}
    assert all(name in printed for name in found) and (tmp_path / "curve" / "checkpoints.png").is_file()
    validated = {int(row["step"]) + 1: row for row in logged if row["val/geneval"]}
    assert len(validated) == 3 and any(float(row["val/geneval"]) for row in validated.values())
    for step, row in validated.items():
        evaluated = found[f"step-{step}"]
        assert float(evaluated["overall"]) == float(row["val/geneval/sample"])
        for task in TASKS:
            assert float(evaluated[task]) == float(row[f"val/geneval/sample/{task}"])
        rows = (Path(evaluated["results"]) / "results.jsonl").read_text().splitlines()
        objects = [sum(map(len, json.loads(json.loads(line)["details"]).values())) for line in rows]
        assert np.mean(objects) == pytest.approx(float(row["val/objects/sample"]), abs=1e-6)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").rglob("*")}
    run(compose_config(*curve, "evaluator.batch_size=3"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").rglob("*")} == times
    assert (tmp_path / "checkpoints.csv").read_bytes() == (tmp_path / "curve" / "checkpoints.csv").read_bytes()

    exported = tmp_path / "aligned"
    run(compose_config("experiment=dpo", *small, "task=export", f"ckpt_path={last}", f"export_dir={exported}"))
    sample = ["callbacks.geneval.test_strategies=[sample]", f"rollouts_dir={tmp_path}/rollouts"]
    run(compose_config("experiment=dpo", *small, "task=evaluate", f"decoder.checkpoint={exported}", *sample))
    assert json.loads((tmp_path / "geneval.json").read_text())["strategies"].keys() == {"sample"}

    # Validation pairs that are gone are made again, against the policy before training.
    (tmp_path / "rollouts").rename(tmp_path / "gone")
    run(compose_config("experiment=dpo", *small, "task=evaluate", f"ckpt_path={last}", *sample))
    (remade,) = (tmp_path / "rollouts").glob("validation-pairs-*")
    kept, again = (datasets.load_from_disk(str(tmp_path / name / remade.name)) for name in ("gone", "rollouts"))
    assert repr(again[:]) == repr(kept[:])  # NaN included


@pytest.mark.slow(seconds=22)
def test_iterative_dpo_makes_new_pairs_each_round_and_resumes_with_its_own(tmp_path: Path) -> None:
    shares = "{two_object: 1, counting: 2, colors: 1, position: 1, color_attr: 1}"
    small = [*SMALL_DPO, "data.batch_size=32", f"data.train.plain.per_round={shares}",
             "callbacks.geneval.test_strategies=[sample]"]  # fmt: skip
    command(tmp_path, "experiment=dpo_iterative", *small, "trainer.max_steps=2")
    made = {path.name for path in (tmp_path / "rollouts").glob("*-pairs-*")}
    assert len(made) == 3, made  # validation and two rounds; where they were they are found, from any other folder
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    more = [f"ckpt_path={last}", f"hydra.run.dir={tmp_path}/more", "trainer.max_steps=3", "rollouts_dir=elsewhere"]
    command(tmp_path, "experiment=dpo_iterative", *small, *more)
    added = {path.name for path in (tmp_path / "elsewhere").glob("*-pairs-*")} - made
    assert len(added) == 1 and next(iter(added)).startswith("train-pairs-"), added  # the third round's alone


@pytest.mark.slow(seconds=18)
def test_guided_dpo_refits_parm_and_can_keep_the_reference_of_the_run(tmp_path: Path, compose_config) -> None:
    small = [*SMALL_DPO, "data.batch_size=32", "data.train.plain.per_round=null", "data.reference=run",
             "data.train.guided.samples=1", "module.optimizer.lr=1e-3", "callbacks.geneval.test_strategies=[sample]",
             "callbacks.checkpoint_last.every_n_train_steps=1"]  # fmt: skip
    command(tmp_path, "experiment=dpo_guided", *small, "trainer.max_steps=2")
    decoder = instantiate(compose_config().decoder, _convert_="all").eval()
    sets = [datasets.load_from_disk(str(path)) for path in (tmp_path / "rollouts").glob("train-pairs-*")]
    assert len(sets) == 2
    for pairs in sets:  # the second round's policy is another one by then
        for side, anew in reference_log_probs(decoder, pairs[:]).items():
            torch.testing.assert_close(pairs[f"ref_{side}"][:], anew, atol=1e-3, rtol=1e-5)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert any(key.startswith("parm.") for key in torch.load(last, weights_only=True)["state_dict"])
    header = (tmp_path / "run" / "metrics" / "metrics.csv").read_text().splitlines()[0].split(",")
    for key in ("train/parm_loss", "val/objects/sample", "val/independent/clip/sample"):
        assert key in header
    exported = tmp_path / "aligned"
    export = ["experiment=dpo_guided", *small, "task=export", f"ckpt_path={last}", f"export_dir={exported}"]
    (exported / "parm").mkdir(parents=True)
    (exported / "parm" / "model.safetensors").touch()
    refused = command(tmp_path, *export, check=False)
    assert refused.stderr.strip().splitlines()[-1] == (
        f"Error: export_dir: {exported}/parm holds model.safetensors of something else: name another folder"
    )
    assert not (exported / "decoder").exists()
    (exported / "parm" / "model.safetensors").unlink()
    command(tmp_path, *export)
    assert {path.parent.name for path in exported.rglob("model.safetensors")} == {"decoder", "parm"}


@pytest.mark.slow
def test_a_judge_that_teaches_is_not_independent(tmp_path: Path) -> None:
    done = command(tmp_path, "experiment=dpo", *SMALL_DPO, "+data.scores.parm=0.5", check=False)
    sentence = "Error: evaluator.independent_judges: 'parm' decides what is trained on"
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == sentence


def test_what_is_trained_is_not_independent(compose_config) -> None:
    parts = Parts(compose_config(*SMALL_PARM, "evaluator.independent_judges=[parm]"))
    with pytest.raises(ValueError, match=r"evaluator\.independent_judges: 'parm' is trained"):
        _ = parts.trainer


@pytest.mark.slow
def test_dpo_aligns_to_preferences_from_a_file(tmp_path: Path) -> None:
    given = ["data=preference_files", *pair_files(tmp_path)]
    path = tmp_path / "pairs.jsonl"
    small = [*(item for item in SMALL_DPO if not item.startswith("data.")), "data.batch_size=2", "trainer.max_steps=2",
             "callbacks.geneval.test_strategies=[sample]"]  # fmt: skip
    command(tmp_path, "experiment=dpo", *given, *small, "trainer.val_check_interval=1", "module.max_fall=1e9")
    made = sorted(path.name.split("-")[0] for path in (tmp_path / "rollouts").glob("*-pairs-*"))
    assert made == ["train", "validation"]
    Image.new("I;16", (64, 64)).save(tmp_path / "deep.png")
    path.write_text(
        path.read_text() + json.dumps({"prompt": "a photo of a star", "chosen": "deep.png", "rejected": [0] * 64})
    )
    refused = command(tmp_path, "experiment=dpo", *given, *small, check=False)
    assert refused.returncode == 1
    sentence = f"Error: {path}:9: deep.png has the mode I;16, more than 8 bits a pixel and colour"
    assert refused.stderr.strip().splitlines()[-1] == sentence
    nothing = command(tmp_path, "experiment=dpo", "data=preference_files", *small, check=False)
    assert nothing.stderr.strip().splitlines()[-1] == "Error: data.train.path needs a value"


@pytest.mark.slow
def test_preferences_are_read_as_they_are_seen(tmp_path: Path) -> None:
    """A hub's set with labels and encoded images, and a file of Windows' with a picture that is replaced."""
    stream = ShapesStream(split="train", seed=0)
    for i in range(3):
        Image.fromarray(stream[i].image).save(tmp_path / f"{i}.png")
    first, second, third = ((tmp_path / f"{i}.png").read_bytes() for i in range(3))
    small = ["experiment=dpo", "data=preference_files", "task=rollout", "strategies=sample", "parm.checkpoint=null",
             "evaluator.independent_judges=[]", "logger=csv", "trainer.accelerator=cpu"]  # fmt: skip
    star, labels = "a photo of a star", [1.0, 0.5, 0.0]
    rows = [{"caption": star, "jpg_0": first, "jpg_1": second, "label_0": label} for label in labels]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "hub"))
    row = {"prompt": star, "chosen": "0.png", "rejected": "1.png", "note": "one\u2028two"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    given = [f"data.train.path={tmp_path}/hub", f"data.validation.path={tmp_path}/pairs.jsonl", *small]
    given += ["data.train.columns={prompt: caption, chosen: jpg_0, rejected: jpg_1, label: label_0}"]
    given += ["data.validation.columns={prompt: prompt, chosen: chosen, rejected: rejected, label: null}"]

    def made() -> dict[str, list[Any]]:
        folders = sorted((tmp_path / "rollouts").glob("[tv]*-pairs-*"), key=lambda folder: folder.stat().st_mtime)
        pairs = [datasets.load_from_disk(str(folder))["chosen"][:] for folder in folders]
        names = [folder.name.split("-")[0] for folder in folders]
        return {name: [sides for other, sides in zip(names, pairs, strict=True) if other == name] for name in names}

    done = command(tmp_path, *given)
    assert f"{tmp_path}/hub: 1 ties are left out, which leaves 2 pairs" in done.stdout + done.stderr
    (train,), (validation,) = made().values()
    assert train[0] == validation[0] != train[1]
    (tmp_path / "0.png").write_bytes(third)
    command(tmp_path, *given)
    assert made()["train"] == [train] and made()["validation"][0] == validation != made()["validation"][1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_reference_is_the_policy_before_training_to_the_last_bit(tmp_path: Path, precision: str) -> None:
    rows = [{"prompt": "a photo of a star", "chosen": [i] * 256, "rejected": [i + 1] * 256} for i in range(6)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.train.path={path}", f"data.validation.path={path}", "~callbacks.geneval"]
    command(tmp_path, "experiment=showo_dpo", *TINY_SHOWO, *given, "task=evaluate", f"trainer.precision={precision}")
    header, values = (tmp_path / "run" / "metrics" / "metrics.csv").read_text().splitlines()
    measured = dict(zip(header.split(","), values.split(","), strict=True))
    assert float(measured["test/kl"]) == float(measured["test/rewards/margins"]) == 0


@pytest.mark.slow
def test_show_o_is_measured_by_every_strategy_of_the_paper(tmp_path: Path) -> None:
    tiny = ["experiment=showo_evaluate", *TINY_SHOWO]
    two = ["strategies.best_of_n.n=2", "strategies.stepwise.k=2", "strategies.potential.n=2"]
    done = command(tmp_path, *tiny, *two, "trainer.precision=bf16-true")
    lines = done.stdout.splitlines()
    estimate = next(i for i, line in enumerate(lines) if line.startswith("Memory of each GPU: about "))
    assert estimate < next(i for i, line in enumerate(lines) if "strategy" in line)
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    assert list(report["strategies"]) == ["sample", "best_of_n", "stepwise", "potential"]
    costs = {name: scores["decoder_passes_per_image"] for name, scores in report["strategies"].items()}
    assert costs["sample"] == costs["stepwise"] == 8  # 4 steps with guidance; candidates come from one pass
    assert costs["best_of_n"] == 16 >= costs["potential"]
    refused = command(tmp_path, *tiny, "task=fit", check=False)
    assert refused.stderr.strip().splitlines()[-1].startswith("Error: task=fit needs data")


@pytest.mark.slow
def test_show_o_is_aligned_to_images_from_files(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for name, other in zip("abcd", "badc", strict=True):
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        rows.append({"prompt": "a photo of a star", "chosen": f"{name}.png", "rejected": f"{other}.png"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"data.train.path={path}", f"data.validation.path={path}", "data.batch_size=2"]
    done = command(tmp_path, "experiment=showo_dpo", *TINY_SHOWO, *files, "trainer.log_every_n_steps=1")
    estimate = next(line for line in done.stdout.splitlines() if line.startswith("Memory of each GPU: about "))
    for part in ("parameters", "gradients", "optimizer", "training", "decoding"):
        assert part in estimate
    header = (tmp_path / "run" / "metrics" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/rewards/margins", "val/rewards/accuracies", "test/geneval/sample"} <= set(header)


@pytest.mark.slow(seconds=29)
def test_parm_learns_from_show_o(tmp_path: Path) -> None:
    few = ["callbacks.geneval.test_strategies=[sample,verified]", "callbacks.geneval.monitor=sample",
           "callbacks.geneval.validation_strategies=[sample]", "data.train.plain.samples=1",
           "data.validation.samples=1", "data.test.samples=1", "strategies.verified.k=2"]  # fmt: skip
    command(tmp_path, "experiment=showo_parm", *TINY_SHOWO, *few)
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    assert list(report["strategies"]) == ["sample", "verified"] and report["prompts"] == 6


@pytest.mark.slow
def test_show_o_is_aligned_to_its_own_rollouts(tmp_path: Path) -> None:
    deep = ["+debug=tiny_showo"]  # whose images differ enough to be judged differently
    by_the_judge = "+data.scores.vision_language=0.1"  # GenEval's rules find few of these random images better
    few = ["data.train.plain.samples=3", by_the_judge]
    command(tmp_path, "experiment=showo_dpo", "data=preferences", *deep, *few)
    (pairs,) = (tmp_path / "rollouts").glob("train-pairs-*")
    rows = datasets.load_from_disk(str(pairs))
    assert len(rows["chosen"][0]) == 256 and all(margin > 0 for margin in rows["margin"])


@pytest.mark.slow
def test_rollout_task_collects_and_says_how_much_is_correct(tmp_path: Path) -> None:
    done = command(tmp_path, *SMALL_PARM, "task=rollout")
    assert "plain: 24 rollouts, 0." in done.stdout + done.stderr
    assert len(list((tmp_path / "rollouts").iterdir())) == 5


@pytest.mark.slow(seconds=19)
def test_a_killed_collection_goes_on_where_it_was(tmp_path: Path, compose_config) -> None:
    overrides = [*SMALL_PARM, "task=rollout", "data.train.plain.samples=20", "data.collect_batch_size=10"]

    def parts() -> dict[Path, int]:
        found = (tmp_path / "rollouts").glob("plain-*/part-*")
        return {path: path.stat().st_mtime_ns for path in found if path.suffix != ".partial"}

    def kill(process: int) -> None:
        deadline = time.monotonic() + 300
        while len(parts()) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)

    launch_together([Start([*here(tmp_path), *overrides])], tmp_path, meanwhile=kill)
    before = parts()
    assert 5 <= len(before) < 24, "killed too late, or it never began"
    command(tmp_path, *overrides)
    after = parts()
    assert len(after) == 24
    assert {path: after[path] for path in before} == before  # nothing is collected twice
    assert not list((tmp_path / "rollouts").glob("*/*.partial"))
    run(compose_config(*overrides, f"rollouts_dir={tmp_path}/straight"))
    for path in after:
        rows, straight = (
            datasets.load_from_disk(str(tmp_path / name / path.relative_to(tmp_path / "rollouts")))
            for name in ("rollouts", "straight")
        )
        assert repr(rows[:]) == repr(straight[:])  # what is not known of a row is NaN, which equals nothing


@pytest.mark.slow
def test_help_tells_what_exists(tmp_path: Path) -> None:
    shown = command(tmp_path, "--help").stdout
    assert "task=evaluate ckpt_path=PATH" in shown and "shapes_parm_start" in shown
    assert "strategies:" in command(tmp_path, "--cfg", "job", "--resolve").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"tag": "single_object"', "prompts.jsonl:2"),
        (
            '{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a star"}',
            "'dog'",
        ),
        (
            '{"tag": "colors", "include": [{"class": "star", "count": 1, "color": "teal"}], "prompt": "a star"}',
            "'teal'",
        ),
    ],
)
def test_broken_prompt_files_are_named_with_their_line(tmp_path: Path, line: str, sentence: str) -> None:
    good = '{"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"}'
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{good}\n{line}\n")
    small = [item for item in SMALL_PARM if not item.startswith("geneval.test_prompts")]
    done = command(tmp_path, *small, "geneval=file", f"geneval.test_prompts.path={path}", check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "prompts.jsonl:2" in last and sentence in last
