"""Files and folders appear whole or not at all, whatever other processes do and whatever the disk refuses."""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_modules.files import make_once, whole, write_text
from lightning_modules.runs.checkpoint_io import WholeCheckpointIO
from tests.helpers.processes import started


def test_several_processes_write_one_file_and_none_reads_a_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    texts = [letter * 100_000 for letter in "abc"]

    def write(text: str) -> None:
        for _ in range(100):
            write_text(path, text)

    processes = started(*(lambda text=text: write(text) for text in texts))
    read = set()
    while any(process.is_alive() for process in processes):
        if path.exists():
            read.add(path.read_text())
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert read <= set(texts) and path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_of_several_processes_that_want_a_folder_one_makes_it(tmp_path: Path) -> None:
    def make(partial: Path) -> None:
        with (tmp_path / "made").open("a") as made:
            made.write(".")
        time.sleep(0.2)  # long enough for the others to come and find nothing yet
        partial.mkdir()
        (partial / "rows").write_text("rows")

    processes = started(*[lambda: make_once(tmp_path / "set" / "part", make)] * 3)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "." and (tmp_path / "set" / "part" / "rows").read_text() == "rows"
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["part"]


def test_of_two_that_make_a_folder_the_first_stays(tmp_path: Path) -> None:
    with whole(tmp_path / "set") as slow:
        slow.mkdir()
        (slow / "rows").write_text("slow")
        with whole(tmp_path / "set") as fast:
            fast.mkdir()
            (fast / "rows").write_text("fast")
    assert (tmp_path / "set" / "rows").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_a_killed_process_has_half_written_is_not_read_and_goes(tmp_path: Path) -> None:
    def killed() -> None:
        with whole(tmp_path / "rows") as partial:
            partial.mkdir()
            (partial / "half").write_text("ro")
            os.kill(os.getpid(), signal.SIGKILL)

    (process,) = started(killed)
    process.join()
    (left,) = tmp_path.iterdir()
    assert process.exitcode == -signal.SIGKILL and left.name[0] == "." and left.is_dir()
    mine = tmp_path / left.name.replace(f".{process.pid}.", f".{os.getpid()}.")
    elsewhere, abandoned = (tmp_path / f".another-machine-1.{number}.0123abcd.partial" for number in (1, 2))
    for path in (mine, elsewhere, abandoned):
        path.touch()
    os.utime(abandoned, (0, 0))
    write_text(tmp_path / "rows", "rows")
    assert set(tmp_path.iterdir()) == {tmp_path / "rows", mine, elsewhere}  # whose processes may be at work


def test_a_full_disk_leaves_what_was_there_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_text(path, "old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/results\.jsonl'"), whole(path) as partial:
        partial.symlink_to("/dev/full")
        partial.write_text("new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=r"No space left on device: '.*/set'"), whole(tmp_path / "set") as partial:
        partial.mkdir()
        (partial / "rows").symlink_to("/dev/full")
        (partial / "rows").write_text("rows")
    assert list(tmp_path.iterdir()) == [path]


def test_errors_about_other_files_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, whole(tmp_path / "part"):
        raise OSError(errno.EACCES, "no", "/else/where")
    assert raised.value.filename == "/else/where"


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save = WholeCheckpointIO().save_checkpoint
    save({"state_dict": {"weight": torch.ones(3)}}, path)
    small_files(10_000)
    with pytest.raises(OSError, match=r"File too large: '.*/last\.ckpt'"):
        save({"state_dict": {"weight": torch.zeros(10_000)}}, path)
    assert torch.load(path, weights_only=True)["state_dict"]["weight"].tolist() == [1, 1, 1]
    assert list(path.parent.iterdir()) == [path]
