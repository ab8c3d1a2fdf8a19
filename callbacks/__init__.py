"""Callbacks of the Trainer: GenEval, checkpoints, memory."""
