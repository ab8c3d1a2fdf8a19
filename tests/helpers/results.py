"""Results of evaluations that never happened, to be shown."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_modules.report.drawing import TraceView
from lightning_modules.report.results import EvaluationResult, RunInfo, StrategyResult
from lightning_modules.rewards.geneval_metadata import TASKS

RUN = RunInfo("parm", ["seed=3"], "last.ckpt")


def make_result(
    correct: Sequence[bool],
    per_prompt: int = 2,
    name: str = "parm",
    passes: float = 128.0,
    tasks: Sequence[str] = TASKS[3:5],
) -> StrategyResult:
    """A result on the images of a few tasks, so many of each prompt; every prompt has a thumbnail."""
    per_task = len(correct) // len(tasks)
    metadata = {"include": [{"class": "diamond", "count": 3}], "exclude": [{"class": "diamond", "count": 4}]}
    rows = [
        {
            "filename": f"{i // per_prompt:05d}/samples/{i % per_prompt:04d}.png",
            "tag": tasks[min(i // per_task, len(tasks) - 1)],
            "prompt": f"a photo of a thing number {i // per_prompt}",
            "correct": right,
            "reason": "" if right else "expected diamond<4, found 5",
            "metadata": json.dumps(metadata),
            "details": "{}",
        }
        for i, right in enumerate(correct)
    ]
    scores = {task: float(np.mean([row["correct"] for row in rows if row["tag"] == task])) for task in tasks}
    image = np.full((64, 64, 3), 128, np.uint8)
    shown = range(len(correct) // per_prompt)
    return StrategyResult(
        name=name,
        overall=float(np.mean(list(scores.values()))),
        tasks=scores,
        rows=rows,
        thumbnails=dict.fromkeys(shown, image),
        decoder_passes=passes,
        verifier_calls=8,
        seconds=0.1,
        objects=1.5,
        independent={},
        traces={i: TraceView({}, []) for i in shown},
    )


def make_evaluation(results: Mapping[str, StrategyResult], ceilings: Sequence[str] = ()) -> EvaluationResult:
    """An evaluation of these results."""
    prompts = len({row["prompt"] for row in next(iter(results.values())).rows})
    settings = {"prompts": prompts, "images_per_prompt": 2, "seed": 3, "decoder": "Decoder"}
    return EvaluationResult(settings, ["odd"], results, ceilings)
