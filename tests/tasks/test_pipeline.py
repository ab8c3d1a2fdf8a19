"""The pipeline: jobs run once, in order, with their folders filled in; the table puts seeds together."""

import csv
import json
import signal
import sys
from pathlib import Path

import pytest

from lightning_modules.rewards.geneval_metadata import TASKS
from lightning_modules.tasks.pipeline import Job, Pipeline, Row

# Stands in for train.py: leaves a report in which `sample` is right in one task more than the job before it.
TRAIN = """
import json, os, pathlib, signal, sys, time
overrides = dict(item.split("=", 1) for item in sys.argv[1:])
folder = pathlib.Path(overrides["hydra.run.dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent.parent / "log").open("a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if (folder.parent.parent / "fail").exists():
    sys.exit(3)
if (folder.parent.parent / "wait").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
tasks = %r
right = int(overrides["right"])
rows = [
    {"filename": f"sample/{i:05d}/samples/0000.png", "tag": task, "prompt": task, "correct": i < right}
    for i, task in enumerate(tasks)
]
report = {
    "overall": right / 6, "tasks": {row["tag"]: float(row["correct"]) for row in rows},
    "decoder_passes_per_image": 128, "verifier_calls_per_image": 0, "seconds_per_image": 0.5,
    "objects_per_image": 1 + int(overrides["seed"]),
}
(folder / "results.jsonl").write_text("\\n".join(map(json.dumps, rows)))
(folder / "geneval.json").write_text(json.dumps({"strategies": {"sample": report}}))
"""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    script = tmp_path / "train.py"
    script.write_text(TRAIN % (list(TASKS),))
    monkeypatch.setattr(sys, "argv", [str(script)])
    jobs = {"base": Job(["right=2"]), "better": Job(["right=5", "parm.checkpoint='<base>/weights'"])}
    return Pipeline(
        str(tmp_path / "pipeline"), [0, 1], jobs, {"baseline": Row("base", "sample"), "DPO": Row("better", "sample")}
    )


def started(pipeline: Pipeline) -> list[list[str]]:
    return [json.loads(line) for line in (pipeline.folder / "log").read_text().splitlines()]


def test_jobs_run_in_order_with_the_folders_of_those_they_build_on(pipeline: Pipeline) -> None:
    pipeline.run()
    runs = started(pipeline)
    assert [item for run in runs for item in run if item.startswith(("seed", "right"))] == [
        "seed=0", "right=2", "seed=0", "right=5", "seed=1", "right=2", "seed=1", "right=5",
    ]  # fmt: skip
    assert f"parm.checkpoint='{pipeline.folder}/seed-1/base/weights'" in runs[3]


def test_what_is_there_is_not_run_again_and_what_was_killed_resumes(pipeline: Pipeline) -> None:
    pipeline.run()
    job = pipeline.folder / "seed-1" / "better"
    (job / "geneval.json").unlink()
    (job / "checkpoints").mkdir()
    (job / "checkpoints" / "last.ckpt").write_text("weights")
    before = len(started(pipeline))
    pipeline.run()
    again = started(pipeline)[before:]
    assert len(again) == 1 and f"ckpt_path='{job}/checkpoints/last.ckpt'" in again[0]


def test_who_asks_the_pipeline_to_end_ends_its_job(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    (pipeline.folder / "wait").parent.mkdir()
    (pipeline.folder / "wait").touch()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        pipeline.run()
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "stopped in job base of seed 0; the same command goes on there" in capsys.readouterr().out


def test_the_table_puts_seeds_together(pipeline: Pipeline) -> None:
    pipeline.run()
    report = json.loads((pipeline.folder / "pipeline.json").read_text())
    assert report["seeds"] == [0, 1] and report["images_per_row"] == 12
    base, aligned = report["rows"]
    assert (base["row"], base["overall"], base["gain"]) == ("baseline", round(2 / 6, 4), 0.0)
    assert (aligned["overall"], aligned["gain"], aligned["gain_low_95"]) == (round(5 / 6, 4), 0.5, 0.5)
    assert (aligned["seconds_per_image"], aligned["objects_per_image"]) == (0.5, 1.5)
    with (pipeline.folder / "pipeline.csv").open() as file:
        assert [float(row["overall"]) for row in csv.DictReader(file)] == [base["overall"], aligned["overall"]]
    assert "| DPO | " in (pipeline.folder / "pipeline.md").read_text()
    assert (pipeline.folder / "pipeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_job_stops_the_pipeline_in_a_sentence(pipeline: Pipeline) -> None:
    pipeline.folder.mkdir()
    (pipeline.folder / "fail").touch()
    with pytest.raises(ValueError, match=r"the job 'base' of seed 0 ended with 3; see .*seed-0/base"):
        pipeline.run()


@pytest.mark.parametrize(
    ("seeds", "row", "sentence"),
    [([], Row("base", "sample"), "seeds is empty"), ([0], Row("nothing", "sample"), "names the job 'nothing'")],
)
def test_impossible_pipelines_are_refused(tmp_path: Path, seeds: list[int], row: Row, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Pipeline(str(tmp_path), seeds, {"base": Job([])}, {"baseline": row})


def test_a_row_of_an_unknown_strategy_is_named(pipeline: Pipeline) -> None:
    pipeline.rows = {"baseline": Row("base", "magic")}
    with pytest.raises(ValueError, match="names the strategy 'magic'; there are: sample"):
        pipeline.run()
