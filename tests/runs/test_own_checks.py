"""What classes refuse is known from their source, without importing them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from lightning_modules.runs.own_checks import refuse_by_own_checks
from lightning_modules.runs.preflight import built_parts
from tests.helpers.overrides import ROOT

Compose = Callable[..., DictConfig]
SCORE, GENERATE = ["task=score", "images={folder}/nowhere"], ["task=generate", "images={folder}/new"]
PAIRS = ["experiment=dpo", "data=preference_files"]


def check(config: DictConfig) -> None:
    plain: Any = OmegaConf.to_container(config, resolve=True)
    unresolved: Any = OmegaConf.to_container(config)
    refuse_by_own_checks(built_parts(plain), unresolved, "" if config.task == "score" else "judges")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (SCORE, "images: there is no folder {folder}/nowhere (in scoring)"),
        (["task=score", "images={folder}"], "images: {folder} has no folders 00000, 00001, ... with"),
        ([*GENERATE, "generating.strategy=nope"], "generating.strategy is 'nope'; there are: sample, "),
        ([*GENERATE, "geneval.test_prompts.per_task=0"], "per_task must be at least 1, not 0 (single_object) (in"),
        (["sampling.temperature=0"], "sampling.temperature must be above 0, not 0 (in sampling)"),
        (["strategies.verified.k=0"], "verified decoding needs k of at least 1, not 0 (in strategies.verified)"),
        (["module.objective.finished=2"], "finished must lie in [0, 1], not 2 (in module.objective)"),
        (["decoder.checkpoint={folder}/nowhere"], "checkpoint '{folder}/nowhere': no model.safetensors in"),
        (["geneval=file", "geneval.test_prompts.path={folder}/x.jsonl"], "{folder}/x.jsonl: there is no such file of"),
        ([*PAIRS, "data.train.path={folder}/x.jsonl", "data.validation.path={folder}/x.jsonl"],
         "there is no preference file or folder {folder}/x.jsonl (in data.train)"),
        (["callbacks.geneval.monitor=nope"], "callbacks.geneval.monitor names the strategy 'nope'; there are: sample,"),
        (["evaluator.images_per_prompt=0"], "evaluator.images_per_prompt must be at least 1, not 0 (in evaluator)"),
        (["+strategy@strategies.side_by_side=sample"], "strategies.side_by_side: this is what the sheet of all is"),
        ([f"+strategy@strategies.{'a' * 240}=sample"], f"strategies: '{'a' * 240}' cannot be the name of a file"),
        (["geneval.reward.self_test.folder={folder}"], "geneval.reward.self_test.folder: there is no {folder}/picture"),
    ],
)  # fmt: skip
def test_the_checks_of_classes_run_from_their_source(
    compose_config: Compose, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ValueError) as refused:
        check(compose_config(*(item.format(folder=tmp_path) for item in overrides)))
    assert str(refused.value).startswith(said.format(folder=tmp_path))


@pytest.mark.parametrize("overrides", [[], ["experiment=dpo_guided"], ["experiment=showo_evaluate"], GENERATE])
def test_what_is_right_is_not_refused(compose_config: Compose, tmp_path: Path, overrides: list[str]) -> None:
    check(compose_config(*(item.format(folder=tmp_path) for item in overrides)))


def test_what_source_does_not_tell_refuses_nothing() -> None:
    untold = {
        "decoder.Text": {"_target_": "lightning_modules.backbone.text.PublishedTokenizer", "checkpoint": "owner/name"},
        "others": {"_target_": "torch.optim.AdamW", "lr": -1},
        "nowhere": {"_target_": "datamodules.nowhere.Nothing"},
        "wrong": {"_target_": "lightning_modules.backbone.sampling.Sampling", "nothing": 1},
    }
    refuse_by_own_checks(untold, untold)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom lightning_modules.runs.own_checks import refuse_by_own_checks\n"
        "node = {'_target_': 'lightning_modules.decoding.verified.Verified', 'sampling': None, 'k': 0}\n"
        "try:\n    refuse_by_own_checks({'a': node}, {})\nexcept ValueError as error:\n    print(error)\n"
        "print({'torch', 'numpy', 'lightning'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["verified decoding needs k of at least 1, not 0 (in a)", "set()"]
