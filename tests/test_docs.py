"""The documentation is true: links lead somewhere, commands compose to configs that a run accepts, code runs."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning import Trainer
from omegaconf import DictConfig
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.runs import checkpoint_to_resume
from datamodules.prompt_templates import clause, make_row
from lightning_modules.files import PROVENANCE
from lightning_modules.runs.mismatches import refuse_mismatches
from lightning_modules.runs.preflight import refuse_settings
from tests.helpers.models import make_decoder
from tests.helpers.overrides import ROOT
from tests.helpers.pictures import write_folder

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# What commands have in the place of something of the reader's own, and what stands for it here.
PLACEHOLDERS = {
    "outputs/parm/<time>": "run",
    "outputs/parm/TIME": "run",
    "outputs/shapes_parm_start/TIME": "run",
    "outputs/shapes_parm_left_right/TIME": "run",
    "$RUN": "run",
    "=...": "=anything",
    "=DIR": "=folder",
    "=FILE": "=file.jsonl",
    "=N": "=2",
    "OWNER/NAME": "owner/name",
}
# Files that commands name, as the page on own data has them.
STAR = {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"}
PAIR = {"prompt": "a photo of a star", "chosen": "a.png", "rejected": "b.png"}
FOUND = {"filename": "00000/samples/0000.png", "detections": []}
REFERENCES = 5000  # that a page compares with
PHOTO = {"image": "dog.png", "prompt": "a photo of a dog"}
FOLDERS = ("folder", "my_images", "my_photographs", "photos", "references")
FILES = {"prompts.jsonl": STAR, "pairs.jsonl": PAIR, "more.jsonl": PAIR, "file.jsonl": STAR, "detections.jsonl": FOUND,
         "photos/train.jsonl": PHOTO, "photos/validation.jsonl": PHOTO}  # fmt: skip
CHECKPOINT = {"state_dict": {}, "global_step": 1, "pytorch-lightning_version": "2", "callbacks": {}, "loops": {},
              "optimizer_states": [], "lr_schedulers": []}  # fmt: skip
CHECKPOINTS = ("anything", "run/checkpoints/last.ckpt", "run/checkpoints/step-700.ckpt")
# The modules in which pages say that their Python goes.
MODULES = {"adding.md": ["strategies", "judges", "decoders", "smoothed"], "own-data.md": ["photos"]}
# Instead of the programs that commands begin with; writes down what train.py would be given.
SHELL = r"""
python() { [ "$1" = train.py ] || return 0; shift; [ $# = 0 ] || printf '%s\0' "$@"; printf '\n'; }
torchrun() { while [ "$1" != train.py ]; do shift; done; python "$@"; }
srun() { "$@"; }
pip() { :; }
while IFS= read -r -d '' line; do (eval "$line"); printf '\1%d\2' $?; done
"""


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, languages: str) -> list[str]:
    """The blocks on a page that are marked as one of some languages, a pattern."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", text(page), re.M | re.S)


def prose(page: Path) -> str:
    """A page without these blocks."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.M | re.S)


def code(page: Path) -> dict[str, Any]:
    """What a page's Python defines, run from top to bottom."""
    names: dict[str, Any] = {"__name__": page.name}
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), names)
    return names


def anchors(page: Path) -> list[str]:
    """The names of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        before = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{before}" if before else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    plain = re.sub(r"`[^`\n]*`|<!--.*?-->", "", prose(page), flags=re.S)
    for target in [*re.findall(r"\]\(([^)\s]+)", plain), *re.findall(r'(?:src|href|srcset)="([^"\s]+)', plain)]:
        path, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{target} is not there"
            assert not anchor or anchor in anchors(there), f"{target} is none of {anchors(there)}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=name)
def test_pages_begin_with_what_they_are_for(page: Path) -> None:
    title, blank, first = text(page).splitlines()[:3]
    assert title.startswith("# ") and not blank and first[:1].isalpha()


def typed(page: Path) -> Iterator[str]:
    """The commands of a page that run train.py, as they are typed: in blocks, indented, and within sentences."""
    parts = [*blocks(page, "bash"), *re.findall(r"^    (.+)$", prose(page), re.M)]
    parts += [part.replace("\n", " ") for part in re.findall(r"`([^`]+)`", prose(page))]
    parts += re.findall(r"^# \S+\.yaml: (.+)$", "\n".join(blocks(page, "yaml")), re.M)
    for line in re.sub(r"\\\n *", "", "\n".join(parts)).splitlines():
        if re.search(r"\b(python|torchrun .*) train\.py\b(?! \.\.\.)", line):
            yield line


@cache
def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page, each with the arguments that a shell gives to train.py."""
    lines = [*typed(page)]
    given = "".join(f"{line}\0" for line in lines)
    for placeholder, own in PLACEHOLDERS.items():
        given = given.replace(placeholder, own)
    bash = shutil.which("bash")
    assert bash
    # Nothing but the functions can be run, and no pattern of files fits anything.
    done = subprocess.run([bash, "-fc", SHELL], input=given, env={"PATH": ""}, capture_output=True, text=True)
    found = []
    for line, result in zip(lines, done.stdout.split("\2"), strict=False):
        said, _, code = result.partition("\1")
        assert code == "0" and said, f"a shell cannot run {line}: {done.stderr}"
        found += [(line, each.split("\0")[:-1]) for each in said.splitlines()]
    return found


def first_job(arguments: list[str]) -> list[str]:
    """The overrides of a command line, of several jobs those of the first."""
    options, rest = get_args_parser().parse_known_args(arguments)
    assert not rest, f"{rest} is no option"
    overrides = OverridesParser.create().parse_overrides(options.overrides)
    assert options.multirun or not any(each.is_sweep_override() for each in overrides), "several values"
    firsts = (next(each.sweep_string_iterator()) if each.is_sweep_override() else None for each in overrides)
    return [
        str(each.input_line if first is None else f"{each.get_key_element()}={first}")
        for each, first in zip(overrides, firsts, strict=True)
    ]


@pytest.fixture
def beside_train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documentation tells to put beside train.py; returns that of further configs."""
    monkeypatch.chdir(tmp_path)
    for folder in FOLDERS:
        shown = clause("dog" if folder == "my_photographs" else "star")
        write_folder(Path(folder), [make_row("single_object", shown)], {(0, 0): np.zeros((64, 64, 3), np.uint8)})
        Path(folder, PROVENANCE).write_text("{}")  # so that images may be made there as well
    for file, row in FILES.items():
        Path(file).write_text(json.dumps(row) + "\n")
    Image.new("RGB", (300, 200)).save("photos/dog.png")
    for name in ("a.png", "b.png"):
        Path(name).write_text("a file that is not read")
    for number in range(REFERENCES):
        Path("references", f"{number}.png").touch()
    for file in CHECKPOINTS:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(CHECKPOINT, file)
    for page, modules in MODULES.items():
        for module in modules:
            monkeypatch.setitem(sys.modules, f"my_package.{module}", ModuleType(module))
            vars(sys.modules[f"my_package.{module}"]).update(code(ROOT / "docs" / page))
    monkeypatch.setitem(sys.modules, "my_package", ModuleType("my_package"))
    for block in blocks(ROOT / "docs" / "adding.md", "yaml"):
        file = re.findall(r"^# (conf/\S+\.yaml)", block, re.M)[0]
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(block)
    return tmp_path / "conf"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if [*typed(page)]], ids=name)
def test_commands_compose_to_configs_that_a_run_accepts(
    page: Path, compose_config: Callable[..., DictConfig], beside_train_py: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = "lightning_modules.runs"
    monkeypatch.setattr(
        f"{runs}.preflight.refuse_unfit_weights", lambda config, unresolved: None
    )  # as if they were here
    monkeypatch.setattr(f"{runs}.preflight.refuse_missing_devices", lambda trainer: None)
    further = [f"hydra.searchpath=[file://{beside_train_py}]"] if page.name == "adding.md" else []
    seen = [arguments for other in PAGES[: PAGES.index(page)] for _, arguments in commands(other)]
    refused = []
    for line, arguments in commands(page):
        if arguments in seen:
            continue
        try:
            config = compose_config(*further, *first_job(arguments))
            if config.task == "fit":
                config.ckpt_path = checkpoint_to_resume(Path("new"), config.ckpt_path, config.name)
            refuse_settings(config)
            refuse_mismatches(config)
        except Exception as error:
            refused.append(f"{line}\n    {type(error).__name__}: {error}")
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code(page)


def test_what_the_page_on_adding_adds_works() -> None:
    names = code(ROOT / "docs" / "adding.md")
    brighter = names["EveryOther"](None, k=16, verifier="redness")
    plain = names["EveryOther"](None, k=1, verifier="redness")
    light = [
        names["Redness"]()([], names["decoder"].image_tokenizer.decode(
            strategy.decode(names["decoder"], names["judges"], names["request"]).tokens
        )).mean()
        for strategy in (brighter, plain)
    ]  # fmt: skip
    assert light[0] > light[1]

    module = names["SmoothedModule"](make_decoder(), partial(torch.optim.AdamW, lr=1e-3), 1, 0.1)
    batch = {"image": torch.rand(4, 3, 64, 64), "prompt": ["a photo of a star"] * 4}
    tokens = module.decoder.image_tokenizer.encode(batch["image"])
    before = float(module.decoder.nll(batch["prompt"], tokens))
    trainer = Trainer(max_steps=20, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(module, DataLoader([batch] * 20, batch_size=None))  # type: ignore[arg-type]
    assert float(module.decoder.nll(batch["prompt"], tokens)) < before


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"], project["version"], project["license"]
    )  # fmt: skip
