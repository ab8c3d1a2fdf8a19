"""Networks shared as folders: what task=export writes is what from_pretrained reads and push_to_hub sends."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import TokenDecoder
from lightning_modules.backbone.hub import HubMixin
from lightning_modules.backbone.image_tokenizer import ImageTokenizer
from lightning_modules.backbone.loading import export, fingerprint, pretrained
from lightning_modules.backbone.magvit import MagvitV2
from lightning_modules.files import BUNDLED
from lightning_modules.rewards.parm import PARM
from tests.helpers.overrides import TINY


@pytest.mark.parametrize(
    ("node", "kind"),
    [("parm", PARM), ("decoder", CompactDecoder), ("decoder", TokenDecoder), ("tokenizer", ImageTokenizer)],
)
def test_a_folder_is_read_and_written_again(
    tmp_path: Path, compose_config: Any, node: str, kind: type[HubMixin]
) -> None:
    """As the bundled weights are, frozen parts included: the decoder's tokenizer is the one that its config names."""
    name = {"parm": "shapes_parm_start"}.get(node, f"shapes_{node}")
    there = kind.from_pretrained(BUNDLED / name)
    by_config = instantiate(compose_config()[node], _convert_="all")
    assert type(there) is type(by_config) and not there.training  # type: ignore[attr-defined]
    assert fingerprint(there) == fingerprint(by_config)  # type: ignore[arg-type]
    there.save_pretrained(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "mine" / file).read_bytes() == (BUNDLED / name / file).read_bytes()
    again = pretrained(instantiate(compose_config()[node], _convert_="all"), str(tmp_path / "mine"))
    assert fingerprint(again) == fingerprint(there)  # type: ignore[arg-type]


def test_an_export_is_pushed_as_it_is(tmp_path: Path, compose_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config(*TINY)
    parm = instantiate(config.parm, _convert_="all")
    with pytest.raises(ValueError, match="this PARM does not know its config: task=export writes it"):
        parm.save_pretrained(tmp_path / "nothing")
    export(parm, tmp_path / "mine", OmegaConf.to_container(config.parm, resolve=True))  # type: ignore[arg-type]

    class Repository:
        repo_id = "me/parm"

    def keep(self: HfApi, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "hub")
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(HfApi, "upload_folder", keep)
    assert PARM.from_pretrained(tmp_path / "mine").push_to_hub("me/parm") == "me/parm"
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "hub" / file).read_bytes() == (tmp_path / "mine" / file).read_bytes()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda *_, **__: tmp_path / "hub" / "config.json")
    found = PARM.from_pretrained("me/parm", revision="main")
    for key, value in parm.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-3, atol=1e-6)  # half precision


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"module": {"_target_": "os.system", "command": "true"}}, "config.json names os.system, which is no part of"),
        (
            {"module": {"_target_": "lightning_modules.rewards.parm.PARM", "grid": [{"_target_": "shutil.rmtree"}]}},
            "config.json names shutil.rmtree",
        ),
        (
            {"module": {"_target_": "lightning_modules.files.os.remove", "path": "x"}},
            r"config.json names lightning_modules.files.os.remove",
        ),
        ({"module": {"_target_": "lightning_modules.rewards.parm.PARM", "grid": "${oc.env:HOME}"}}, "is not resolved"),
        ({"module": {"_target_": "lightning_modules.backbone.text.WordTokenizer", "vocabulary": ["a"], "max_words": 1}},
         "is a WordTokenizer, not a PARM"),
        ({"hidden_size": 8}, "has no config.json as task=export writes it"),
    ],
)  # fmt: skip
def test_configs_of_others_call_nothing_but_this_package(tmp_path: Path, node: dict[str, Any], sentence: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(node))
    with pytest.raises(ValueError, match=sentence):
        PARM.from_pretrained(tmp_path)


def test_networks_whose_settings_are_called_config_are_shared_as_well(tmp_path: Path) -> None:
    sizes = {"encoder_widths": [8, 8], "encoder_blocks": [1, 1], "decoder_widths": [8, 8], "decoder_blocks": [1, 1]}
    settings = {"_target_": "lightning_modules.backbone.magvit.MagvitConfig", "image_size": 16, "bits": 4,
                "norm_groups": 4, **sizes}  # fmt: skip
    node = {"module": {"_target_": "lightning_modules.backbone.magvit.MagvitV2", "config": settings}}
    export(instantiate(node["module"], _convert_="all"), tmp_path, node)
    found = MagvitV2.from_pretrained(tmp_path)
    assert (found.image_size, found.codebook_size) == (16, 16)
