"""Which of several processes this is, before Lightning is imported and after."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in the order in which Lightning reads them


def is_first() -> bool:
    """Say if this is the process of rank 0; known before processes have met."""
    lightning = sys.modules.get("lightning_utilities.core.rank_zero")
    rank = getattr(lightning and lightning.rank_zero_only, "rank", None)  # Lightning sets it
    if rank is None:
        rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)
    return rank == 0


def about_load(threads: int) -> str | None:
    """Say what to do about other programs that keep this machine busy; they slow one with several threads tenfold."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]  # of the last minute: a run of one's own may have ended in it
    if threads < 2 or load < 0.5 or load + threads <= cores + 0.5 or not _others_run():
        return None
    busy = f"Other programs use this machine (load {load:.1f}, {cores} cores)"
    return f"{busy}: with OMP_NUM_THREADS=1 before the command it may be several times faster"


def _others_run() -> bool:
    """Say if more than this thread runs at this moment; True where the system does not tell."""
    for _ in range(5):
        with suppress(OSError):
            if int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) < 2:
                return False
        time.sleep(0.02)
    return True
