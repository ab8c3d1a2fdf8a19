"""The templates of Janus's prompts, and which of them a checkpoint was trained with; torch is not imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_modules.broken_files import read_settings

Template = Literal["janus_pro", "janus"]

ROLES: dict[Template, tuple[str, str]] = {"janus_pro": ("<|User|>", "<|Assistant|>"), "janus": ("User", "Assistant")}
_NAMES: dict[str, Template] = {"janus-pro": "janus_pro", "janus-1.3b": "janus"}  # parts of checkpoints' names
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "processor_config.json")  # of transformers' layout


def check_name(checkpoint: str, config: Mapping[str, Any], image_size: int | None = None) -> None:
    """Raise ValueError if a checkpoint, by its name or its chat template, is of a Janus with another template."""
    if (known := _known_template(checkpoint)) not in (None, template := config.get("template", "janus_pro")):
        raise ValueError(f"text tokenizer {checkpoint!r} is of a Janus with template={known}, not {template}")


def _known_template(checkpoint: str) -> Template | None:
    """The template of a checkpoint, as far as its name or its chat template tells."""
    for part, template in _NAMES.items():
        if part in Path(checkpoint).name.lower():
            return template
    for path in (Path(checkpoint) / name for name in _CHAT_TEMPLATES):
        if path.is_file():
            content = (
                path.read_text("utf-8", "replace")
                if path.suffix == ".jinja"
                else str(read_settings(path).get("chat_template"))
            )
            if known := [template for template, (user, _) in ROLES.items() if user in content]:
                return known[0]  # Pro's role has the other's in it
    return None
