"""Artifacts are found by what made them, whole, wherever their root has moved."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_modules import artifacts
from lightning_modules.artifacts import ArtifactCache, open_folder, source_hash
from tests.helpers.processes import started

MODULE, KEY = "datamodules.rollouts", {"decoder": "a", "seed": 1}


def text(content: str) -> Any:
    return lambda partial: partial.write_text(content)


def refuse(partial: Path) -> None:
    raise AssertionError("it is there")


def test_what_is_there_is_not_made_again_and_another_key_is_another_artifact(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path, MODULE)
    path = cache.get("result.json", KEY, text("1"))
    assert path.name.startswith("result-") and path.suffix == ".json"
    assert ArtifactCache(str(tmp_path), MODULE).get("result.json", dict(reversed(KEY.items())), refuse) == path
    others = [cache.get("result.json", KEY | {"seed": 2}, text("2")), cache.get("other.json", KEY, text("3"))]
    assert [each.read_text() for each in (path, *others)] == ["1", "2", "3"]
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_what_other_code_has_made_is_another_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ArtifactCache(tmp_path, MODULE)
    parts = cache.parts("set", KEY)
    part = parts.get("part", {"rows": [0]}, Path.mkdir)
    assert part.parent == parts.root == cache.path("set", KEY)
    assert json.loads((parts.root / "provenance.json").read_text()).items() > KEY.items()
    monkeypatch.setattr(artifacts, "source_hash", lambda modules: "another")
    assert cache.path("set", KEY) != parts.root
    assert ArtifactCache(parts.root).get("part", {"rows": [0]}, refuse) == part  # that of a set a checkpoint knows


def test_code_is_that_of_the_module_and_of_all_classes_in_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[frozenset[str]] = []
    monkeypatch.setattr(artifacts, "source_hash", lambda modules: asked.append(modules) or "hash")
    strategy = {"class": "lightning_modules.decoding.verified.Verified", "prompt": "callbacks. a photo", "k": 8}
    ArtifactCache(tmp_path, MODULE).path("set", {"strategies": [strategy], "net": {"class": "torch.nn.Linear"}})
    assert asked == [frozenset([MODULE, "lightning_modules.decoding.verified"])]


def test_code_is_hashed_with_all_that_it_imports(tmp_path: Path) -> None:
    def changed(name: str, code: str) -> bool:
        """Write a module; returns whether what datamodules.maker hashes has changed by it."""
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = source_hash(frozenset(["datamodules.maker"]), tmp_path)
        path.write_text(code)
        source_hash.cache_clear()
        return source_hash(frozenset(["datamodules.maker"]), tmp_path) != before

    assert changed("datamodules/maker", "from datamodules import rows")
    assert changed("datamodules/rows", "import datamodules.maker")  # and round it goes
    assert changed("datamodules/rows", "def f():\n    import lightning_modules.sampling as s, torch")
    assert changed("lightning_modules/sampling", "a = 1") and changed("lightning_modules/sampling", "a = 2")
    assert not changed("lightning_modules/sampling", "a = 2")
    assert not changed("lightning_modules/beam", "") and not changed("torch", "")


def test_a_root_that_has_moved_has_all_that_it_had(tmp_path: Path) -> None:
    parts = ArtifactCache(tmp_path / "before", MODULE).parts("set", KEY)
    name = parts.get("part.json", {"rows": [0]}, text("rows")).name
    (tmp_path / "before").rename(tmp_path / "now")
    cache = ArtifactCache(tmp_path / "now", MODULE)
    assert cache.parts("set", KEY).get("part.json", {"rows": [0]}, refuse).read_text() == "rows"
    assert cache.find(str(parts.root)) == tmp_path / "now" / parts.root.name
    assert cache.find(str(parts.root), lambda path: (path / name).is_file()) == tmp_path / "now" / parts.root.name
    assert cache.find(str(parts.root), lambda path: (path / "more").is_file()) is None


def test_what_a_checkpoint_knows_is_looked_for_in_the_root_and_then_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, before = tmp_path / "disk2" / "plain-a", tmp_path / "outputs" / "rollouts" / "plain-a"
    cache = ArtifactCache(now.parent, MODULE)
    monkeypatch.chdir(tmp_path)
    known = "outputs/rollouts/plain-a"  # as checkpoints held it before they held whole paths
    assert cache.find(known) is None
    before.mkdir(parents=True)
    assert cache.find(known) == Path(known)
    now.mkdir(parents=True)
    assert cache.find(known) == cache.find(str(before)) == now
    assert "plain-a, on which" in str(cache.gone(known))
    assert f"is neither in {now.parent} nor in outputs/rollouts, " in str(cache.gone(known))


def test_of_several_processes_one_makes_it_and_another_resumes_a_killed_one(tmp_path: Path) -> None:
    def make(partial: Path) -> None:
        with (tmp_path / "made").open("a") as made:
            made.write(".")
        time.sleep(0.2)  # long enough for the others to come and find nothing yet
        partial.write_text("rows")

    def work(last: int) -> None:
        parts = ArtifactCache(tmp_path / "cache", MODULE).parts("set", KEY)
        for row in range(last):
            parts.get("part", {"rows": [row]}, make)
        if last == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    (killed,) = started(lambda: work(1))
    killed.join()
    processes = started(*[lambda: work(3)] * 3)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "..."
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["part", "part", "part", "provenance.json"]


def test_what_is_there_is_found_without_writing_anything(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path / "cache", MODULE)
    parts = cache.parts("set", KEY)

    def changes() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}

    made = [parts.get("part", {"rows": [0]}, text("rows")), cache.get("result.json", KEY, text("1"))]
    before = changes()
    assert [parts.get("part", {"rows": [0]}, refuse), cache.get("result.json", KEY, refuse)] == made
    assert changes() == before


def test_a_root_that_cannot_be_written_to_is_named_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="taken"):
        ArtifactCache(tmp_path / "taken", MODULE).get("set", KEY, refuse)


def test_what_a_failure_interrupts_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        ArtifactCache(tmp_path, MODULE).get("set", KEY, refuse)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_what_earlier_versions_stored_is_left_alone_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plain-0123456789abcdef").mkdir()
    cache = ArtifactCache(tmp_path, MODULE)
    for seed in (1, 2):
        cache.get("plain", {"seed": seed}, Path.mkdir)
        cache.parts("set", {"seed": seed}).open()
    said = capsys.readouterr().err + caplog.text
    assert said.count("what an earlier version has stored there is not read") == 1
    assert len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_was_opened_stays_what_it_was(tmp_path) -> None:
    open_folder(tmp_path / "x", {"decoder": "a", "seed": 1})
    open_folder(tmp_path / "x", {"decoder": "a", "seed": 1})
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        open_folder(tmp_path / "x", {"decoder": "a", "seed": 2})


def test_a_folder_of_others_stays_what_it_was(tmp_path) -> None:
    (tmp_path / ".DS_Store").touch()  # what is hidden is nobody's work
    open_folder(tmp_path, {"seed": 1})
    (tmp_path / "provenance.json").unlink()
    for name in "abcd":
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r" holds a, b, c and 1 more, and no provenance\.json .*: name another folder"):
        open_folder(tmp_path, {"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".DS_Store", "a", "b", "c", "d"]


@pytest.mark.parametrize("text", ["[]", "{", '{"source": "a camera"}'])
def test_a_folder_that_others_marked_stays_what_it_was(tmp_path, text: str) -> None:
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(ValueError, match=r"provenance\.json is not of this project, or of another version"):
        open_folder(tmp_path, {"seed": 1})
    assert (tmp_path / "provenance.json").read_text() == text
