"""The code in the documentation runs as it stands."""

import re
from functools import partial
from typing import Any

import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from tests.helpers.models import make_decoder
from tests.helpers.overrides import ROOT


def code(name: str) -> dict[str, Any]:
    """What a page's Python defines, run from top to bottom."""
    text = (ROOT / "docs" / name).read_text()
    names: dict[str, Any] = {"__name__": name}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(compile(block, name, "exec"), names)
    return names


def test_what_the_page_on_adding_adds_works() -> None:
    names = code("adding.md")
    brighter = names["EveryOther"](None, k=16, verifier="redness")
    plain = names["EveryOther"](None, k=1, verifier="redness")
    light = [
        names["Redness"]()([], names["decoder"].image_tokenizer.decode(
            strategy.decode(names["decoder"], names["judges"], names["request"]).tokens
        )).mean()
        for strategy in (brighter, plain)
    ]  # fmt: skip
    assert light[0] > light[1]

    module = names["SmoothedModule"](make_decoder(), partial(torch.optim.AdamW, lr=1e-3), 1, 0.1)
    batch = {"image": torch.rand(4, 3, 64, 64), "prompt": ["a photo of a star"] * 4}
    tokens = module.decoder.image_tokenizer.encode(batch["image"])
    before = float(module.decoder.nll(batch["prompt"], tokens))
    trainer = Trainer(max_steps=20, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(module, DataLoader([batch] * 20, batch_size=None))
    assert float(module.decoder.nll(batch["prompt"], tokens)) < before
