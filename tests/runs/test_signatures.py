"""Signatures read from source are those that Python itself gives."""

import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.runs.checks import refuse_wrong_values
from lightning_modules.runs.signatures import constant, is_missing, required, signature
from tests.helpers.overrides import ROOT

NAMED = {
    name for path in (ROOT / "conf").rglob("*.yaml") for name in re.findall(r"_target_: *([\w.]+)", path.read_text())
}
TARGETS = sorted(NAMED - {"datetime.timedelta"})  # which has no source in Python


NODE = {"_target_": "untold.Fallback"}
TOP: dict[str, Any] = {"trainer": NODE, "module": NODE, "sampling": NODE, "callbacks": {}, "logger": {}}


def names_by_import(target: str) -> list[str]:
    found: Any = pydoc.locate(target)
    kinds = inspect.Parameter
    parameters = [each for each in inspect.signature(found).parameters.values() if each.kind != kinds.VAR_POSITIONAL]
    return ["**" if each.kind == kinds.VAR_KEYWORD else each.name for each in parameters]


@pytest.mark.parametrize("target", TARGETS)
def test_names_are_those_of_the_imported_object(target: str) -> None:
    assert sorted(signature(target)) == sorted(names_by_import(target))
    found: Any = pydoc.locate(target)
    given = [each for each in inspect.signature(found).parameters.values() if each.name in signature(target)]
    assert sorted(required(target)) == sorted(each.name for each in given if each.default is each.empty)


def test_annotations_are_evaluated_where_python_has_the_types() -> None:
    taken = signature("lightning_modules.evaluator.Evaluator")
    assert taken["batch_size"] is int
    assert taken["judges"] is Any  # it inherits from one of Python's own containers
    assert (
        signature("lightning_modules.decoding.reflection.Reflection")["strategy"].__name__ == "Strategy"
    )  # a stand-in
    trainer = signature("lightning.Trainer")
    assert trainer["max_epochs"] == int | None
    assert "32-true" in str(trainer["precision"])  # an alias that another module defines


def test_a_dataclass_takes_the_fields_of_its_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up.py").write_text(
        "from dataclasses import dataclass, field\nfrom typing import ClassVar\n\n\n"
        "class Plain:\n    hidden: int\n\n\n"
        "@dataclass\nclass Base(Plain):\n    first: int\n    shared: ClassVar[int] = 1\n\n\n"
        "@dataclass\nclass Derived(Base):\n    second: 'str | None' = None\n    state: list[int] = field(init=False)\n"
        "    says = 'pairs'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert signature("made_up.Derived") == {"first": int, "second": str | None}
    assert constant("made_up.Derived", "says", None) == "pairs"
    assert constant("made_up.Derived", "unsaid", 3) == 3
    assert signature("made_up.Unknown") == {} == signature("no_such_package.Unknown")


UNTOLD = """
import functools, math
from typing import Annotated, NamedTuple, TypeAlias, overload
try:
    import fast
    class Fallback:
        def __init__(self, a): ...
except ImportError:
    class Fallback:
        def __init__(self, b): ...
class Pair(NamedTuple):
    first: int
Json: TypeAlias = "dict[str, Json] | list[Json] | int"
def more(cls): ...
@more
class Decorated:
    def __init__(self, a): ...
@functools.wraps(print)
def wrapped(a): ...
class Overloaded:
    @overload
    def __init__(self, a: int): ...
    @overload
    def __init__(self, a: str): ...
    def __init__(self, a, b=1): ...
class Patched:
    __init__ = more
class Made:
    @staticmethod
    def make(k: Annotated[int, "steps"], pair: Pair, json: Json = None, prose: "a whole number" = 1): ...
"""


def test_what_source_does_not_tell_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "untold.py").write_text(UNTOLD)
    (tmp_path / "torn.py").write_text("def broken(:\n")
    (tmp_path / "round_a.py").write_text("from round_b import Thing\n")
    (tmp_path / "round_b.py").write_text("from round_a import Thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("untold.Fallback", "untold.Decorated", "untold.wrapped", "untold.Overloaded", "untold.Patched",
                 "torn.broken", "round_a.Thing", "math.sqrt", "_struct.Struct"):  # fmt: skip
        assert signature(name) == {}, name
    made = signature("untold.Made.make")
    assert list(made) == ["k", "pair", "json", "prose"] and made["pair"] is Any and made["prose"] is Any
    refuse_wrong_values(
        {**TOP, "made": {"_target_": "untold.Made.make", "k": 1, "pair": [1], "json": {"a": [1]}, "prose": 2}}, {}
    )


def test_nothing_heavy_is_imported() -> None:
    read = f"from lightning_modules.runs.signatures import signature\nassert any([*map(signature, {TARGETS})])\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{read}print('torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("module", ["strategies", "plugins", "callbacks", "loggers", "accelerators", ""])
def test_no_name_of_lightnings_is_taken_for_missing(module: str) -> None:
    """Some are set by other modules, others imported under a condition."""
    name = "lightning.pytorch" + f".{module}" * bool(module)
    there = [each for each in dir(pydoc.locate(name)) if not each.startswith("_")]
    assert not [each for each in there if is_missing(f"{name}.{each}")]
    assert is_missing(f"{name}.Trainr")


def test_a_module_of_the_project_that_is_not_there_is_missing() -> None:
    assert is_missing("lightning_modules.prm.PARM") and is_missing("nowhere.PARM") and is_missing("PARM")
    assert not is_missing("lightning_modules.rewards.parm.PARM") and not is_missing("torch.relu")
