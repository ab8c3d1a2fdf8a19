"""What all tests share: a tiny decoder and PARM, the project's config, the order of tests."""

import gc
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("WANDB_DATA_DIR", None)  # each run chooses its own

import pytest
from omegaconf import DictConfig, open_dict

if TYPE_CHECKING:  # to import these takes seconds, and the process that hands out tests needs none of them
    from lightning_modules.backbone.compact import CompactDecoder
    from lightning_modules.rewards.parm import PARM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, so that no process is left with one of them at the end."""

    def seconds(item: pytest.Item) -> int:
        slow = item.get_closest_marker("slow")
        return slow.kwargs.get("seconds", 5) if slow else 0

    items.sort(key=seconds, reverse=True)


def pytest_collection() -> None:
    gc.disable()  # what is imported stays


def pytest_collection_finish() -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # or each collection of garbage would go through all that is imported
    gc.enable()


@pytest.fixture(scope="session")
def decoder() -> "CompactDecoder":
    from tests.helpers.models import make_decoder

    return make_decoder()


@pytest.fixture(scope="session")
def parm(decoder: "CompactDecoder") -> "PARM":
    from tests.helpers.models import make_parm

    return make_parm(decoder)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Twelve prompts, two of each task."""
    from datamodules.shapes.prompts import shapes_prompts

    return shapes_prompts("train", 2)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """A function that has this process write files of so many bytes at most, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def compose_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose the project's config with overrides; what runs leave goes to a temporary folder."""

    from hydra.core.hydra_config import HydraConfig

    from tests.helpers.configs import composed

    def compose_(*overrides: str) -> DictConfig:
        config = composed(f"scores_dir={tmp_path}/scores", *overrides)
        config.hydra.runtime.output_dir = str(tmp_path)
        HydraConfig.instance().set_config(config)  # resolves ${hydra:...}
        with open_dict(config):
            del config.hydra
        return config

    return compose_
