"""Networks that are shared as folders, on the Hugging Face hub or elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelHubMixin
from hydra.utils import get_object, instantiate
from torch import nn

from lightning_modules.backbone.checkpoint_folder import from_hub
from lightning_modules.backbone.loading import export, pretrained
from lightning_modules.broken_files import read_settings

_OWN = ("lightning_modules.", "datamodules.")  # all that somebody else's config may name
_DOWNLOAD = ("revision", "cache_dir", "token", "force_download", "local_files_only")


class HubMixin(ModelHubMixin, library_name="image-cot"):
    """A network with `from_pretrained`, `save_pretrained` and `push_to_hub`, on the folders that `export` writes.

    `config.json` holds the config node of the network, which builds it and names the weights of its frozen parts.
    """

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        """Build the network that the config describes and load its weights, for evaluation.

        Raises:
            FileNotFoundError: there are no weights.
            ValueError: a tensor does not fit, or the config is not one that `task=export` writes for such a network.
        """
        folder = Path(model_id)
        if not folder.is_dir():
            folder = from_hub(model_id, ["*.safetensors", "*.json"], **{name: options[name] for name in _DOWNLOAD})
        stored = folder / "config.json"
        config = read_settings(stored) if stored.is_file() else {}
        if "module" not in config:
            raise ValueError(f"{model_id} has no config.json as task=export writes it")
        _refuse_foreign(config, model_id)
        network = instantiate(config["module"], _convert_="all")
        if not isinstance(network, cls):
            raise ValueError(f"{model_id} is a {type(network).__name__}, not a {cls.__name__}")
        network._hub_mixin_config = config
        assert isinstance(network, nn.Module)
        return pretrained(network, str(folder)).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        config = self._hub_mixin_config
        if not isinstance(config, dict) or "module" not in config:
            raise ValueError(f"this {type(self).__name__} does not know its config: task=export writes it")
        assert isinstance(self, nn.Module)
        export(self, save_directory, config)


def _refuse_foreign(node: Any, model: str) -> None:
    """Raise ValueError if a config would call, or look up, anything that is not this package's own."""
    if isinstance(node, Mapping) and (target := node.get("_target_")):
        known = str(target).startswith(_OWN) and getattr(get_object(target), "__module__", "").startswith(_OWN)
        if not known:
            raise ValueError(f"{model}: config.json names {target}, which is no part of this package")
    if isinstance(node, Mapping | list):
        for value in node.values() if isinstance(node, Mapping) else node:
            _refuse_foreign(value, model)
    elif isinstance(node, str) and "${" in node:
        raise ValueError(f"{model}: config.json holds {node!r}, which is not resolved")
