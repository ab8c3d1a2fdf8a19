"""Which of several processes this is, before Lightning is imported and after."""

import os
import sys

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in the order in which Lightning reads them


def is_first() -> bool:
    """Say if this is the process of rank 0; known before processes have met."""
    lightning = sys.modules.get("lightning_utilities.core.rank_zero")
    rank = getattr(lightning and lightning.rank_zero_only, "rank", None)  # Lightning sets it
    if rank is None:
        rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)
    return rank == 0
