"""Requests for images of texts, where metadata does not matter."""

from collections.abc import Sequence

from torch import Tensor

from lightning_modules.backbone.decoder import Request


def asked(
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    tokens: Tensor | None = None,
    fixed: Tensor | None = None,
) -> Request:
    """One image of each text, with seeds 0, 1, ... if none are given."""
    seeds = range(len(prompts)) if seeds is None else seeds
    return Request([{"prompt": text} for text in prompts], list(seeds), tokens, fixed)
