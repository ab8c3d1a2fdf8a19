"""Loading open_clip models: never with weights of another activation, which open_clip loads with a mere warning."""

from pathlib import Path
from pickle import UnpicklingError

import open_clip
from safetensors import SafetensorError
from torch import nn

from lightning_modules.backbone.open_clip_names import split_name
from lightning_modules.rewards.open_clip_weights import how_to_download, refuse_other_network

# What open_clip raises for weights that are not there, are broken or fit another architecture.
_FAILURES = (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError, SafetensorError, UnpicklingError)


def load_clip(
    model_name: str,
    pretrained: str | None = None,
    require_pretrained: bool = True,
    key: str = "judges.rewards.clip.clip",
) -> nn.Module:
    """The open_clip model of a name with its weights.

    Args:
        model_name: an architecture (`ViT-L-14-quickgelu`); or `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        pretrained: open_clip's tag of weights for the architecture, or their file; None with a folder.
        require_pretrained: refuse to leave the weights random.
        key: of the config, which errors name.

    Raises:
        FileNotFoundError: the weights are not to be had.
        ValueError: there is no such architecture, or the weights are those of another one.
    """
    refuse_other_network(key, model_name, pretrained, require_pretrained)
    try:
        return open_clip.create_model(model_name, pretrained, require_pretrained=require_pretrained)
    except _FAILURES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        if pretrained and not split_name(model_name)[0] and Path(pretrained).is_file():
            raise ValueError(f"{key}.pretrained: {pretrained} has no weights of {model_name} ({reason})") from error
        advice = how_to_download(key, model_name, pretrained)
        raise FileNotFoundError(f"{key}: {reason}; where there is network {advice}") from error
