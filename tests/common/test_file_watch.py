"""A file that is looked at again: written, replaced, gone, back."""

from __future__ import annotations

import os
from pathlib import Path

from common.file_watch import FileWatch


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
