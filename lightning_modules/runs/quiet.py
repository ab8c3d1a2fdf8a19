"""Keeps from the terminal what libraries say of themselves in every run; warnings about a run stay."""

import logging
import warnings

# Beginnings of what Lightning logs in every run: machines that are not there, adverts, and its own defaults.
_LOGGED = (
    "GPU available",
    "TPU available",
    "HPU available",
    "💡 Tip",
    "`Trainer(val_check_interval",
    "`Trainer.fit` stopped",
    "Restoring states from",
    "Restored all states from",
    "Loaded model weights from",
)
# Warnings that say nothing of a run, and why.
_WARNED = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own code
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # an epoch of rollouts is short
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen decoder and the reference
    r"torch\.searchsorted\(\): input value tensor is non-contiguous",  # torchmetrics' own code
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",  # nothing here uses it
    r"Total length of `\w+` across ranks is zero",  # task=rollout predicts nothing
    r"The dirpath has changed from",  # an evaluation writes elsewhere, and callbacks.checkpoint follows moved runs
    r"The '\w+' does not have many workers",  # rows are cheap; data.num_workers raises it
)


def quieten() -> None:
    """Drop these messages in this process from now on, and print Lightning's others once."""
    logging.getLogger("lightning").handlers.clear()  # Hydra's handler prints what reaches the root
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(each, _Own) for each in logger.filters):
        logger.addFilter(_Own())
    for message in _WARNED:
        warnings.filterwarnings("ignore", message)


class _Own(logging.Filter):
    """Lets pass what does not begin like one of `_LOGGED`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_LOGGED)
