"""Published weights that a config names by OWNER/NAME: those missing on this machine, their sizes and their places."""

import os.path
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.backbone.checkpoint_folder import from_hub, on_hub
from lightning_modules.backbone.open_clip_names import weights_of

# Patterns of the files that `checkpoint` names, one of which has to be there, by the target that loads them.
LOADERS = {
    "lightning_modules.backbone.loading.pretrained": ("*.safetensors", "*.bin"),
    "lightning_modules.backbone.text.PublishedTokenizer": ("tokenizer.json",),
    "lightning_modules.backbone.janus_text.JanusTokenizer": ("tokenizer.json",),
    "lightning_modules.backbone.t5.T5Text": ("*.safetensors",),
    "lightning_modules.backbone.diffusion.DiffusionDecoder": ("*/*.safetensors",),
    "lightning_modules.backbone.pipelines.decoder.PipelineDecoder": ("*/*.safetensors",),
    "lightning_modules.rewards.mask2former.Mask2FormerDetector": ("*.safetensors", "*.bin"),
    "lightning_modules.rewards.vision_language.VisionLanguageJudge": ("*.safetensors",),
}
_CLIP_LOADERS = {  # the argument that names the architecture
    "lightning_modules.rewards.color.CLIPColors": "model",
    "lightning_modules.rewards.open_clip_loader.load_clip": "model_name",
    "open_clip.create_model": "model_name",
    "open_clip.get_tokenizer": "model_name",
}
# Pattern of the files to download, where a repository has many others.
_ONLY = {
    "lightning_modules.backbone.text.PublishedTokenizer": "tokenizer.json",
    "lightning_modules.backbone.t5.T5Text": "*.[js]*",  # .json and .safetensors
}
# Sizes of the downloads, for those who cannot ask the hub.
_SIZES = {
    "showlab/show-o": "5.8 GB",
    "showlab/magvitv2": "0.4 GB",
    "microsoft/phi-1_5": "2 MB",
    "deepseek-community/Janus-Pro-1B": "4.2 GB",
    "deepseek-community/Janus-Pro-7B": "14.8 GB",
    "peizesun/llamagen_t2i/t2i_XL_stage1_256.pt": "3.1 GB",
    "peizesun/llamagen_t2i/t2i_XL_stage2_512.pt": "3.1 GB",
    "peizesun/llamagen_t2i/vq_ds16_t2i.pt": "0.3 GB",
    "google/flan-t5-xl": "11.4 GB",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "16 GB",
    "facebook/mask2former-swin-small-coco-instance": "0.3 GB",
    "timm/vit_large_patch14_clip_224.openai": "1.7 GB",
    "stabilityai/stable-diffusion-3-medium-diffusers": "16 GB",
    "stabilityai/stable-diffusion-xl-base-1.0": "7 GB",
    "black-forest-labs/FLUX.1-dev": "34 GB",
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": "10 GB",
    "Qwen/Qwen-Image": "58 GB",
}


@dataclass(frozen=True)
class Published:
    """Weights on the Hugging Face hub."""

    key: str  # of the config; it can name a folder (or for open_clip a file) instead
    name: str  # OWNER/NAME
    files: tuple[str, ...]  # patterns; if the weights are there, one of them has files
    only: str = ""  # pattern of the files to download; empty for the whole repository
    file: str = ""  # of the folder, to be named by the key; empty for the folder itself

    @property
    def is_here(self) -> bool:
        """The files are in the hub's cache on this machine."""
        try:
            folder = from_hub(self.name, self.files, local_files_only=True)
        except FileNotFoundError:
            return False
        return any(path.is_file() for pattern in self.files for path in folder.glob(pattern))  # links may dangle

    def __str__(self) -> str:
        if (parent := Path(self.name).parent).is_dir():
            return f"{self.key}: there is no {Path(self.name).name} in the folder {parent}"
        known = _SIZES.get(self.name + self.file, _SIZES.get(self.name))
        size = f", {known}" if known else ""
        only = f" --include '{self.only}'" if self.only else ""
        return (
            f"{self.key}: {self.name} ({self.only or ' or '.join(self.files)}{size}): "
            f"`hf download {self.name}{only} --local-dir FOLDER`, then {self.key}=FOLDER{self.file}"
        )


def nodes(config: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The nodes of a resolved config that are built into objects, with their keys; inner ones first."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for name, value in items:
        yield from nodes(value, f"{key}.{name}" if key else str(name))
    if isinstance(config, Mapping) and isinstance(config.get("_target_"), str):
        yield key, config


def named(config: Mapping[str, Any]) -> Iterator[Published]:
    """The published weights that a resolved config names, where it names no folder or file."""
    for key, node in nodes(config):
        target = node["_target_"]
        if files := LOADERS.get(target):
            checkpoint = node.get("checkpoint")
            if not isinstance(checkpoint, str) or not (found := on_hub(checkpoint)):
                continue
            name, file = found
            if file:
                yield Published(f"{key}.checkpoint", name, (file,), file, f"/{file}")
            else:
                yield Published(f"{key}.checkpoint", name, files, _ONLY.get(target, ""))
        elif clip := clip_named(node):
            model, tag = clip
            if tag and (weights := published_clip(f"{key}.pretrained", model, tag)):
                yield weights


def clip_named(node: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Architecture, and tag or file of weights, of a node that is built by loading an open_clip model."""
    model, weights = node.get(_CLIP_LOADERS.get(node["_target_"], "")), node.get("pretrained")
    return (model, weights if isinstance(weights, str) else None) if isinstance(model, str) else None


def published_clip(key: str, model: str, tag: str) -> Published | None:
    """The weights that open_clip has under a tag for an architecture; None if it has none."""
    place = weights_of(model, tag).get("hf_hub")
    if not place:
        return None
    name, file = os.path.split(place)
    files = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return Published(key, name, files, file or "open_clip_*", f"/{files[0]}")


def refuse_missing(weights: list[Published]) -> None:
    """Raise FileNotFoundError for weights that are neither on this machine nor to be had, all of them at once.

    Weights that several keys name are named by the shortest, from which the others take them.
    """
    absent = [each for each in weights if not each.is_here]
    if not absent:
        return
    from huggingface_hub import HfApi  # takes as long as all other checks
    from huggingface_hub.errors import HfHubHTTPError

    missing: list[Published] = []
    reason, reachable = "", True
    for each in absent:
        try:
            if reachable:
                HfApi().model_info(each.name, timeout=10)
                continue
        except Exception as error:  # without network, of a class that differs by the version of the hub's client
            reason, reachable = type(error).__name__, isinstance(error, HfHubHTTPError)
        missing.append(each)
    shortest = {(each.name, each.file): each for each in sorted(missing, key=lambda each: -len(each.key))}
    if missing:
        listed = "\n".join(f"  {each}" for each in missing if shortest[each.name, each.file] is each)
        message = (
            "weights are missing: there are no folders of these names, and the Hugging Face hub does not give them "
            f"({reason}); where there is network"
        )
        raise FileNotFoundError(f"{message}:\n{listed}")
