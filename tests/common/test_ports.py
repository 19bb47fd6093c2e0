"""Ports for servers that start a moment later: nobody else's until then."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

from common.ports import find_free_ports, find_free_row

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
