"""Ports for servers that start a moment later: nobody else's until then."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common import ports
from common.ports import NoFreePort, find_free_ports, find_free_row

_ASK = """
import sys
from common.ports import find_free_ports
print(*find_free_ports(70), flush=True)
sys.stdin.read()
"""


def test_processes_are_given_different_ports() -> None:
    own = set(find_free_ports(70))
    ask = [sys.executable, "-c", _ASK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    others = [subprocess.Popen(ask, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    given = [{int(port) for port in other.stdout.readline().split()} for other in others]
    for other in others:
        other.communicate()

    assert [len(ports) for ports in (own, *given)] == [70] * 4
    assert len(own.union(*given)) == 280


def test_ports_are_none_that_connections_are_given() -> None:
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert max(find_free_ports(20)) < int(first)


def test_port_that_is_taken_is_passed_over() -> None:
    first = find_free_row(6)
    taken = set(range(first + 1, first + 6))
    with contextlib.ExitStack() as stack:
        for one in taken:
            stack.enter_context(socket.create_server(("127.0.0.1", one)))
        assert taken.isdisjoint(find_free_ports(300))  # more than a process has: all its own again


def test_row_is_of_neighbours() -> None:
    find_free_ports(1)
    first = find_free_row(5)
    assert set(range(first, first + 5)).isdisjoint(find_free_ports(5))


@pytest.fixture
def begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as in a process that has asked for none."""
    fresh = functools.cache(ports._list_own.__wrapped__)
    monkeypatch.setattr(ports, "_list_own", fresh)


@pytest.mark.usefixtures("begun_anew")
def test_name_that_leads_elsewhere_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may have made a folder of that name first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "precious").write_text("kept")
    folder = tmp_path / f"vllm-gateway-ports-{os.getuid()}"
    folder.mkdir()
    for number in range(ports._BLOCKS):
        (folder / str(number)).symlink_to(tmp_path / "precious")

    with pytest.raises(NoFreePort):
        find_free_ports(1)
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.usefixtures("begun_anew")
def test_ports_are_looked_for_again_when_there_were_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_lock", lambda number: None)
    for _ in range(2):
        with pytest.raises(NoFreePort):
            find_free_ports(1)
    monkeypatch.setattr(ports, "_lock", lambda number: number)
    assert len(find_free_ports(2)) == 2


@pytest.mark.usefixtures("begun_anew")
def test_ports_that_are_all_listened_at_are_said_and_looked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ports, "_is_free", lambda port: False)
    for ask in (find_free_ports, find_free_row):
        with pytest.raises(NoFreePort, match="listens at each of this process's ports"):
            ask(1)
    monkeypatch.setattr(ports, "_is_free", lambda port: True)
    assert len(find_free_ports(2)) == 2
