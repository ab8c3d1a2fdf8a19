"""What is refused before anything is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from lightning_modules.backbone.janus_template import ROLES, check_name
from lightning_modules.backbone.published import Published
from lightning_modules.files import BUNDLED
from lightning_modules.runs.mismatches import refuse_mismatches
from lightning_modules.runs.preflight import refuse_settings
from lightning_modules.runs.weights import built_parts, refuse_missing_weights, refuse_unfit_weights
from tests.helpers.launch import command
from tests.helpers.overrides import DECODE_NOTHING, SHARDED, SMALL_DPO, SMALL_PARM, pair_files

LOADER = "lightning_modules.backbone.loading.pretrained"
Compose = Callable[..., DictConfig]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["experiment=showo_evaluate", "geneval=shapes"],
            "geneval.reward.detector: ShapesDetector looks at images of 64x64 pixels, and the decoder makes 256x256; ",
        ),
        (["experiment=showo_dpo", "data=preferences", "geneval=shapes"], "geneval.reward.detector: ShapesDetector"),
        (
            [
                "geneval.test_prompts={_target_: datamodules.geneval_prompts.prompts_from_coco,"
                " split: evaluation, per_task: 1}"
            ],
            "geneval.test_prompts: 'a photo of a bench' asks for 'bench', which geneval.reward.detector does not know; "
            "it knows: circle, square,",
        ),
        (["parm.module.feature_layers=[4,8]"], "parm.module.feature_layers=[4, 8] does not go with decoder.module"),
        (["parm.module.grid=16"], "parm.module.grid=16 does not go with the grid of the image tokenizer, which is 8"),
        (["parm.module.decoder_dim=64"], "parm.module.decoder_dim=64 does not go with the width of the decoder"),
        (["experiment=full_decoder"], "data.train gives images of 64x64 pixels, and the image tokenizer reads 256x256"),
        (["decoder=sdxl", "task=evaluate", "geneval=shapes"], "ShapesDetector looks at images of 64x64 pixels"),
        (
            ["experiment=showo_evaluate", "geneval.reward.colors.model=ViT-L/14"],
            "geneval.reward.colors: openai weights need ViT-L-14-quickgelu, not ViT-L/14: they were trained with Quick",
        ),
        (
            ["experiment=showo_evaluate", "geneval.reward.colors.pretrained=laion2b_s32b_b82k"],
            "geneval.reward.colors: laion2b_s32b_b82k weights need ViT-L-14, not ViT-L-14-quickgelu: they were ",
        ),
        (
            ["experiment=janus_evaluate", "decoder.checkpoint=deepseek-ai/Janus-1.3B"],
            "text tokenizer 'deepseek-ai/Janus-1.3B' is of a Janus with template=janus, not janus_pro",
        ),
        (
            ["experiment=llamagen_evaluate", "decoder.checkpoint=peizesun/llamagen_t2i/t2i_XL_stage2_512.pt"],
            "t2i_XL_stage2_512.pt is for images of 512 pixels, but those of tokenizer.module.config.image_size=256",
        ),
        (
            ["experiment=llamagen_evaluate", "decoder=llamagen_512", "decoder.checkpoint=x/t2i_XL_stage1_256.pt"],
            "t2i_XL_stage1_256.pt is for images of 256 pixels, but those of tokenizer.module.config.image_size=512",
        ),
        (
            ["judges=open_clip", "judges.rewards.clip.clip.pretrained=laion2b_s32b_b82k"],
            "judges.rewards.clip.clip: laion2b_s32b_b82k weights need ViT-L-14, not ViT-L-14-quickgelu",
        ),
        (
            [
                "judges=open_clip",
                "judges.rewards.clip.clip._target_=open_clip.create_model",
                "judges.rewards.clip.clip.model_name=RN50",
            ],
            "judges.rewards.clip.clip: openai weights need RN50-quickgelu, not RN50",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused_before_weights_are_asked_for(
    compose_config: Compose, monkeypatch: pytest.MonkeyPatch, overrides: list[str], sentence: str
) -> None:
    monkeypatch.setattr(Published, "is_here", property(lambda weights: pytest.fail(f"{weights} was looked for")))
    config = compose_config(*overrides, "trainer.accelerator=cpu")
    with pytest.raises(ValueError) as refused:
        refuse_settings(config)
        refuse_mismatches(config)
    assert sentence in str(refused.value)


def test_prompts_of_files_name_what_the_detector_knows(compose_config: Compose, tmp_path: Path) -> None:
    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    file = ["geneval=file", f"geneval.test_prompts.path={tmp_path}/prompts.jsonl"]
    with pytest.raises(ValueError, match=r"geneval\.test_prompts: 'a photo of a dog' asks for 'dog', which"):
        refuse_settings(compose_config("task=evaluate", *file, "geneval.test_prompts.class_names=[dog]"))


def test_parts_of_your_own_pass_whatever_they_take(compose_config: Compose, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own_parts.py").write_text(
        "from datamodules.shapes.detector import ShapesDetector\n\nSIDE = 32\n\n\n"
        "class Detector(ShapesDetector):\n    SIDE = 64\n    image_size = SIDE\n\n\n"
        "def detector():\n    return Detector()\n\n\n"
        "class Bare:\n    def __init__(self, module=None, checkpoint=None, **settings):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for overrides in (
        ["geneval.reward.detector._target_=own_parts.Detector"],
        ["geneval.reward.detector._target_=own_parts.detector"],
        ["decoder.module._target_=own_parts.Bare", "decoder.module.transformer=small", "for_parm.decoder_dim=96"],
    ):
        config = compose_config("task=evaluate", "trainer.accelerator=cpu", *overrides)
        refuse_settings(config)
        refuse_mismatches(config)


@pytest.mark.slow
def test_all_missing_weights_are_named_at_once_with_their_size_and_where_they_go(tmp_path: Path) -> None:
    done = command(tmp_path, "experiment=showo_evaluate", check=False, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    first, *lines = done.stderr[done.stderr.index("Error: ") :].splitlines()
    assert first.startswith(
        "Error: weights are missing: there are no folders of these names, and the Hugging Face hub does"
    )
    assert [line.split(":")[0].strip() for line in lines] == [
        "tokenizer.checkpoint",
        "decoder.module.text_tokenizer.checkpoint",
        "decoder.checkpoint",
        "geneval.reward.detector.checkpoint",
        "geneval.reward.colors.pretrained",
        "judges.rewards.vision_language.checkpoint",
    ]
    assert lines[2].endswith(
        "showlab/show-o (*.safetensors or *.bin, 5.8 GB): `hf download showlab/show-o --local-dir FOLDER`, then "
        "decoder.checkpoint=FOLDER"
    )
    assert "then geneval.reward.colors.pretrained=FOLDER/open_clip_model.safetensors" in lines[4]


def _refuse_missing(config: DictConfig) -> None:
    plain: Any = OmegaConf.to_container(config, resolve=True)
    refuse_missing_weights(built_parts(plain), OmegaConf.to_container(config))  # type: ignore[arg-type]


def test_weights_that_several_keys_share_are_named_once(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as missing:
        _refuse_missing(compose_config("experiment=janus_evaluate", "decoder=janus_pro_7b"))
    lines = str(missing.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines if "Janus" in line] == ["decoder.checkpoint"]
    assert any("deepseek-community/Janus-Pro-7B (*.safetensors or *.bin, 14.8 GB)" in line for line in lines)


def test_what_is_there_is_not_missing(compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, file in {"showlab/show-o": "model.safetensors", "microsoft/phi-1_5": "config.json"}.items():
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        for path, text in {"refs/main": "abc", f"snapshots/abc/{file}": ""}.items():
            (repository / path).parent.mkdir(parents=True, exist_ok=True)
            (repository / path).write_text(text)
    tokenizer = tmp_path / "magvit" / "here"
    tokenizer.mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as missing:
        files = [f"data.{split}.path=pairs.jsonl" for split in ("train", "validation")]
        _refuse_missing(compose_config("experiment=showo_dpo", f"tokenizer.checkpoint={tokenizer}", *files))
    named = [line.split(":")[0].strip() for line in str(missing.value).splitlines()[1:]]
    assert named == [
        "decoder.module.text_tokenizer.checkpoint",  # of which only another file is there
        "geneval.reward.detector.checkpoint",
        "geneval.reward.colors.pretrained",
    ]
    show_o = Published("decoder.checkpoint", "showlab/show-o", ("*.safetensors",))
    assert show_o.is_here
    link = tmp_path / "models--showlab--show-o" / "snapshots" / "abc" / "model.safetensors"
    link.unlink()
    link.symlink_to(tmp_path / "blobs" / "gone")
    assert not show_o.is_here


def test_a_chat_template_that_is_no_text_tells_nothing_of_janus(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    check_name(str(tmp_path), {"template": "janus"})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff" + ROLES["janus_pro"][0].encode())
    with pytest.raises(ValueError, match="is of a Janus with template=janus_pro, not janus"):
        check_name(str(tmp_path), {"template": "janus"})


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (SMALL_PARM, "devices=fsdp trains on images (module=decoder) or on pairs from files (module=dpo data=pref"),
        (["experiment=dpo", *SMALL_DPO, *DECODE_NOTHING], "devices=fsdp trains on images (module=decoder) or on pairs"),
        (["experiment=dpo", *(item for item in SMALL_DPO if not item.startswith("data.")), "data=preference_files"],
         "devices=fsdp cannot decode while it trains: add ~callbacks.checkpoint_best ~callbacks.geneval"),
    ],
)  # fmt: skip
def test_what_needs_whole_weights_is_not_sharded(
    compose_config: Compose, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    given = pair_files(tmp_path) if "data=preference_files" in overrides else []
    with pytest.raises(ValueError) as refused:
        refuse_settings(compose_config(*overrides, *given, *SHARDED))
    assert str(refused.value).startswith(sentence)


SHORT = {
    "minutes": ("compute_curve", "shapes_masked_parm", "shapes_flow_parm"),
    "minutes_pairs": ("dpo", "dpo_iterative", "dpo_guided", "shapes_masked_dpo"),
    "minutes_images": (
        "shapes_clip",
        "shapes_decoder",
        "shapes_flow",
        "shapes_flow_parm_start",
        "shapes_masked",
        "shapes_masked_parm_start",
        "shapes_parm_left_right",
        "shapes_parm_start",
        "shapes_tokenizer",
    ),
}


@pytest.mark.parametrize(
    ("preset", "experiment"), [(preset, each) for preset, experiments in SHORT.items() for each in experiments]
)
def test_experiments_of_the_shapes_world_have_a_short_version(
    compose_config: Compose, preset: str, experiment: str
) -> None:
    config = compose_config(f"experiment={experiment}", f"+debug={preset}", "trainer.accelerator=cpu")
    refuse_settings(config)
    assert config.trainer.max_steps == 20


def test_images_that_are_not_compared_need_no_others_of_their_prompt(compose_config: Compose) -> None:
    single = ["data.spec.samples=1", "data.batch_size=8", "trainer.accelerator=cpu"]
    refuse_settings(compose_config("experiment=rejection_sampling", *single))


def test_pairs_of_files_have_a_short_version(compose_config: Compose, tmp_path: Path) -> None:
    overrides = ["experiment=dpo", "data=preference_files", "+debug=minutes_files", *pair_files(tmp_path)]
    config = compose_config(*overrides, "trainer.accelerator=cpu")
    refuse_settings(config)
    assert config.trainer.max_steps == 20


def test_a_checkpoint_that_is_none_is_refused_with_the_settings(compose_config: Compose, tmp_path: Path) -> None:
    (tmp_path / "my.ckpt").write_text("# image-cot\n")
    with pytest.raises(ValueError, match=r"^ckpt_path: .*my\.ckpt is a text that begins with '# image-cot"):
        refuse_settings(compose_config(f"ckpt_path={tmp_path}/my.ckpt", "trainer.accelerator=cpu"))


def test_sizes_are_compared_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((BUNDLED / "shapes_decoder" / "model.safetensors").read_bytes())
    sizes: list[Any] = ["large", None, [1], {"_target_": "my_package.Sizes", "checkpointing": True}]
    for stored in sizes:
        export = {"module": {"_target_": "my_package.Mine", "transformer": stored}}
        (tmp_path / "config.json").write_text(json.dumps(export))
        for here in ("large", {"_target_": "my_package.Others", "dim": 8}):
            network = {"_target_": "my_package.Mine", "transformer": here}
            node = {"_target_": LOADER, "checkpoint": str(tmp_path), "module": network}
            config: Any = {"task": "evaluate", "module": {"decoder": node}}
            refuse_unfit_weights(config, config)


def test_an_exported_decoder_holds_none_of_the_parts_that_were_taken_from_its_checkpoint(
    compose_config: Compose, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes((BUNDLED / "shapes_decoder" / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(
        json.dumps({"module": {"_target_": "lightning_modules.backbone.janus.Janus"}})
    )
    overrides = ["experiment=janus_evaluate", f"decoder.checkpoint={tmp_path}", "trainer.accelerator=cpu"]
    said = r"holds the weights of a Janus, not of a VQ16; tokenizer\.checkpoint is taken from there: name its own$"
    with pytest.raises(ValueError, match=rf"^decoder\.checkpoint: .*{said}"):
        refuse_settings(compose_config(*overrides))
    said = r"no tokenizer\.json in .*; decoder\.module\.text_tokenizer\.checkpoint is taken from there: name its own$"
    with pytest.raises(FileNotFoundError, match=said):
        refuse_settings(compose_config(*overrides, "tokenizer.checkpoint=null"))
