"""Callbacks: GenEval during and after training, and what it reports."""
