"""The help and refusals answer at once: they import neither numpy nor torch nor Lightning."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from datamodules.prompt_templates import clause, make_row
from lightning_modules.cache_key import digest
from lightning_modules.files import BUNDLED
from lightning_modules.runs.command_line import explaining_refusals, is_single_run, restore_tracebacks
from lightning_modules.runs.help import description, text
from lightning_modules.runs.settings_tree import options
from tests.helpers.overrides import ROOT

# Ends with what the program says, and with the heavy packages that it has imported.
PROGRAM = """
import runpy, sys
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    print(end.code)
print("imported", [name for name in ("numpy", "torch", "lightning", "transformers", "datasets") if name in sys.modules])
"""


def test_every_experiment_is_described() -> None:
    assert all(description(name) for name in options("experiment"))
    shown = text()
    assert all(f"  {name} " in shown for name in options("experiment"))
    assert "task=evaluate ckpt_path=PATH" in shown and "+strategy@strategies.NAME" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "experiment=NAME"),
        (["--batch-size", "8"], "there is no option --batch-size"),
        (["experiment=dpoo"], "did you mean experiment=dpo"),
        (["trainer.max_step=3"], "did you mean trainer.max_steps?"),
        (["trainer.max_steps=many"], "trainer.max_steps must be a whole number"),
        (["data.batch_size=0"], "data.batch_size must be a whole number of at least 1"),
        (["strategies.verified.k=abc"], "strategies.verified.k must be a whole number"),
        (["experiment=dpo", "data=rollouts"], "module=dpo learns from pairs"),
        (["task=evaluate", "ckpt_path=nowhere.ckpt"], "there is no file nowhere.ckpt"),
        (["task=score"], "task=score needs images=DIR"),
        (["task=score", "images=conf"], "images: conf has no folders 00000, 00001, ..."),
        (["strategies.verified_best_of_4.k=16"], "did you mean strategies.verified_best_of_4.strategy.k=16?"),
        (["decoder.checkpoint=nowhere"], "decoder.checkpoint: checkpoint 'nowhere': there is no such folder"),
        (["parm.checkpoint=bundled:shapes_decoder"], "holds the weights of a CompactDecoder, not of a PARM"),
        (
            ["decoder.module.transformer.heads=8"],
            "was made for another model: transformer.heads is 4 there, and 8 here",
        ),
        (["parm.module.feature_layers=[4]"], "does not go with decoder.module.feature_layers"),
        (["decoder.module.feature_layers=[4]"], "made for another decoder: feature_layers is [4, 8, 12] there"),
        (["parm.module.grid=16"], "parm.module.grid=16 does not go with the grid of the image tokenizer, which is 8"),
        (["experiment=janus_parm", "parm.module.grid=16"], "the grid of the image tokenizer, which is 24"),
        (["experiment=showo_evaluate", "geneval=shapes"], "ShapesDetector looks at images of 64x64 pixels"),
        (["experiment=janus_evaluate"], "decoder.checkpoint: deepseek-community/Janus-Pro-1B"),
        (["experiment=janus_evaluate", "decoder.checkpoint=x/Janus-1.3B"], "is of a Janus with template=janus"),
        (["experiment=llamagen_evaluate"], "decoder.checkpoint: peizesun/llamagen_t2i (t2i_XL_stage1_256.pt"),
        (["judges=open_clip", "judges.rewards.clip.clip.pretrained=laion2b_s32b_b82k"], "weights need ViT-L-14, not"),
        (["judges=open_clip", "judges.rewards.clip.clip.pretrained=null"], "leaves the weights random: name a file or"),
        (["judges=open_clip", "judges.rewards.clip.tokenizer.model_name=x"], "tokenizer: open_clip has no model 'x'"),
        (["judges=open_clip", "judges.rewards.clip.clip.model_name=local-dir:/nope"], "there is no folder /nope"),
        (["experiment=showo_evaluate"], "decoder.checkpoint: showlab/show-o (*.safetensors or *.bin, 5.8 GB)"),
        (["evaluator.independent_judges=[magic]"], "names the judge 'magic'; there are: parm, likelihood"),
        (["trainer.accelerator=npu"], "trainer.accelerator=npu: Lightning has none of that name; there are auto, cpu,"),
        (["+trainer.strategy=ddpp"], "trainer.strategy=ddpp: Lightning has none of that name; there are auto, ddp"),
        (
            ["trainer.accelerator=cpu", "trainer.devices=-1"],
            "trainer.devices=-1 names GPUs, and there is none here",
        ),
        (["trainer.val_check_interval=1.5"], "trainer.val_check_interval must be a fraction up to 1, or a whole"),
        (["experiment=shapes_decoder", "data.batch_size=256"], "is more than the 625 batches of data.train_images=160"),
        (["experiment=sd3_evaluate", "decoder.dtype=fp16"], "decoder.dtype must be float32, float16 or bfloat16, not"),
        (
            ["decoder.module.transformer.dim=90"],
            "decoder.module.transformer.dim must be a multiple of heads, 4, not 90",
        ),
        (["decoder.module.feature_layers=[4,13]"], "decoder.module.feature_layers=[4, 13] must lie in 1..12, the"),
        (
            ["strategies=masked"],
            "strategies.reflection.redecoder.sampling is a MaskSampling, and a CompactDecoder takes",
        ),
        (
            ["experiment=pipeline", 'pipeline.jobs.parm.overrides=["trainer.max_steps=x"]'],
            "pipeline.jobs.parm.overrides: trainer.max_steps must be a whole number",
        ),
        (["strategies.verified.stride=100"], "strategies.verified.stride=100 is more than the 64 steps of an image"),
        (["rollouts_dir=train.py/rollouts"], "rollouts_dir: train.py/rollouts: it is below a file, not a folder"),
        (
            ["experiment=expert_iteration", "data.spec.strategy.judge=x"],
            "data.spec.strategy names the judge 'x'; there",
        ),
        (["experiment=pipeline", "task=fit"], "experiment=pipeline is for task=pipeline, not for task=fit"),
        (
            ["experiment=pipeline", "pipeline.rows.DPO.strategy=verified"],
            "pipeline.rows: 'DPO' names the strategy 'verified', which the job dpo does not measure: sample, ver",
        ),
        (["experiment=dpo", "module.lora=LoRA"], "module.lora must be a node with _target_, LoRA, not 'LoRA'"),
        (
            ["experiment=dpo", "trainer.max_epochs=0"],
            "trainer.max_epochs=0 trains nothing, and test_ckpt_path=best needs",
        ),
        (["callbacks.checkpoint_last.dirpath=train.py"], "callbacks.checkpoint_last.dirpath: train.py: it is below a"),
        (["judges.geneval=null"], "judges.geneval is null, and what is made here is labelled by it"),
        (["experiment=grpo", "data.batch_size=60"], "data.batch_size=60 does not divide the 256 images of a round"),
        (["experiment=dpo", "callbacks.early_stop.mode=up"], "callbacks.early_stop.mode must be min or max, not 'up'"),
        (
            ["experiment=shapes_parm_left_right", "data.train.stream.relations=[left]"],
            "data.train.stream.relations must be a list, each one of left of, right of, above, below, not ['left']",
        ),
        (
            ["experiment=shapes_parm_start", "+data.train.changes=[]"],
            "data.train.changes must be a list of at least one",
        ),
        (["experiment=shapes_masked_parm_start", "data.repaint.shares=[1,0]"], "must be two numbers that rise within"),
        (["data.train.plain._target_=no_package.Spec"], "data.train.plain._target_: there is no no_package.Spec"),
        (["task=score", "images=.", "fid=shapes", "fid.count=1"], "fid.count must be a whole number of at least 2"),
        (["judges=[shapes,open_clip]"], "judges=shapes and judges=open_clip both add the judge 'clip': choose one"),
        (["trainer._target_="], "trainer._target_ must name a class, not ''"),
        (["module._target_=lightning_modules.prm.PARMModule"], "module._target_: there is no lightning_modules.prm.PA"),
        (["parm.module.input_features=embeddings"], "input_features is hidden there, and embeddings here"),
        (["trainer.val_check_interval=-1"], "must be a fraction up to 1, or a whole number of batches, not -1"),
        (
            ["experiment=grpo", "trainer.val_check_interval=41"],
            "is more than the 40 batches of data.rounds=10 and data",
        ),
        (["trainer._target_=lightning.Trainr"], "trainer._target_: there is no lightning.Trainr"),
        (
            ["decoder.module.max_words=3"],
            "geneval.validation_prompts: prompt 'a photo of a cross' has 5 words, at most",
        ),
        (["decoder.module.max_words=20"], "was made for another model: max_words is 12 there, and 20 here"),
        (
            ["experiment=grpo", "+data.potentials.geneval=strict"],
            "data.potentials.geneval: the judge 'strict' values no",
        ),
        (["experiment=grpo", "data.potentials={geneval: parm}"], "data.potentials has no geneval yet: write +data.pot"),
        (["+trainer.limit_val_batches=1.5"], "must be a fraction up to 1, or a whole number of batches, not 1.5"),
        (["+trainer.profiler=simpel"], "trainer.profiler=simpel: Lightning has none of that name; there are simple, "),
        (["data.validation.prompts=[]"], "data.validation.prompts is empty: there is nothing to decode"),
        (["experiment=pipeline", "pipeline.seeds=[]"], "pipeline.seeds must be a list of at least one seed, not []"),
        (["name=../x"], "name=../x leads out of the folder of all runs: leave out the .."),
        (["rollouts_dir=/proc"], "rollouts_dir: /proc: there is no permission"),
        (["trainer.val_check_interval=500"], "is more than the 71 batches of the 4500 rollouts of data.train and data"),
    ],
)
def test_answers_import_nothing_heavy(
    arguments: list[str], said: str, tmp_path: Path, imported: tuple[str, ...] = ()
) -> None:
    folder = [] if arguments[0].startswith("-") else [f"hydra.run.dir={tmp_path}/run"]
    command = [sys.executable, "-c", PROGRAM, *arguments, *folder]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=offline)
    assert said in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith(f"imported {[*imported]}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (None, "/metadata.jsonl: there is no such file"),
        ("{", "/metadata.jsonl:1: not valid JSON"),
        (json.dumps(make_row("single_object", clause("cat"))), "/metadata.jsonl: include[0]: unknown class 'cat'"),
        (json.dumps(make_row("single_object", clause("star"))), "/samples: there are no images 0000.png"),
    ],
)
def test_a_broken_folder_of_images_is_refused_at_once(metadata: str | None, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "00000"
    folder.mkdir()
    if metadata is not None:
        (folder / "metadata.jsonl").write_text(metadata)
    test_answers_import_nothing_heavy(["task=score", f"images={tmp_path}"], f"images: {folder}{said}", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a star", "chosen": "0.png"}\n', ":1: there is no 'rejected'"),
        ('{"prompt": "a star", "chosen": "0.png", "rejected": "1.png"}', ":1: 0.png cannot be read: No such file"),
        ('{"prompt": "a zebra", "chosen": [1], "rejected": [2]}', ":1: prompt 'a zebra' has words outside the vocab"),
        ('{"prompt": "a star", "chosen": ".", "rejected": "1.png"}', ":1: . cannot be read: it is no file"),
        ('{"prompt": "a star", "chosen": "empty", "rejected": "1.png"}', ":1: empty cannot be read: the file is empty"),
        ('{"prompt": "a star", "chosen": "a.png", "rejected": "./a.png"}', ":1: chosen and rejected are the same"),
        (
            json.dumps({"prompt": "a star", "chosen": [1] * 64, "rejected": [2] * 64, "weight": 0}),
            ": all weights are 0, so",
        ),
        ('{"prompt": "a star", "chosen": [1], "rejected": [2]}', ":1: 1 tokens, where an image has 64"),
        ("\n", " has no rows"),
    ],
)
def test_a_broken_row_of_preferences_is_refused_at_once(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    (tmp_path / "empty").touch()
    (tmp_path / "a.png").write_text("not read yet")
    test_answers_import_nothing_heavy(_own_pairs(tmp_path / "pairs.jsonl"), f"{tmp_path}/pairs.jsonl{said}", tmp_path)


def _own_pairs(path: Path) -> list[str]:
    return ["experiment=dpo", "data=preference_files", f"data.train.path={path}", f"data.validation.path={path}"]


@pytest.mark.slow
def test_broken_rows_of_a_data_set_are_refused_without_datasets(tmp_path: Path) -> None:
    pair, row = {"prompt": "a star", "chosen": [1] * 64, "rejected": [2] * 64}, make_row("counting", clause("star"))
    Dataset.from_list([pair] * 2000 + [pair | {"prompt": " "}]).save_to_disk(tmp_path / "pairs")
    Dataset.from_list([row, row | {"tag": "count"}]).save_to_disk(tmp_path / "prompts")
    prompts = ["geneval=file", f"geneval.test_prompts.path={tmp_path}/prompts"]
    prompts.append("geneval.test_prompts._target_=datamodules.geneval_prompts.prompts_from_dataset")
    for arguments, said in (
        (_own_pairs(tmp_path / "pairs"), "pairs, row 2000: the prompt is empty"),
        (["task=evaluate", *prompts], "prompts, row 1: unknown tag 'count'"),
    ):
        test_answers_import_nothing_heavy(arguments, f"{tmp_path}/{said}", tmp_path, ("numpy",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("notes.txt", "", " is no whole folder written by `datasets`: there is no "),
        ("state.json", "{", "/state.json is not valid JSON: "),
        ("dataset_dict.json", '{"splits": ["test"]}', " has no split 'train'; there are: test"),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_at_once(file: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    if file == "state.json":
        (tmp_path / "dataset_info.json").write_text("{}")
    test_answers_import_nothing_heavy(_own_pairs(tmp_path), f"{tmp_path}{said}", tmp_path)


@pytest.mark.slow
def test_broken_settings_beside_weights_are_refused_at_once(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED / "shapes_parm_start", tmp_path / "parm")
    (tmp_path / "parm" / "config.json").write_text("{")
    said = f"parm.checkpoint: {tmp_path}/parm/config.json is not valid JSON"
    test_answers_import_nothing_heavy([f"parm.checkpoint={tmp_path}/parm"], said, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["seed=1"], "was made with other settings (seed): name another folder"),
        (
            ["strategies.verified_best_of_4.n=3", "geneval.test_prompts.per_task=2"],
            "settings (strategy, prompts)",
        ),
        (
            ["sampling.guidance=1"],
            "was made with other settings (strategy): name",
        ),
        (["generating.strategy=sample"], "was made with other settings (strategy): name"),
    ],
)
def test_images_made_with_other_settings_are_refused_at_once(
    changes: list[str], said: str, tmp_path: Path, compose_config: Callable[..., DictConfig]
) -> None:
    config = compose_config("task=generate", "generating.strategy=verified_best_of_4", "images=x")
    strategy = instantiate(config.strategies.verified_best_of_4)
    rows = instantiate(config.geneval.test_prompts)
    stored = {"strategy": strategy.cache_key(), "prompts": digest(rows), "samples": 4, "seed": 0}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "provenance.json").write_text(json.dumps(stored))
    arguments = ["task=generate", "generating.strategy=verified_best_of_4", f"images={tmp_path}/images"]
    test_answers_import_nothing_heavy([*arguments, *changes], said, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("content", [[1], {"state_dict": {}, "hyper_parameters": [1]}, {"state_dict": Path()}])
def test_a_file_that_is_no_checkpoint_is_refused_at_once(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "last.ckpt")
    arguments = ["task=evaluate", f"ckpt_path={tmp_path}/last.ckpt"]
    test_answers_import_nothing_heavy(arguments, f"Error: ckpt_path: {tmp_path}/last.ckpt", tmp_path)


@pytest.mark.slow
def test_an_unknown_word_is_refused_at_once(tmp_path: Path) -> None:
    row = make_row("single_object", clause("star")) | {"prompt": "a photo of a big star"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
    arguments = ["task=evaluate", "geneval=file", f"geneval.test_prompts.path={tmp_path}/prompts.jsonl"]
    said = "geneval.test_prompts: prompt 'a photo of a big star' has words outside the vocabulary: 'big'"
    test_answers_import_nothing_heavy(arguments, said, tmp_path)


@pytest.mark.slow
def test_broken_detections_and_few_references_are_refused_without_torch(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "00000"
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "samples" / "0000.png")
    (folder / "metadata.jsonl").write_text(json.dumps(make_row("colors", clause("star", color="red"))))
    Image.new("RGB", (64, 64)).save(folder / "samples" / "0001.png")
    star = {"class": "star", "score": 1, "bbox": [0, 0, 9, 9]}
    for file, row in (("found", {}), ("some", {"detections": []}), ("uncolored", {"detections": [star]})):
        (tmp_path / f"{file}.jsonl").write_text(json.dumps({"filename": "00000/samples/0000.png", **row}))
    score = ["task=score", f"images={tmp_path}/images"]
    stored = ["geneval=detections", "+geneval.reward.detector.class_names=[star]"]
    for arguments, said in (
        (
            ["geneval=detections", f"geneval.reward.detector.path={tmp_path}/some.jsonl"],
            f"images: {folder}/metadata.jsonl: include[0]: unknown class 'star', known are person,",
        ),
        (
            [*stored, f"geneval.reward.detector.path={tmp_path}/found.jsonl"],
            "found.jsonl:1: not a row of",
        ),
        (
            [*stored, f"geneval.reward.detector.path={tmp_path}/some.jsonl"],
            "some.jsonl: has no detections of 00000/samples/0001.png",
        ),
        (
            [*stored, f"geneval.reward.detector.path={tmp_path}/uncolored.jsonl"],
            "uncolored.jsonl:1: an object has no color, the prompt asks for it, and geneval.reward.colors is null",
        ),
        (["+geneval.reward.options={confidence: 1}"], "geneval.reward.options: unknown option 'confidence', known are"),
        (["fid=inception", f"fid.references.folder={tmp_path}"], "fid.count is 10000, and there are only 2 reference"),
    ):
        test_answers_import_nothing_heavy([*score, *arguments], said, tmp_path, ("numpy",))


@pytest.mark.slow
def test_an_export_over_another_is_refused_at_once(tmp_path: Path) -> None:
    parts = ["state_dict", "global_step", "pytorch-lightning_version"]
    torch.save(dict(zip(parts, ({}, 1, "2"), strict=True)), tmp_path / "last.ckpt")
    for name in ("decoder", "parm"):
        (tmp_path / "to" / name).mkdir(parents=True)
    (tmp_path / "to" / "parm" / "config.json").write_text("{}")
    arguments = ["experiment=dpo_guided", "task=export", f"ckpt_path={tmp_path}/last.ckpt", f"export_dir={tmp_path}/to"]
    test_answers_import_nothing_heavy(arguments, f"export_dir: {tmp_path}/to/parm holds config.json of", tmp_path)


def test_what_may_be_a_sweep_is_left_to_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_single_run([]) and is_single_run(["experiment=dpo", "+debug=minutes", "hydra.run.dir=x"])
    for arguments in (
        ["-m", "seed=0,1"],
        ["hydra.mode=MULTIRUN"],
        ["+hydra.mode=RUN"],
        ["hydra.searchpath=[file://x]"],
    ):
        assert not is_single_run(arguments)
    (tmp_path / "mine.yaml").write_text("hydra: {mode: MULTIRUN}\n")
    monkeypatch.setattr("lightning_modules.runs.command_line.CONF", tmp_path)
    assert not is_single_run([])


def test_a_stop_before_the_job_starts_ends_in_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, explaining_refusals([]):
        raise KeyboardInterrupt
    restore_tracebacks()
    assert end.value.code == 130 and capsys.readouterr().err == "Stopped.\n"
