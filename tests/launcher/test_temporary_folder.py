"""What a killed engine leaves in its temporary folder goes with the folder."""

from __future__ import annotations

import os
import signal
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from launcher.engine import temporary_folder
from launcher.engine.temporary_folder import find_temporary_folder, make_temporary_folder
from tests.launcher.programs import Launcher, running, wait_for

pytestmark = pytest.mark.programs


def read_temporary_folder(pid: int) -> Path:
    """As the engine itself sees it."""
    rows = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return Path(next(os.fsdecode(row[7:]) for row in rows if row.startswith(b"TMPDIR=")))


def test_engine_has_a_folder_of_its_own_for_each_start_and_none_stays(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    with running(launcher):
        first = launcher.wait_state("ready")["engine"]["pid"]
        folder = read_temporary_folder(first)
        assert folder == find_temporary_folder(launcher.state)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (before,) = folder.iterdir()
        os.kill(first, signal.SIGKILL)
        second = launcher.wait_state("ready", restarts=1)["engine"]["pid"]
        assert read_temporary_folder(second) == folder
        (after,) = folder.iterdir()
        assert before != after
        assert launcher.stop() == 0
    assert not folder.exists()


def test_launcher_killed_the_next_start_has_an_empty_folder(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    with running(launcher):
        folder = read_temporary_folder(launcher.wait_state("ready")["engine"]["pid"])
        launcher.send(signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: not launcher.processes(), "the engine ends by itself")
        (before,) = folder.iterdir()
        launcher.start()
        launcher.wait_state("ready")
        assert before not in folder.iterdir()
        assert launcher.stop() == 0
    assert not folder.exists()


@pytest.mark.parametrize("length", [10, 200])
def test_folder_is_short_enough_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * length)))
    folder = find_temporary_folder(tmp_path / ("y" * 200))
    folder.parent.mkdir(exist_ok=True)
    make_temporary_folder(folder)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(folder / ("u" * 36)))
    finally:
        temporary_folder.remove_temporary_folder(folder)
    assert not folder.exists()


def test_folder_that_somebody_else_has_made_is_not_used(tmp_path: Path) -> None:
    theirs, folder = tmp_path / "theirs", tmp_path / "folder"
    theirs.mkdir()
    (theirs / "file").touch()
    folder.symlink_to(theirs)
    with pytest.raises(FileExistsError):
        make_temporary_folder(folder)
    assert (theirs / "file").exists()
