"""What the gateway stands on inside aiohttp is still there, and still of that shape.

`engines/client.py`, `engines/connections.py` and `server.py` use more than aiohttp promises. A
newer version is let in (pyproject.toml) when this and the tests of those modules pass with it.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection, TCPConnector

from gateway.engines.connections import EngineConnector

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            ResponseHandler.set_response_params,
            {"read_until_eof", "auto_decompress", "read_bufsize"},
        ),
        (ResponseHandler.feed_data, {"data", "size"}),
        (ResponseHandler.data_received, {"data"}),
        (ResponseHandler.read, {"self"}),
        (ResponseHandler.resume_reading, {"resume_parser"}),
        (web.RequestHandler.resume_reading, {"resume_parser"}),
        (web.Application._handle, {"request"}),
        (TCPConnector.connect, {"req", "traces", "timeout"}),
        (TCPConnector.__init__, {"socket_factory", "limit", "keepalive_timeout"}),
        (aiohttp.ClientRequest.__init__, {"method", "url", "loop", "response_class"}),
        (Connection.release, {"self"}),
        (Connection.close, {"self"}),
        (aiohttp.StreamReader.set_exception, {"exc"}),
        (aiohttp.StreamReader.on_eof, {"callback"}),
        (web.RequestHandler.handle_error, {"request", "status", "exc", "message"}),
        (web.RequestHandler.finish_response, {"request", "resp", "start_time"}),
        (web.RequestHandler.log_exception, {"args", "kw"}),
        (web.AppRunner._make_server, {"self"}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_aiohttp_function_still_takes_what_is_passed(
    function: Callable[..., Any], names: set[str]
) -> None:
    parameters = inspect.signature(function).parameters

    assert names <= parameters.keys()


def test_aiohttp_connection_still_shows_its_protocol_and_transport() -> None:
    assert isinstance(Connection.protocol, property)
    assert isinstance(Connection.transport, property)


async def test_aiohttp_connector_still_makes_its_protocols_by_a_factory() -> None:
    plain, ours = TCPConnector(), EngineConnector()
    try:
        made = [connector._factory() for connector in (plain, ours)]
    finally:
        await plain.close()
        await ours.close()

    assert type(made[0]) is ResponseHandler
    assert type(made[1]).__mro__[1] is ResponseHandler


def test_aiohttp_is_held_below_the_next_minor_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = [one for one in project["dependencies"] if one.startswith("aiohttp")]
    major, minor = map(int, aiohttp.__version__.split(".")[:2])

    assert wanted.endswith(f",<{major}.{minor + 1}")
