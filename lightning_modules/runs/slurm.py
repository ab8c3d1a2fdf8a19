"""SLURM: a run that is requeued stays the same run."""

import atexit
import hashlib
import os
import signal
import subprocess
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.fabric.plugins.environments import SLURMEnvironment

from lightning_modules.ranks import is_first


def job_id() -> str | None:
    """Return the SLURM job of this process, which keeps its number when it is requeued; None in interactive jobs."""
    if SLURMEnvironment.job_id() is None:
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def run_id() -> str | None:
    """Return which run of a SLURM job this is, by its command: a job may have several, whose steps have no order."""
    if (job := job_id()) is None:
        return None
    command = "\n".join(sorted(HydraConfig.get().overrides.task))
    return f"{job}-{hashlib.sha256(command.encode()).hexdigest()[:8]}"


class Requeue:
    """Has SLURM start the job again when this run stops because of SIGUSR1, as `sbatch --signal=USR1@90` sends it.

    Lightning's own way saves wherever the signal finds each process, in the middle of a step.
    """

    def __init__(self) -> None:
        self._asked = False

    def listen(self) -> None:
        """Take SIGUSR1 from now on, if this is a SLURM job."""
        if job_id() is not None:
            signal.signal(signal.SIGUSR1, self._stop)
            atexit.register(self.now)

    def _stop(self, *_: Any) -> None:
        self._asked = True
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # nobody would save: the process just ends
            self.now()
        signal.raise_signal(signal.SIGTERM)

    def forget(self) -> None:
        """Leave the job to end, as the run has."""
        self._asked = False

    def now(self) -> None:
        """Requeue the job, if that was asked for and has not been done."""
        if self._asked and is_first():
            self._asked, job = False, job_id()
            try:
                subprocess.run(["scontrol", "requeue", str(job)], check=True)
                print(f"SLURM job {job} is requeued, and resumes where it stopped", flush=True)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"SLURM job {job} could not be requeued ({error}); ckpt_path=auto resumes it", flush=True)


requeue = Requeue()
