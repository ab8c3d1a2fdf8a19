"""Weights on disk: strict, named errors, bundled weights."""

import json
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from datamodules.shapes.prompts import vocabulary
from lightning_modules.backbone import loading
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.image_tokenizer import PatchVQ
from lightning_modules.backbone.loading import (
    CheckpointReader,
    Layout,
    export,
    fingerprint,
    own_state,
    pretrained,
    resolve,
)
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.text import WordTokenizer
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.files import BUNDLED
from tests.helpers.models import make_decoder


def test_export_and_load_give_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    export(first, tmp_path, {"what": "linear"}, torch.float32)
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(pretrained(second, str(tmp_path))) == fingerprint(first)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o444 == 0o444  # for others to read


def test_weights_of_something_else_are_not_written_over(tmp_path: Path) -> None:
    export(nn.Linear(3, 4), tmp_path, {"what": "linear", "checkpoint": "here"})
    export(nn.Linear(3, 4), tmp_path, {"what": "linear", "checkpoint": "elsewhere"})
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"export_dir: .* holds model\.safetensors of something else: name another"):
        export(nn.Linear(3, 4), tmp_path, {"what": "another"})
    (tmp_path / "config.json").unlink()  # not an export
    with pytest.raises(ValueError, match=r"holds model\.safetensors of something else"):
        export(nn.Linear(3, 4), tmp_path, {"what": "linear"})
    assert (tmp_path / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_config_of_something_else_is_not_written_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"export_dir: .* holds config\.json of something else"):
        export(nn.Linear(3, 4), tmp_path, {"what": "linear"})


def test_an_export_says_whose_weights_it_has_before_it_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "save", lambda _: sys.exit("killed"))
    with pytest.raises(SystemExit):
        export(nn.Linear(3, 4), tmp_path, {"what": "linear"})
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}
    monkeypatch.undo()
    export(nn.Linear(3, 4), tmp_path, {"what": "linear"})


def test_frozen_parts_are_not_written() -> None:
    decoder = make_decoder()
    assert any(key.startswith("image_tokenizer.") for key in decoder.state_dict())
    assert not any(key.startswith("image_tokenizer.") for key in own_state(decoder))


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (nn.Linear(3, 5), r"made for another model: 'weight' has shape \[4, 3\] instead of \[5, 3\]"),
        (nn.Linear(3, 4, bias=False), "has a tensor 'bias' unknown to Linear"),
        (nn.BatchNorm1d(4), "has no tensor 'running_mean', which BatchNorm1d needs|has shape"),
    ],
)
def test_other_shapes_missing_and_surplus_tensors_are_named(tmp_path: Path, module: nn.Module, sentence: str) -> None:
    export(nn.Linear(3, 4), tmp_path, {})
    with pytest.raises(ValueError, match=sentence):
        pretrained(module, str(tmp_path))


def test_a_missing_checkpoint_says_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no such folder .*bundled:shapes_decoder"):
        resolve("bundled:shapes_painter")


def test_bundled_weights_fit_in_the_budget_and_say_where_they_come_from() -> None:
    files = list(BUNDLED.glob("*/model.safetensors"))
    assert {path.parent.name for path in files} >= {"shapes_tokenizer", "shapes_decoder", "shapes_parm_start"}
    assert sum(path.stat().st_size for path in files) < 20e6
    for path in files:
        assert "python train.py experiment=" in (path.parent / "PROVENANCE.md").read_text()
        assert (path.parent / "config.json").is_file()


def test_bundled_tokenizer_reconstructs_shapes() -> None:
    import numpy as np

    from datamodules.shapes.detector import ShapesDetector
    from datamodules.shapes.scenes import ShapesStream
    from lightning_modules.rewards.geneval_metric import GenEvalMetric
    from lightning_modules.rewards.geneval_reward import GenEvalReward, to_uint8

    tokenizer = pretrained(PatchVQ(1024, 8, 64, 96, 2), "bundled:shapes_tokenizer").eval()
    stream = ShapesStream(split="evaluation", seed=21)
    samples = [stream[i] for i in range(400)]
    pixels = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        images = to_uint8(tokenizer.decode(tokenizer.encode(pixels)))
    rows = [s.metadata for s in samples]
    metric = GenEvalMetric()
    verdicts = GenEvalReward(ShapesDetector()).verdicts(rows, images)
    metric.update([row["tag"] for row in rows], torch.tensor([v.correct for v in verdicts]))
    assert metric.compute()["overall"] >= 0.97


def started(folder: Path, dim: int = 96) -> MaskTokenDecoder:
    """A mask-token decoder that begins with the weights in a folder."""
    tokenizer = PatchVQ(codebook_size=1024, grid=8, image_size=64, width=16, blocks=1)
    sizes = TransformerConfig(dim=dim, depth=12, heads=4)
    module = MaskTokenDecoder(tokenizer, WordTokenizer(vocabulary(), 12), 14, sizes, 4, visual=True)
    return pretrained(module, start=str(folder))


def test_a_mask_token_decoder_begins_with_what_a_next_token_decoder_knows() -> None:
    folder = resolve("bundled:shapes_decoder")
    stored, decoder = CheckpointReader(folder), started(folder)
    own = dict(decoder.named_parameters())
    kept = [key for key in own if key.startswith(("transformer.", "norm.", "code_proj.", "rows", "columns"))]
    assert len(kept) == 12 * 12 + 5
    for key in kept:
        assert torch.equal(own[key], stored.read([key]).float()), key
    first = decoder.vocabulary.first_code
    for table in (decoder.embed.weight, decoder.head.weight):
        assert torch.equal(table[first : first + 1024], stored.read(["codes"]).float())
    words = stored.read(["prompt_encoder.words.weight"]).float()
    assert torch.equal(decoder.embed.weight[: len(words)], words)


def test_a_start_of_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder.start=.* has no tensor 'rows' of shape \[8, 1, 64\]"):
        started(resolve("bundled:shapes_decoder"), dim=64)


def test_weights_of_another_kind_of_network_are_called_so(decoder: CompactDecoder) -> None:
    with pytest.raises(
        ValueError, match=r"^checkpoint 'bundled:shapes_parm_start' holds the weights of a PARM, not of a"
    ):
        pretrained(decoder, "bundled:shapes_parm_start")


def test_checkpoints_of_training_are_refused_with_what_to_do(tmp_path: Path) -> None:
    tensors = nn.Linear(3, 4).state_dict()
    torch.save({"model": tensors, "steps": 7, "args": Namespace(lr=1e-4)}, tmp_path / "0000007.pt")
    with pytest.raises(ValueError, match=r"0000007\.pt holds more than tensors .* save its tensors alone with `torch"):
        pretrained(nn.Linear(3, 4), str(tmp_path / "0000007.pt"))
    torch.save({"model": tensors, "steps": 7}, tmp_path / "weights.pt")
    loaded = pretrained(nn.Linear(3, 4), str(tmp_path / "weights.pt"))
    assert torch.equal(loaded.weight, tensors["weight"])
    torch.save({"steps": 7}, tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"nothing\.pt does not hold tensors with names alone"):
        pretrained(nn.Linear(3, 4), str(tmp_path / "nothing.pt"))


def test_a_file_of_a_repository_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither a folder nor to be had from the Hugging"):
        resolve("nobody/nothing/weights.pt")


def test_missing_shards_of_pickled_weights_are_named(tmp_path: Path) -> None:
    index = {"weight_map": {"weight": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"00001-of-00002\.bin is missing, which pytorch_model\.bin\.index"):
        pretrained(nn.Linear(3, 4), str(tmp_path))


class Renamed(nn.Linear):
    """A layer whose weights are published in two ways."""

    layouts = (Layout(lambda key: [f"a.{key}"], r"a\.spare"), Layout(lambda key: [f"b.{key}"]))


def test_the_layout_that_fits_is_read(tmp_path: Path) -> None:
    tensors = nn.Linear(3, 4).state_dict()
    for prefix in ("a.", "b.", ""):
        torch.save({prefix + key: value for key, value in tensors.items()}, tmp_path / "weights.pt")
        assert torch.equal(pretrained(Renamed(3, 4), str(tmp_path / "weights.pt")).weight, tensors["weight"])
    for prefix, refused in (("a.", False), ("b.", True)):
        stored = {prefix + key: value for key, value in tensors.items()} | {f"{prefix}spare": torch.zeros(2)}
        torch.save(stored, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=r"a tensor 'b\.spare' unknown") if refused else nullcontext():
            pretrained(Renamed(3, 4), str(tmp_path / "weights.pt"))
    torch.save({"b.weight": tensors["weight"]}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"has no tensor 'b\.bias', which Renamed needs"):
        pretrained(Renamed(3, 4), str(tmp_path / "weights.pt"))
