"""Files: one that is looked at again, one that is none, one for which there is no room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import FileWatch, read_file, read_text, write_file
from tests.outputs import require_mounts

ROOT = Path(__file__).parents[2]


def test_each_change_is_found_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    watch = FileWatch(path)

    assert watch.has_changed()
    assert not watch.has_changed()
    path.write_text("longer")
    assert watch.has_changed()
    assert not watch.has_changed()


def test_another_file_of_the_same_time_and_size_in_its_place_is_a_change(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_text("one")
    other.write_text("two")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    watch = FileWatch(path)
    watch.has_changed()

    other.replace(path)

    assert watch.has_changed()


def test_file_that_vanishes_is_told_apart_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    watch = FileWatch(path)
    assert not watch.is_gone

    assert watch.has_changed()
    assert watch.is_gone
    assert not watch.has_changed()
    path.write_text("one")
    assert watch.has_changed()
    assert not watch.is_gone
    path.unlink()
    assert watch.has_changed()
    assert watch.is_gone


def test_file_is_read_whole_and_a_fifo_or_folder_is_told_at_once(tmp_path: Path) -> None:
    path, fifo = tmp_path / "file", tmp_path / "fifo"
    path.write_bytes(b"one\r\ntwo")
    os.mkfifo(fifo)

    assert read_file(path) == b"one\r\ntwo"
    assert read_file(path, 2) == b"on"
    assert read_text(path) == "one\ntwo"
    with pytest.raises(OSError, match="a FIFO or a device, where a file is wanted"):
        read_file(fifo)
    with pytest.raises(OSError, match="a FIFO or a device"):
        read_file(Path("/dev/zero"))
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)


def test_file_that_is_written_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    write_file(path, "after")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_file_for_which_there_is_no_room_is_as_it_was(tmp_path: Path) -> None:
    """On a disk of 64 KB, mounted where this program alone sees it."""
    require_mounts()
    mount = f"mount -t tmpfs -o size=64k none {tmp_path} || exit 9"
    code = (
        "import pathlib\nfrom common.files import write_file\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "write_file(folder / 'file', 'before')\n"
        "try:\n    write_file(folder / 'file', 'x' * 100_000)\n"
        "except OSError as error:\n    print(error.strerror)\n"
        "print((folder / 'file').read_text(), [path.name for path in folder.iterdir()])\n"
    )
    command = ["unshare", "--mount", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable]
    done = subprocess.run(
        [*command, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["No space left on device", "before ['file']"]
