"""Processes that work beside the test."""

import multiprocessing
from collections.abc import Callable

FORK = multiprocessing.get_context("fork")


def started(*targets: Callable[[], object]) -> list[multiprocessing.process.BaseProcess]:
    """Processes that do these things at the same time."""
    processes = [FORK.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    return processes
