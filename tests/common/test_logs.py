"""Log lines: one form for everything that is said, whoever says it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

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


def test_console_lines_are_for_people() -> None:
    lines = run("console")

    assert "request_done" in lines[0]
    assert "request_id" in lines[0]
    assert not lines[0].startswith("{")
    assert "it is odd" in lines[1]
    assert lines[-1].endswith("RuntimeError: boom") or "boom" in "".join(lines)


def test_level_holds_for_libraries_too() -> None:
    (crash,) = (orjson.loads(line) for line in run("json", "error"))
    assert crash["event"] == "gateway_crashed"
    debug = [orjson.loads(line)["event"] for line in run("json", "debug")]
    assert debug == ["request_done", "library_line", "gateway_crashed"]
