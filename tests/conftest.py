"""A tiny real decoder and PARM with random weights, and the project's config, for all tests."""

import json
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

import lightning_modules.runs.checkpoints  # noqa: F401  (registers resolvers of the config)
from datamodules.shapes.prompts import shapes_prompts, vocabulary
from lightning_modules.backbone.evidence import Evidence
from lightning_modules.backbone.image_tokenizer import PatchVQ
from lightning_modules.backbone.mask_likelihood import MaskEstimate
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.next_token import NextTokenDecoder
from lightning_modules.backbone.showo import ShowO
from lightning_modules.backbone.text import WordTokenizer, word_spans
from lightning_modules.backbone.transformer import TransformerConfig
from lightning_modules.rewards.parm import PARM, Features

ROOT = Path(__file__).parent.parent
SHOWO = ROOT / "tests" / "golden" / "showo"
SHOWO_CONFIG = json.loads((SHOWO / "config.json").read_text())
# Overrides that make any experiment of the shapes world small enough for a test.
TINY = [
    "tokenizer.module.width=16",
    "tokenizer.checkpoint=null",
    "decoder.checkpoint=null",
    "decoder.module.transformer.dim=32",
    "decoder.module.transformer.depth=2",
    "decoder.module.evidence_depths=[1,2]",
    "parm.checkpoint=null",
    "parm.module.transformer.dim=32",
    "parm.module.transformer.depth=1",
    "clip.checkpoint=null",
]

EVIDENCE = [name for name in Evidence.__dataclass_fields__ if name != "undecided"]

torch.set_num_threads(1)


class Numbers:
    """Prompts that are written as their text ids."""

    size = SHOWO_CONFIG["showo"]["llm_vocab_size"]
    end_of_text = SHOWO_CONFIG["special_ids"]["<|eot|>"]

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in prompt.split()] for prompt in prompts]

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        return word_spans(prompt)


def make_showo(**sizes: Any) -> ShowO:
    """An untrained Show-o of the golden one's sizes, without an image tokenizer."""
    tokenizer: Any = torch.nn.Module()
    tokenizer.codebook_size, tokenizer.num_tokens = (
        SHOWO_CONFIG["showo"]["codebook_size"],
        SHOWO_CONFIG["showo"]["num_vq_tokens"],
    )
    phi = SHOWO_CONFIG["phi"]
    golden = {
        "max_text": SHOWO_CONFIG["max_text_len"],
        "dim": phi["hidden_size"],
        "depth": phi["num_hidden_layers"],
        "heads": phi["num_attention_heads"],
        "mlp_dim": phi["intermediate_size"],
        "rotary_share": phi["partial_rotary_factor"],
    }
    return ShowO(tokenizer, Numbers(), **golden | sizes).eval()


def make_decoder(grid: int = 4, depth: int = 3) -> NextTokenDecoder:
    """A decoder of 16 tokens an image with sharpened random weights, so that distributions are far from uniform."""
    torch.manual_seed(0)
    tokenizer = PatchVQ(codebook_size=32, grid=grid, image_size=64, width=16, blocks=1)
    torch.nn.init.uniform_(tokenizer.codebook)
    transformer = TransformerConfig(dim=32, depth=depth, heads=4)
    decoder = NextTokenDecoder(tokenizer, vocabulary(), 12, transformer, text_depth=1, evidence_depths=[1, depth])
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.ndim > 1 and name != "code_proj.weight":
                weight.mul_(5)
    return decoder.eval()


def make_masked(estimate: MaskEstimate | None = None) -> MaskTokenDecoder:
    """The same for a mask-token decoder."""
    torch.manual_seed(0)
    tokenizer = PatchVQ(codebook_size=32, grid=4, image_size=64, width=16, blocks=1)
    torch.nn.init.uniform_(tokenizer.codebook)
    transformer = TransformerConfig(dim=32, depth=3, heads=4, parallel=True, qk_norm=True, gelu="tanh")
    text = WordTokenizer(vocabulary(), 12)
    decoder = MaskTokenDecoder(tokenizer, text, 14, transformer, 4, evidence_depths=[1, 3], estimate=estimate)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
    return decoder.eval()


def make_parm(decoder: NextTokenDecoder | MaskTokenDecoder, features: Features = "hidden") -> PARM:
    """A PARM for one of these decoders, random weights."""
    torch.manual_seed(1)
    parm = PARM(
        TransformerConfig(dim=32, depth=2, heads=4),
        grid=decoder.image_tokenizer.grid,
        decoder_dim=decoder.dim,
        evidence_depths=decoder.evidence_depths,
        features=features,
        causal=isinstance(decoder, NextTokenDecoder),
    )
    with torch.no_grad():
        for weight in parm.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
        if features == "hidden":
            parm.statistics_head.weight.normal_(std=0.1)
    return parm.eval()


@pytest.fixture(scope="session")
def decoder() -> NextTokenDecoder:
    return make_decoder()


@pytest.fixture(scope="session")
def parm(decoder: NextTokenDecoder) -> PARM:
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
