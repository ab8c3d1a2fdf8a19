"""Which weights go with which architecture of open_clip, told from their names; torch is not imported."""

from difflib import get_close_matches
from pathlib import Path

from lightning_modules.backbone.open_clip_names import architecture, architectures, split_name, tags_of, weights_of
from lightning_modules.backbone.published import published_clip

_OPENAI = ("ViT-L-14-quickgelu", "openai")
_QUICK = "-quickgelu"


def refuse_other_network(key: str, model_name: str, pretrained: str | None, require_pretrained: bool = False) -> None:
    """Refuse weights that were made for another architecture. Files and weights with a config pass; none are loaded.

    Raises:
        FileNotFoundError: `pretrained` is neither a file nor a tag of open_clip.
        ValueError: there is no such architecture, the weights were trained with another activation, or none are named.
    """
    place, name = split_name(model_name)
    if place == "local-dir" and not Path(name).is_dir():
        raise FileNotFoundError(f"{key}: there is no folder {name}")
    if place:
        return
    sizes = architecture(name)
    if sizes is None:
        close = ", ".join(get_close_matches(name, architectures())) or "open_clip.list_models() has all"
        raise ValueError(f"{key}: open_clip has no model {model_name!r}; close to it: {close}")
    if not pretrained:
        if require_pretrained:
            tags = ", ".join(tags_of(name))
            raise ValueError(f"{key}.pretrained is null, which leaves the weights random: name a file or one of {tags}")
        return
    twin = name.removesuffix(_QUICK) if name.endswith(_QUICK) else name + _QUICK
    weights = weights_of(name, pretrained) or weights_of(twin, pretrained)
    if not weights and not Path(pretrained).is_file():
        tags = ", ".join(tags_of(name))
        raise FileNotFoundError(
            f"{key}: {pretrained!r} is neither a file nor weights of {model_name} that open_clip knows ({tags}); "
            f"where there is network {how_to_download(key, model_name, pretrained)}"
        )
    quick = weights.get("quick_gelu", False)
    # An architecture without a twin is the one that its weights were trained with, even if their entry does not say so.
    if weights and quick != sizes.get("quick_gelu", False) and architecture(twin):
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
