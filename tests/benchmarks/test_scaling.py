"""What a second process adds, one thread each: pytest tests/benchmarks/test_scaling.py --benchmark-only -n 0

The efficiency is the time of one process over twice that of two, from when all have met until all are done; it says
something only where two cores are free.
"""

import shutil
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.helpers.launch import command

JOBS = {
    "rollouts": ["task=rollout", "geneval.train_prompts.per_task=40", "data.collect_batch_size=60",
                 "~data.train.verified", "~data.train.verified_again"],
    "evaluation": ["task=evaluate", "data.test.samples=1",
                   "callbacks.geneval.test_strategies=[sample,verified_best_of_4]",
                   "evaluator.batch_size=25"],
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_take_little_more_than_half_the_time_of_one(
    benchmark: BenchmarkFixture, tmp_path: Path, name: str
) -> None:
    def seconds(*overrides: str) -> float:
        shutil.rmtree(tmp_path / "rollouts", ignore_errors=True)
        clock = f"+callbacks.clock={{_target_: tests.helpers.measuring.Clock, path: {tmp_path}/seconds}}"
        command(tmp_path, *JOBS[name], "logger=csv", "trainer.accelerator=cpu", clock, *overrides)
        return float((tmp_path / "seconds").read_text())

    one = seconds()
    two = benchmark.pedantic(seconds, ("devices=ddp_cpu",))
    efficiency = one / (2 * two)
    benchmark.extra_info |= {"one_process_seconds": one, "two_processes_seconds": two, "efficiency": efficiency}
    print(f"\n{name}: {one:.1f} s in one process, {two:.1f} s in two, efficiency {efficiency:.2f}")
    assert efficiency >= 0.85
