"""Log lines: one form for everything that is said, whoever says it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import orjson
import pytest

from common.logs import DescriptorOutput
from tests.outputs import require_mounts
from tests.patience import PROGRAM_S

ROOT = Path(__file__).parents[2]
PROGRAM = """
import logging, structlog
from common.logs import configure_logging
configure_logging("gateway", {form!r}, {level!r})
structlog.get_logger("gateway").info("request_done", request_id="me", duration_s=0.1)
logging.getLogger("some.library").warning("it is %s", "odd")
logging.getLogger("some.library").info("not worth a line")
raise RuntimeError("boom")
"""


def run(form: str, level: str = "info") -> list[str]:
    code = PROGRAM.format(form=form, level=level)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("form", ["json", "auto"])
def test_json_lines_share_their_keys_a_librarys_and_a_crash_too(form: str) -> None:
    own, library, crash = (orjson.loads(line) for line in run(form))

    for row in (own, library, crash):
        assert {"timestamp", "level", "source", "event"} <= row.keys()
        assert row["source"] == "gateway"
    assert (own["event"], own["request_id"], own["level"]) == ("request_done", "me", "info")
    assert library["event"] == "library_line"
    assert (library["logger"], library["message"]) == ("some.library", "it is odd")
    assert (crash["event"], crash["level"]) == ("gateway_crashed", "critical")
    assert crash["exception"].endswith("RuntimeError: boom")


def test_warning_of_a_library_is_a_line_as_others() -> None:
    code = """
import warnings
from common.logs import configure_logging
configure_logging("gateway", "json")
warnings.warn("this is odd", RuntimeWarning)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    (row,) = (json.loads(line) for line in done.stderr.splitlines())
    assert (row["event"], row["level"]) == ("library_line", "warning")
    assert "this is odd" in row["message"]


def test_json_line_takes_what_json_has_no_form_for() -> None:
    code = """
import structlog
from pathlib import Path
from common.logs import configure_logging
configure_logging("gateway", "json")
log = structlog.get_logger("gateway")
log.warning("noted", path=Path("a"), number=1)
log.error("noted", number=2**70, text="\\ud800")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert list(first) == ["path", "number", "event", "level", "timestamp", "source"]
    assert (first["path"], first["level"]) == ("PosixPath('a')", "warning")
    assert (second["number"], second["text"], second["level"]) == (2**70, "\ud800", "error")
    for row in (first, second):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", row["timestamp"])


def test_line_that_is_written_in_two_pieces_is_one_line(tmp_path: Path) -> None:
    """As `print` does it; what writes may be quick enough to see the first alone."""
    path = tmp_path / "log"
    with path.open("w") as file:
        output = DescriptorOutput(file.fileno())
        assert output.write(["a line"]) == 0
        assert output.write(["\n", "another\n"]) == 0

    assert path.read_text() == "a line\nanother\n"


def test_console_lines_are_for_people() -> None:
    lines = run("console")

    assert "request_done" in lines[0]
    assert "request_id" in lines[0]
    assert not lines[0].startswith("{")
    assert "it is odd" in lines[1]
    assert lines[-1].endswith("RuntimeError: boom") or "boom" in "".join(lines)


def test_console_shows_a_traceback_and_nothing_of_what_its_variables_hold() -> None:
    code = """
import structlog
from common.logs import configure_logging
configure_logging("gateway", "console")
def fail(prompt):
    raise RuntimeError("boom")
try:
    fail("".join(["what I ", "asked"]))
except RuntimeError:
    structlog.get_logger("gateway").exception("request_crashed")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert "request_crashed" in done.stderr
    assert "in fail" in done.stderr
    assert done.stderr.endswith("RuntimeError: boom\n")
    assert "what I asked" not in done.stderr


def test_level_holds_for_libraries_too() -> None:
    (crash,) = (orjson.loads(line) for line in run("json", "error"))
    assert crash["event"] == "gateway_crashed"
    debug = [orjson.loads(line)["event"] for line in run("json", "debug")]
    assert debug == ["request_done", "library_line", "gateway_crashed"]


def test_level_changes_while_a_logger_is_in_use() -> None:
    code = """
import logging, structlog
from common.logs import change_log_level, configure_logging
configure_logging("gateway", "json", "info")
log, library = structlog.get_logger("gateway"), logging.getLogger("some.library")
for level in ("info", "error", "debug"):
    change_log_level(level)
    log.debug(f"debug_at_{level}")
    log.info(f"info_at_{level}")
    log.error(f"error_at_{level}")
    library.warning("at %s", level)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in done.stderr.splitlines()]

    assert [row.get("message", row["event"]) for row in rows] == [
        *("info_at_info", "error_at_info", "at info"),
        "error_at_error",
        *("debug_at_debug", "info_at_debug", "error_at_debug", "at debug"),
    ]


# Places that do not take lines. What is said of each: `told` lines were written to `file`, or lost.

_COUNTING = """
import sys, threading, time, structlog
from common.logs import configure_logging
stream = configure_logging("gateway", "json")
log, said = structlog.get_logger("gateway"), open(sys.argv[1], "w", buffering=1)
longest = 0.0
for number in range(int(sys.argv[2])):
    began = time.perf_counter()
    log.info("counted", number=number, text="x" * 50)
    longest = max(longest, time.perf_counter() - began)
    if number % 100 == 99:
        time.sleep(0.001)
print(longest, file=said)
for word in sys.stdin:
    if word == "last\\n":
        log.info("last", number=number + 1)
    else:
        print(stream.dropped, file=said)
"""
_LINES = 20_000


class CountingProgram:
    """Logs many lines at once, then one for each `last`, and tells how many it has lost."""

    def __init__(self, folder: Path, stderr: int, *, lines: int = _LINES, within: str = "") -> None:
        self.said = folder / "said"
        command = [sys.executable, "-c", _COUNTING, str(self.said), str(lines)]
        if within:
            command = ["unshare", "--mount", "sh", "-c", f'{within} exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=stderr)

    def wait_lines(self, count: int) -> list[str]:
        """What it says of itself, once it has said so much."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            lines = self.said.read_text().splitlines() if self.said.exists() else []
            if len(lines) >= count:
                return lines
            time.sleep(0.01)
        raise AssertionError(f"it stands still: {lines}")

    def tell(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{word}\n" for word in words).encode())
        self.process.stdin.flush()

    def read_dropped(self) -> int:
        before = len(self.wait_lines(1))
        self.tell("dropped")
        return int(self.wait_lines(before + 1)[-1])

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(PROGRAM_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.end()


def parse(text: bytes) -> list[dict[str, Any]]:
    return [dict(orjson.loads(line)) for line in text.splitlines()]


def test_log_on_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full, CountingProgram(tmp_path, full.fileno()) as program:
        program.wait_lines(1)
        deadline = time.monotonic() + 10
        while program.read_dropped() < _LINES:
            assert time.monotonic() < deadline
        assert program.read_dropped() == _LINES
        assert program.end() == 0


def test_log_whose_reader_is_gone_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with CountingProgram(tmp_path, writer) as program:
        os.close(writer)
        os.close(reader)
        program.wait_lines(1)
        deadline = time.monotonic() + 10
        while program.read_dropped() < _LINES:
            assert time.monotonic() < deadline
        assert program.end() == 0


def test_log_to_a_pipe_nobody_reads_waits_for_nobody_and_counts_exactly(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with CountingProgram(tmp_path, writer) as program:
        os.close(writer)
        program.wait_lines(1)
        assert program.read_dropped() > 1_000
        kept = bytearray()
        os.set_blocking(reader, False)
        while not kept.endswith(b"\n") or b"log_lines_dropped" not in kept:
            with open(os.dup(reader), "rb") as file:  # noqa: PTH123
                kept += file.read(2**20) or b""
            time.sleep(0.005)
        dropped = program.read_dropped()
        assert program.end() == 0
        rows = parse(bytes(kept))
        os.close(reader)

        own = [row["number"] for row in rows if row["event"] == "counted"]
        assert own == sorted(own)
        assert len(own) + dropped == _LINES
        told = [row for row in rows if row["event"] == "log_lines_dropped"]
        assert sum(row["count"] for row in told) == dropped


def test_program_ends_soon_though_nobody_reads_its_log(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with CountingProgram(tmp_path, writer) as program:
        os.close(writer)
        program.wait_lines(1)
        assert program.end() == 0
        os.close(reader)


def test_lines_left_at_the_end_are_written(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with CountingProgram(tmp_path, writer, lines=50) as program:
        os.close(writer)
        program.tell(*["last"] * 20)
        assert program.end() == 0
        with open(reader, "rb") as file:  # noqa: PTH123
            assert [row["event"] for row in parse(file.read())] == ["counted"] * 50 + ["last"] * 20


def test_log_whose_reader_is_stopped_goes_on_with_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    target = tmp_path / "kept"
    with target.open("wb") as file:
        cat = subprocess.Popen(["/bin/cat"], stdin=reader, stdout=file)
    os.close(reader)
    cat.send_signal(signal.SIGSTOP)
    with CountingProgram(tmp_path, writer) as program:
        os.close(writer)
        program.wait_lines(1)
        assert program.read_dropped() > 1_000
        cat.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + 10
        while b"log_lines_dropped" not in target.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        program.tell("last")
        assert program.end() == 0
        assert cat.wait(PROGRAM_S) == 0
        assert parse(target.read_bytes())[-1]["event"] == "last"


def test_log_to_a_pipe_that_does_not_block_loses_nothing_that_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with CountingProgram(tmp_path, writer, lines=2_000) as program:
        os.close(writer)
        program.wait_lines(1)
        program.tell("last")
        assert program.process.stdin is not None
        program.process.stdin.close()
        with open(reader, "rb") as file:  # noqa: PTH123
            rows = parse(file.read())
        assert program.process.wait(PROGRAM_S) == 0
        assert [row["number"] for row in rows] == list(range(2_001))


def test_log_on_a_disk_that_gets_room_again_goes_on_with_a_whole_line(tmp_path: Path) -> None:
    """A file system of 64 KB, mounted where this program and its children alone see it."""
    require_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    within = (
        f"mount -t tmpfs -o size=64k none {disk}; head -c 20000 /dev/zero > {disk}/filler; "
        f"exec 2>> {disk}/log;"
    )
    with CountingProgram(tmp_path, subprocess.DEVNULL, within=within) as program:
        program.wait_lines(1)
        seen = Path(f"/proc/{program.process.pid}/root{disk}")
        deadline = time.monotonic() + 10
        while program.read_dropped() + (seen / "log").read_bytes().count(b"}\n") < _LINES:
            assert time.monotonic() < deadline
        (seen / "filler").unlink()
        program.tell("last")
        while b"log_lines_dropped" not in (seen / "log").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        dropped = program.read_dropped()
        lines = (seen / "log").read_bytes().splitlines()
        assert program.end() == 0

        whole = [line for line in lines if line.endswith(b"}")]
        rows = parse(b"\n".join(whole))
        assert len(lines) - len(whole) <= 1  # the one that was cut by the end of the room
        assert len([row for row in rows if row["event"] == "counted"]) + dropped == _LINES
        assert {row["event"] for row in rows} == {"counted", "last", "log_lines_dropped"}


@pytest.mark.parametrize("value", ["'\\udc80'", "2**70", "object()"])
def test_value_that_json_cannot_hold_is_a_line_all_the_same(value: str) -> None:
    code = (
        "import structlog\nfrom common.logs import configure_logging\n"
        "configure_logging('gateway', 'json')\n"
        f"structlog.get_logger('gateway').info('odd', value={value})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"")
    (row,) = parse(done.stderr.replace(b"\\ud", b"\\\\ud"))
    assert row["event"] == "odd"


def test_program_without_a_standard_error_logs_to_nobody(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = (
        "import socket, structlog\nfrom common.logs import configure_logging\n"
        "configure_logging('gateway', 'json')\n"
        "one, other = socket.socketpair()\n"
        "structlog.get_logger('gateway').info('odd')\n"
        f"open({str(done)!r}, 'w').write(str((one.fileno(), other.fileno())))\n"
    )
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert "2" not in done.read_text().strip("()").split(", ")
