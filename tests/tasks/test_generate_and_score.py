"""task=generate, task=score and generators of others, from the command line."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig
from PIL import Image

from callbacks.checkpoint import StopBetweenBatches
from datamodules.geneval_prompts import sample_path
from datamodules.shapes.prompts import shapes_prompts
from datamodules.shapes.scenes import scene_for
from datamodules.shapes.world import render
from lightning_modules.backbone.tiny_pipeline import save_tiny_sd3
from lightning_modules.rewards.mask2former import Mask2FormerDetector
from lightning_modules.rewards.tiny_geneval import save_tiny_clip, save_tiny_mask2former
from lightning_modules.tasks import run
from lightning_modules.tasks.generating import Generating
from tests.helpers.launch import Start, command, launch_together
from tests.helpers.overrides import TINY, WITHOUT
from tests.helpers.pictures import HUGE, write_folder

Compose = Callable[..., DictConfig]
# The bundled decoder, on few prompts.
FEW = ["geneval.test_prompts.per_task=1", "seed=3", "evaluator.images_per_prompt=2", "logger=csv",
       "trainer.accelerator=cpu"]  # fmt: skip
GENERATE = [*FEW, "task=generate", "evaluator.images_per_prompt=2", "evaluator.batch_size=3"]
SCORE = [*FEW, "task=score", "scoring.num_workers=0"]


def trainer(**settings: Any) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, **settings)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_generated_images_score_as_in_an_evaluation(
    compose_config: Compose, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    images = tmp_path / "images"

    def generate(*overrides: str) -> None:
        config = compose_config(*GENERATE, f"images={images}", *overrides)
        instantiate(config.generating, _convert_="all").run(trainer())

    def refused(sentence: str, *overrides: str) -> None:
        with pytest.raises((ValueError, OSError), match=sentence):
            generate(*overrides)

    small_files(1600)  # bytes, too few for an image
    refused(r"File too large: '.*/00000/samples/0000\.png'")
    assert {path.name for path in images.rglob("*.*")} == {"provenance.json", "metadata.jsonl"}
    small_files(-1)
    generate()
    made = {path: path.stat().st_mtime_ns for path in images.rglob("*.png")}
    names = sorted(str(path.relative_to(images)) for path in made)
    assert names == [sample_path(i, j) for i in range(6) for j in (0, 1)]
    lost = images / sample_path(4, 1)
    pixels = lost.read_bytes()
    lost.unlink()
    empty = images / sample_path(2, 0)
    torn = empty.read_bytes()
    empty.write_bytes(b"")  # as a copy that was broken off leaves it
    about = lost.parents[1] / "metadata.jsonl"
    prompt = about.read_text()
    about.unlink()  # killed between the folder and what it is about
    generate("evaluator.batch_size=5")
    assert about.read_text() == prompt
    assert lost.read_bytes() == pixels and empty.read_bytes() == torn
    del made[lost], made[empty]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert not list(images.rglob("*.partial"))
    refused(r"was made with other settings \(strategy, seed\)", "seed=4", "sampling.temperature=1")
    about.write_text((images / "00003" / "metadata.jsonl").read_text())
    refused(rf"00004/metadata\.jsonl is not the prompt '{json.loads(prompt)['prompt']}' any more: name another folder")
    about.write_text(prompt)
    surplus = images / sample_path(4, 2)
    surplus.write_bytes(pixels)
    refused(r"00004/samples/0002\.png was not made here: remove it, or name another folder")
    surplus.unlink()
    with pytest.raises(InstantiationException, match=r"generating.strategy is 'magic'; there are: sample, best"):
        generate("generating.strategy=magic")

    config = compose_config(*SCORE, f"images={images}", f"scores_dir={tmp_path}/scores")
    instantiate(config.scoring, _convert_="all").run(trainer())
    scored = results(tmp_path)
    sample = ["strategies=sample", "callbacks=decoder", "module=evaluation", "~data"]
    config = compose_config(*FEW, *sample)
    callback = instantiate(config.callbacks.geneval, _convert_="all")
    trainer(callbacks=[callback]).test(instantiate(config.module, _convert_="all"), verbose=False)
    assert [row | {"filename": row["filename"].removeprefix(f"{images}/")} for row in scored] == [
        row | {"filename": row["filename"].removeprefix("sample/")} for row in results(tmp_path)
    ]


@pytest.mark.slow
def test_images_of_others_are_neither_kept_nor_joined(tmp_path: Path) -> None:
    samples = tmp_path / "images" / "00000" / "samples"
    samples.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(samples / "0000.png")
    (samples.parent / "metadata.jsonl").write_text('{"prompt": "a photo of a dog"}\n')
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    done = command(tmp_path, *GENERATE, f"images={tmp_path}/images", check=False)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == (
        f"Error: {tmp_path}/images holds 00000, and no provenance.json that says it was made here: name another folder"
        "; task=score judges what is there"
    )
    assert {path: before.get(path) for path in (tmp_path / "images").rglob("*")}.items() <= before.items()


@pytest.mark.slow
def test_several_runs_make_and_score_one_folder_at_once(tmp_path: Path) -> None:
    places = [f"images={tmp_path}/images", f"scores_dir={tmp_path}/scores"]
    for task in (GENERATE, [*SCORE, "scoring.batch_size=1"]):
        runs = [Start([*task, *places, f"hydra.run.dir={tmp_path}/{number}"]) for number in range(3)]
        for done in launch_together(runs, tmp_path):
            assert done.returncode == 0, done.stderr[-3000:]
    rows = [(tmp_path / str(number) / "results.jsonl").read_text() for number in range(3)]
    assert len(rows[0].splitlines()) == 12 and len(set(rows)) == 1
    assert not [path for name in ("images", "scores") for path in (tmp_path / name).rglob(".*")]


class Terminate(Callback):
    """Sends SIGTERM to this process in its first batch."""

    def on_predict_batch_start(self, *batch: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_sigterm_stops_goes_on_and_is_not_taken_for_all(
    compose_config: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    tasks = {
        "generating": [*GENERATE, f"images={images}", "evaluator.batch_size=4", "judges.geneval=null"],
        "scoring": [*SCORE, f"images={images}", f"scores_dir={tmp_path}/scores", "scoring.batch_size=1"],
    }

    def run(part: str, *callbacks: Callback) -> list[str]:
        instantiate(compose_config(*tasks[part])[part], _convert_="all").run(trainer(callbacks=list(callbacks)))
        return json.loads((tmp_path / "geneval.json").read_text())["warnings"] if part == "scoring" else []

    def files() -> int:
        return len(list(images.rglob("*.png")))

    with pytest.raises(SIGTERMException):
        run("generating", StopBetweenBatches(), Terminate())
    assert files() == 4
    with pytest.raises(SIGTERMException):
        run("scoring", StopBetweenBatches(), Terminate())
    notes = run("scoring")
    assert "2 of 6 prompts have images: they were not made to the end" in notes
    assert "\n1 of 2 prompts were judged before and have not changed: " in "\n" + capsys.readouterr().out
    run("generating", StopBetweenBatches())
    assert files() == 12
    assert not any("not made to the end" in note for note in run("scoring"))


@pytest.mark.slow(seconds=24)
def test_two_processes_make_and_score_what_one_does(compose_config: Compose, tmp_path: Path) -> None:
    images = tmp_path / "images"
    two = [f"images={images}", "devices=ddp_cpu"]
    command(tmp_path, *GENERATE, *two)
    done = command(tmp_path, *SCORE, *two, "scoring.batch_size=1", f"scores_dir={tmp_path}/scores")
    assert "Overall score (avg. over tasks): " in done.stdout

    alone = compose_config(*GENERATE, f"images={tmp_path}/alone")
    instantiate(alone.generating, _convert_="all").run(trainer())
    for path in (tmp_path / "alone").rglob("*.png"):
        assert path.read_bytes() == (images / path.relative_to(tmp_path / "alone")).read_bytes()
    config = compose_config(*SCORE, f"images={images}", f"scores_dir={tmp_path}/others")
    instantiate(config.scoring, _convert_="all").run(trainer())
    for name in ("results.jsonl", "geneval.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def tiny_generator(tmp_path: Path) -> list[str]:
    """Overrides that make decoder=sd3 a tiny random one."""
    return ["decoder=sd3", "geneval=shapes", "judges=shapes",
            f"decoder.checkpoint={save_tiny_sd3(f'{tmp_path}/sd3')}", "decoder.dtype=float32",
            f"decoder.without=[{','.join(WITHOUT)}]", "sampling.steps=2", "decoder.size=64"]  # fmt: skip


@pytest.mark.slow
def test_pipelines_of_diffusers_make_the_same_images_in_batches_of_any_size(
    compose_config: Compose, tmp_path: Path
) -> None:
    made, tiny = [], [*GENERATE, *tiny_generator(tmp_path)]
    for size in (1, 5):
        folder = tmp_path / str(size)
        config = compose_config(*tiny, f"images={folder}", f"evaluator.batch_size={size}")
        instantiate(config.generating, _convert_="all").run(trainer())
        made.append(np.stack([np.asarray(Image.open(folder / sample_path(i, j))) for i in range(6) for j in (0, 1)]))
    alone, together = np.array(made, int)
    assert alone.shape == (12, 64, 64, 3) and abs(alone - together).max() <= 1
    assert abs(alone[0] - alone[1]).max() > 20


@pytest.mark.slow
def test_pipelines_of_diffusers_are_evaluated(tmp_path: Path) -> None:
    best = ["strategies=best_of_n", "strategies.best_of_4_clip.n=2", "strategies.best_of_4_oracle.n=2"]
    independent = ["evaluator.independent_judges=[clip]", "fid=shapes", "fid.count=8"]
    done = command(tmp_path, *tiny_generator(tmp_path), *best, *independent, "task=evaluate", *FEW)
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    assert report["images_per_prompt"] == 2 and len(results(tmp_path / "run")) == 36
    found = report["strategies"]
    assert [(name, result["decoder_passes_per_image"]) for name, result in found.items()] == [
        ("sample", 4), ("best_of_4_clip", 8), ("best_of_4_oracle", 8)
    ]  # fmt: skip
    assert [list(result["independent"]) for result in found.values()] == [
        ["clip", "fid"],
        ["fid"],
        ["clip", "fid"],
    ]
    assert "best_of_4_oracle chooses by what it is measured by: it is a ceiling\n" in done.stdout


@pytest.mark.parametrize("name", ["sd3", "sdxl", "flux", "sana", "qwen_image", "diffusion"])
def test_generators_compose(compose_config: Compose, tmp_path: Path, name: str) -> None:
    without = f"decoder.without=[{','.join(WITHOUT)}]"
    config = compose_config(
        f"decoder={name}", f"decoder.checkpoint={save_tiny_sd3(f'{tmp_path}/sd3')}", without, "geneval=tiny_coco"
    )
    for part in ("module", "callbacks"):
        assert instantiate(config[part], _convert_="all") is not None


def test_coco_judges_compose(compose_config: Compose, tmp_path: Path) -> None:
    row = json.dumps(shapes_prompts("evaluation", 1)[0])
    path = tmp_path / "prompts.jsonl"
    path.write_text(row.replace(json.loads(row)["include"][0]["class"], "dog"))
    models = [
        f"geneval.reward.detector.checkpoint={save_tiny_mask2former(f'{tmp_path}/mask2former')}",
        f"geneval.reward.colors.model={save_tiny_clip(f'{tmp_path}/clip')}",
        "geneval.reward.colors.pretrained=null",
    ]
    prompts = [f"geneval.test_prompts.path={path}", "geneval.test_prompts.official=false"]
    config = compose_config("geneval=coco", *models, *prompts, *TINY)
    geneval = instantiate(config.geneval, _convert_="all")
    assert isinstance(geneval["reward"].detector, Mask2FormerDetector) and len(geneval["test_prompts"]) == 1
    with pytest.raises(ValueError, match=r"fails its self-test: .* should show 'a photo of a stop sign', but expected"):
        geneval["reward"].prepare("cpu")  # random weights find no stop sign


@pytest.mark.slow
def test_detections_made_elsewhere_are_scored(compose_config: Compose, tmp_path: Path) -> None:
    images = tmp_path / "images"
    instantiate(compose_config(*GENERATE, f"images={images}").generating, _convert_="all").run(trainer())
    dog = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    found: list[dict[str, Any]] = []
    for i in range(6):
        (images / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(dog))
        found += [{"filename": sample_path(i, j), "detections": []} for j in (0, 1)]
    found[2]["detections"] = [{"class": "dog", "score": 0.5, "bbox": [0, 0, 9, 9]}]
    path = tmp_path / "found.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    score = ["task=score", "geneval=detections", f"images={images}", f"scores_dir={tmp_path}/scores", "logger=csv"]
    command(tmp_path, *score, f"geneval.reward.detector.path={path}")
    assert [row["correct"] for row in results(tmp_path / "run")] == [i == 2 for i in range(12)]
    notes = json.loads((tmp_path / "run" / "geneval.json").read_text())["warnings"]
    assert "not the official prompt set: 1 of 80 single_object prompts" in notes
    assert "score/overall" in (tmp_path / "run" / "metrics" / "metrics.csv").read_text()


@pytest.mark.slow
def test_images_and_references_are_read_as_they_are_seen(tmp_path: Path) -> None:
    rows, references = shapes_prompts("evaluation", 1), tmp_path / "references"
    drawn = {(i, j): render(scene_for(row, np.random.default_rng(j))) for i, row in enumerate(rows) for j in (0, 1)}
    images = write_folder(tmp_path / "images", rows, drawn)
    shutil.copytree(images, references)
    (references / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    lost = images / sample_path(0, 0)
    lost.unlink()
    lost.symlink_to("nowhere.png")
    (images / sample_path(1, 0)).write_bytes(HUGE)
    (images / "00002" / "metadata.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (images / "00002" / "metadata.jsonl").read_bytes().strip() + b"\r\n"
    )
    photographs = f"{{_target_: datamodules.photographs.Photographs, folder: {references}, side: 64}}"
    score = ["task=score", f"images={images}", f"scores_dir={tmp_path}/scores", "scoring.num_workers=0", "logger=csv",
             "trainer.accelerator=cpu", "fid=shapes", "~fid.references", f"+fid.references={photographs}"]  # fmt: skip
    command(tmp_path, *score, "fid.count=12")
    report = json.loads((tmp_path / "run" / "geneval.json").read_text())
    assert report["left_out"] == [
        "00000/samples/0000.png cannot be read: No such file or directory",
        "00001/samples/0000.png cannot be read: it has more than 89,478,485 pixels; make it smaller",
    ]
    assert report["total_images"] == 10 and report["independent"]["fid"] < 0.2
    Image.new("I;16", (64, 64)).save(references / "deep.png")
    refused = command(tmp_path, *score, "fid.count=13", check=False).stderr.strip().splitlines()[-1]
    sentence = "deep.png has the mode I;16, more than 8 bits a pixel and colour"
    assert refused == f"Error: fid.references.folder: {references}/{sentence}"


def test_a_checkpoint_that_changes_no_image_is_told_of(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("load_checkpoint", "trainer_of"):
        monkeypatch.setattr(run, name, lambda *_: None)
    monkeypatch.setattr(Generating, "run", lambda *_: None)
    said = "ckpt_path changes no image: it trained parm, and generating.strategy=sample does not ask it\n"
    for strategy, told in (("sample", said), ("verified", "")):
        wanted = [f"images={tmp_path}/images", "ckpt_path=x", f"generating.strategy={strategy}"]
        run.generate(compose_config(*GENERATE, *wanted))
        assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "parm"),
        (["task=score"], "score"),
        (["task=generate"], "generate"),
        (["task=score", "name=mine"], "mine"),
        (["task=evaluate"], "parm"),
    ],
)
def test_runs_are_called_after_what_they_do(compose_config: Compose, overrides: list[str], name: str) -> None:
    assert compose_config(*overrides).name == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["geneval=detections", "images=somewhere"], "geneval.reward.detector.path needs a value"),
        ([], "task=score needs images=DIR, the folder"),
        (["images=nowhere"], "images: there is no folder nowhere"),
    ],
)
def test_what_scoring_lacks_is_said(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    done = command(tmp_path, "task=score", "logger=csv", *overrides, check=False)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == f"Error: {sentence}"
