"""What is kept of a program's lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.engine import terminal
from launcher.engine.terminal import LineLog


def test_line_log_is_rotated_and_keeps_the_newest_in_four_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_FILE_BYTES", 1_000)
    log = LineLog(tmp_path / "engine.log")
    for number in range(100):
        log.add(f"line {number:03} {'x' * 50}")
    log.close()

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["engine.log", "engine.log.1", "engine.log.2", "engine.log.3"]
    kept = "".join((tmp_path / name).read_text() for name in reversed(names)).splitlines()
    numbers = [int(line.split()[2]) for line in kept]
    assert numbers == list(range(numbers[0], 100))
    assert all((tmp_path / name).stat().st_size <= 1_000 for name in names)
    assert log.tail(2) == [line.partition(" ")[2] for line in kept[-2:]]
