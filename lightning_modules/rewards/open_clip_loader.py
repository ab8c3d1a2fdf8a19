"""Loading open_clip models: never with weights of another activation, which open_clip loads with a mere warning."""

from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError

import open_clip
from open_clip.factory import parse_model_name
from safetensors import SafetensorError
from torch import nn

from lightning_modules.backbone.published import published_clip

_OPENAI = ("ViT-L-14-quickgelu", "openai")
_QUICK = "-quickgelu"
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
    refuse_other_network(key, model_name, pretrained)
    try:
        return open_clip.create_model(model_name, pretrained, require_pretrained=require_pretrained)
    except _FAILURES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        if pretrained and parse_model_name(model_name)[0] is None and Path(pretrained).is_file():
            raise ValueError(f"{key}.pretrained: {pretrained} has no weights of {model_name} ({reason})") from error
        advice = how_to_download(key, model_name, pretrained)
        raise FileNotFoundError(f"{key}: {reason}; where there is network {advice}") from error


def refuse_other_network(key: str, model_name: str, pretrained: str | None) -> None:
    """Refuse weights that were made for another architecture. Files and weights with a config pass; none are loaded.

    Raises:
        FileNotFoundError: `pretrained` is neither a file nor a tag of open_clip.
        ValueError: there is no such architecture, or the weights were trained with another activation.
    """
    if parse_model_name(model_name)[0]:
        return
    name = model_name.replace("/", "-")  # as open_clip does
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        close = ", ".join(get_close_matches(name, open_clip.list_models())) or "open_clip.list_models() has all"
        raise ValueError(f"{key}: open_clip has no model {model_name!r}; close to it: {close}")
    if not pretrained:
        return
    twin = name.removesuffix(_QUICK) if name.endswith(_QUICK) else name + _QUICK
    weights = open_clip.get_pretrained_cfg(name, pretrained) or open_clip.get_pretrained_cfg(twin, pretrained)
    if not weights and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise FileNotFoundError(
            f"{key}: {pretrained!r} is neither a file nor weights of {model_name} that open_clip knows ({tags}); "
            f"where there is network {how_to_download(key, model_name, pretrained)}"
        )
    quick = weights.get("quick_gelu", False)
    # An architecture without a twin is the one that its weights were trained with, even if their entry does not say so.
    if weights and quick != architecture.get("quick_gelu", False) and open_clip.get_model_config(twin):
        trained = f"they were trained {'with' if quick else 'without'} QuickGELU"
        raise ValueError(f"{key}: {pretrained} weights need {twin}, not {model_name}: {trained}")


def how_to_download(key: str, model_name: str, pretrained: str | None) -> str:
    """The command and setting that bring weights; for those that open_clip does not know, OpenAI's ViT-L/14."""
    known = published_clip(key, model_name, pretrained) if pretrained else None
    weights = known or published_clip(key, *_OPENAI)
    assert weights is not None
    with_model = "" if known or model_name == _OPENAI[0] else f" and its model to {_OPENAI[0]}"
    return (
        f"run `hf download {weights.name} --include '{weights.only}' --local-dir CLIP`, then set "
        f"{key}.pretrained to the file of weights in CLIP{with_model}"
    )
