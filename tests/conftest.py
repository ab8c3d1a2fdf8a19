"""What all tests share: a tiny decoder and PARM, the project's config, the order of tests."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("WANDB_DATA_DIR", None)  # each run chooses its own

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

import lightning_modules.runs.checkpoints  # noqa: F401  (registers resolvers of the config)
from datamodules.shapes.prompts import shapes_prompts
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.rewards.parm import PARM
from tests.helpers.models import make_decoder, make_parm
from tests.helpers.overrides import ROOT

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, so that no process is left with one of them at the end."""

    def seconds(item: pytest.Item) -> int:
        slow = item.get_closest_marker("slow")
        return slow.kwargs.get("seconds", 5) if slow else 0

    items.sort(key=seconds, reverse=True)


@pytest.fixture(scope="session")
def decoder() -> CompactDecoder:
    return make_decoder()


@pytest.fixture(scope="session")
def parm(decoder: CompactDecoder) -> PARM:
    return make_parm(decoder)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Twelve prompts, two of each task."""
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

    def compose_(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("train", [f"scores_dir={tmp_path}/scores", *overrides], return_hydra_config=True)
        config.hydra.runtime.output_dir = str(tmp_path)
        HydraConfig.instance().set_config(config)  # resolves ${hydra:...}
        with open_dict(config):
            del config.hydra
        return config

    return compose_
