"""What is said of other programs on the machine."""

import os

import pytest

from lightning_modules.runs import processes
from lightning_modules.runs.processes import about_load


@pytest.mark.parametrize(
    ("load", "threads", "busy"), [(1.0, 2, True), (0.2, 2, False), (1.0, 1, False), (0.7, 3, False), (30.0, 2, True)]
)
def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch, load: float, threads: int, busy: bool) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2 if threads < 3 else 4)
    monkeypatch.setattr(processes, "_others_run", lambda: True)
    said = about_load(threads)
    monkeypatch.setattr(processes, "_others_run", lambda: False)  # a run of one's own has just ended
    assert about_load(threads) is None
    assert (said is not None) == busy and (not busy or f"(load {load}, 2 cores): with OMP_NUM_THREADS=1" in str(said))
