"""Callbacks: GenEval, checkpoints and memory of the Trainer; the folders of runs of Hydra."""
