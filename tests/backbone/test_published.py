"""The sentences on published weights that are not here."""

from typing import Any

import open_clip
import pytest
from omegaconf import OmegaConf

from lightning_modules.backbone.checkpoint_folder import on_hub
from lightning_modules.backbone.open_clip_names import architecture, architectures, tags_of, weights_of
from lightning_modules.backbone.published import Published, named, refuse_missing
from tests.helpers.overrides import ROOT


def test_weights_of_llamagen_are_named_file_by_file(compose_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = OmegaConf.to_container(compose_config("decoder=llamagen_512").decoder, resolve=True)
    with pytest.raises(FileNotFoundError) as refused:
        refuse_missing(list(named({"decoder": config})))
    said = [line.strip() for line in str(refused.value).splitlines()[1:]]
    assert len(said) == 3
    assert (
        "decoder.checkpoint: peizesun/llamagen_t2i (t2i_XL_stage2_512.pt, 3.1 GB): `hf download peizesun/llamagen_t2i "
        "--include 't2i_XL_stage2_512.pt' --local-dir FOLDER`, then decoder.checkpoint=FOLDER/t2i_XL_stage2_512.pt"
    ) in said
    assert any(" (vq_ds16_t2i.pt, 0.3 GB): " in line and line.endswith("FOLDER/vq_ds16_t2i.pt") for line in said)
    assert any("google/flan-t5-xl (*.[js]*, 11.4 GB): `hf download" in line for line in said)


def test_a_folder_that_is_gone_is_told_from_a_name_on_the_hub(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    gone = Published("parm.checkpoint", "outputs/my_parm", ("*.safetensors",))
    assert str(gone) == "parm.checkpoint: there is no my_parm in the folder outputs"


def test_open_clips_names_are_those_that_it_has_itself() -> None:
    assert architectures() == sorted(open_clip.list_models())
    for model, tag in open_clip.list_pretrained():
        assert weights_of(model, tag) == open_clip.get_pretrained_cfg(model, tag)
        assert architecture(model) == open_clip.get_model_config(model) and tag in tags_of(model)
    assert not weights_of("ViT-B-32", "nothing") and architecture("nothing") is None


@pytest.mark.parametrize(
    ("checkpoint", "wanted"),
    [
        ("owner/name", ("owner/name", "")),
        ("owner/name/weights.pt", ("owner/name", "weights.pt")),
        ("outputs/parm/export", None),
        ("owner/name/a/b.pt", None),
        ("tests/backbone", None),
    ],
)
def test_names_on_the_hub_are_told_from_paths(checkpoint: str, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert on_hub(checkpoint) == wanted


def test_a_file_that_is_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.pt").touch()
    loader = {"_target_": "lightning_modules.backbone.loading.pretrained"}
    assert list(named({"decoder": loader | {"checkpoint": "a/b/c.pt"}})) == []
    (found,) = named({"decoder": loader | {"checkpoint": "a/b/d.pt"}})
    assert (found.name, found.file) == ("a/b", "/d.pt")
