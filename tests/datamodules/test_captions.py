"""Repainted images: what PARM's start learns torn shapes from."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from datamodules.captions import CaptionsDataModule, Repaint
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.rewards.geneval_reward import to_uint8

COUNT = 24
LABELS = ("correct", "clauses", "grounding")


@pytest.fixture
def parts(compose_config: Callable[..., DictConfig]) -> tuple[MaskTokenDecoder, CaptionsDataModule]:
    """The bundled mask-token decoder, and its caption pairs, each image decoded again as a whole."""
    cfg = compose_config("experiment=shapes_masked_parm_start", "data.repaint.shares=[1.0,1.0]", "data.num_workers=0")
    return instantiate(cfg.decoder), instantiate(cfg.data)


@pytest.fixture
def rendered(parts: tuple[MaskTokenDecoder, CaptionsDataModule]) -> dict[str, Any]:
    data = parts[1]
    return data.collate([data.train_dataset[i] for i in range(COUNT)])


def test_labels_are_true_of_what_was_painted(parts, rendered) -> None:
    decoder, data = parts
    painted = data.repaint(decoder, rendered)
    assert painted["prompt"] == rendered["prompt"] and "image" not in painted
    assert {name: painted[name].shape for name in LABELS} == {name: rendered[name].shape for name in LABELS}
    images = to_uint8(decoder.image_tokenizer.decode(painted["tokens"]))
    plain = [i for i, row in enumerate(rendered["metadata"]) if "shape" not in row["prompt"]]
    verdicts = data.repaint.reward.verdicts([rendered["metadata"][i] for i in plain], images[[i // 2 for i in plain]])
    assert painted["correct"][plain].tolist() == [float(verdict.correct) for verdict in verdicts]
    # Two steps for a whole image tear most of it, and the rendered images were right.
    assert rendered["correct"][::2].mean() == 1 and painted["correct"][::2].mean() < 0.5


def test_what_is_not_painted_over_stays(parts, rendered) -> None:
    decoder, data = parts
    tokens = decoder.image_tokenizer.encode(rendered["image"])
    untouched = Repaint(data.repaint.strategy, data.repaint.reward, (0.0, 0.0))(decoder, rendered)
    assert torch.equal(untouched["tokens"], tokens)
    assert (untouched["correct"] == rendered["correct"]).float().mean() > 0.9  # the detector agrees with the scene
    half = Repaint(data.repaint.strategy, data.repaint.reward, (0.5, 0.5))(decoder, rendered)
    changed = (half["tokens"] != tokens).float().mean()
    assert 0 < changed < 0.5


def test_an_image_is_painted_alike_in_any_batch(parts, rendered) -> None:
    decoder, data = parts
    whole = data.repaint(decoder, rendered)
    alone = data.repaint(decoder, data.collate([data.train_dataset[i] for i in (7, 3)]))
    assert torch.equal(alone["tokens"], whole["tokens"][[7, 3]])
    for name in LABELS:
        assert torch.equal(alone[name].nan_to_num(-1), whole[name][[14, 15, 6, 7]].nan_to_num(-1))


def test_only_training_images_are_painted_over(parts, rendered) -> None:
    decoder, data = parts
    for training in (True, False):
        data.trainer = SimpleNamespace(training=training, lightning_module=SimpleNamespace(decoder=decoder))
        assert ("tokens" in data.on_after_batch_transfer(rendered, 0)) == training
    data.trainer = None


def test_shares_that_are_none_are_refused(parts) -> None:
    for shares in [(0.5, 1.5), (0.8, 0.5)]:
        with pytest.raises(ValueError, match=r"repaint\.shares"):
            Repaint(parts[1].repaint.strategy, parts[1].repaint.reward, shares)
