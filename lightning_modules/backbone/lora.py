"""Low-rank adapters (LoRA, arXiv 2106.09685), to align decoders that are too large to be trained whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass(frozen=True)
class LoRA:
    """Adapters beside some linear layers; all else is frozen."""

    rank: int = 16
    alpha: float = 32.0  # their output is scaled by alpha / rank
    targets: Sequence[str] = ("qkv", "proj", "mlp.0", "mlp.2")  # ends of the names of linear layers, in all blocks

    def inject(self, module: nn.Module) -> None:
        """Put adapters into a module, in place; raises ValueError if it has no such layer."""
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets))  # type: ignore[arg-type]
        inject_adapter_in_model(config, module)

    def is_adapter(self, key: str) -> bool:
        """Return whether a key of the state dict belongs to an adapter."""
        return ".lora_" in key

    @contextmanager
    def switched_off(self, module: nn.Module) -> Iterator[None]:
        """Compute as without the adapters, for a time."""
        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def merge(self, module: nn.Module) -> None:
        """Add the adapters to the layers that they stand beside and remove them, in place."""
        for name, layer in list(module.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                module.set_submodule(name, layer.get_base_layer())
