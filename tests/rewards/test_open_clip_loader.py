"""open_clip models are those that their weights were trained as."""

import warnings
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file

from lightning_modules.rewards.color import CLIPColors
from lightning_modules.rewards.open_clip_loader import load_clip
from lightning_modules.rewards.open_clip_weights import refuse_other_network
from lightning_modules.rewards.tiny_geneval import save_tiny_clip

CONF = Path(__file__).parents[2] / "conf"


def test_what_the_configs_name_is_openais_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: "weights")
    monkeypatch.setattr("open_clip.factory.load_checkpoint", lambda *_, **__: None)
    score = OmegaConf.load(CONF / "judges" / "open_clip.yaml").clip.clip
    colors = OmegaConf.load(CONF / "geneval" / "coco.yaml").reward.colors
    assert (colors.model, colors.pretrained) == (score.model_name, score.pretrained) == ("ViT-L-14-quickgelu", "openai")
    monkeypatch.setattr("open_clip.create_model", partial(open_clip.create_model, device="meta"))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        clip = instantiate(score)
    assert isinstance(clip.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert isinstance(clip.transformer.resblocks[0].mlp.gelu, QuickGELU)


def test_of_all_published_weights_the_fitting_architecture_is_the_only_one() -> None:
    """A model without a twin passes: roberta-ViT-B-32 has QuickGELU, which the entry of its weights forgets."""
    for model, tag in open_clip.list_pretrained():
        name = model.removesuffix("-quickgelu")
        passes = []
        for each in (name, f"{name}-quickgelu"):
            if open_clip.get_model_config(each) is None:
                continue
            try:
                refuse_other_network("key", each, tag.upper())
                passes.append(each)
            except ValueError as error:
                assert f"key: {tag.upper()} weights need " in str(error)
        quick = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
        assert passes == [f"{name}-quickgelu" if quick else name]


@pytest.mark.parametrize(
    ("model", "tag", "fitting"),
    [("ViT-L-14", "openai", "ViT-L-14-quickgelu"), ("ViT-L-14-quickgelu", "laion2b_s32b_b82k", "ViT-L-14")],
)
def test_weights_of_another_activation_are_refused(
    monkeypatch: pytest.MonkeyPatch, model: str, tag: str, fitting: str
) -> None:
    monkeypatch.setattr("open_clip.create_model", lambda *given, **_: pytest.fail(f"{given} was built"))
    for key, load in (("judges.rewards.clip.clip", load_clip), ("geneval.reward.colors", CLIPColors)):
        with pytest.raises(ValueError, match=f"^{key}: {tag} weights need {fitting}, not {model}: they were trained"):
            load(model, tag)


def test_files_and_folders_pass_and_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_clip(str(tmp_path / "clip"))
    assert isinstance(load_clip(folder, "openai").visual.transformer.resblocks[0].mlp.gelu, QuickGELU)  # it says so
    weights = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model("ViT-S-32-alt").state_dict(), weights)
    assert load_clip("ViT-S-32-alt", str(weights)).visual.conv1.weight.isfinite().all()
    unfit = r"^judges.rewards.clip.clip.pretrained: .*weights.safetensors has no weights of"
    with pytest.raises(ValueError, match=rf"{unfit} ViT-S-32 \(text pos_embed width changed!\)"):
        load_clip("ViT-S-32", str(weights))
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=rf"{unfit} ViT-S-32-alt \(Error while deserializing header"):
        load_clip("ViT-S-32-alt", str(weights))
    with pytest.raises(
        ValueError, match=r"^judges.rewards.clip.clip: open_clip has no model 'ViT-L14'; close to it: ViT-L-14"
    ):
        load_clip("ViT-L14", "openai")
    with pytest.raises(FileNotFoundError, match=r"'opnai' is neither a file nor weights of ViT-B-16 .*\(openai, laion"):
        load_clip("ViT-B-16", "opnai")
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(FileNotFoundError) as error:
        load_clip("ViT-B-16", "laion2b_s34b_b88k")
    assert str(error.value) == (
        "judges.rewards.clip.clip: Failed to download weights for tag 'laion2b_s34b_b88k': division by zero; "
        "where there is network run `hf download laion/CLIP-ViT-B-16-laion2B-s34B-b88K "
        "--include 'open_clip_*' --local-dir CLIP`, "
        "then set judges.rewards.clip.clip.pretrained to the file of weights in CLIP"
    )
