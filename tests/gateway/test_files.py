"""A gateway that may open too few files: it takes what it is allowed, and blames no engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.engines.engine import EngineState
from gateway.engines.pool import POOL
from gateway.errors import OutOfFiles
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, until
from tests.gateway.process import GatewayProcess, serve_process
from tests.plain_http import NO_TLS

FEW = 96  # the gateway itself has some thirty
CALLS = 60  # each wants two


def with_limit(kind: str, files: int) -> tuple[str, ...]:
    return ("bash", "-c", f'ulimit -{kind}n {files}; exec "$@"', "bash")


def limits(gateway: GatewayProcess) -> tuple[str, str]:
    text = Path(f"/proc/{gateway.process.pid}/limits").read_text(encoding="ascii")
    (row,) = [line.split() for line in text.splitlines() if line.startswith("Max open files")]
    return row[3], row[4]


@pytest.mark.programs
async def test_start_takes_all_the_files_it_may_have(tmp_path: Path) -> None:
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(tmp_path, engine_url, wrapper=with_limit("S", FEW)) as gateway,
    ):
        soft, hard = limits(gateway)
        assert int(soft) == min(int(hard), 2**20) > FEW


@pytest.mark.programs
async def test_engine_is_not_blamed_for_the_gateways_own_shortage(tmp_path: Path) -> None:
    engine = Behaviour(delay_s=1.5)
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url, wrapper=with_limit("", FEW)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30, verify=NO_TLS) as client,
    ):
        body = {"model": "fake", "prompt": "a"}
        calls = [client.post("/v1/completions", json=body) for _ in range(CALLS)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        said = [one for one in answers if isinstance(one, httpx.Response)]
        codes = {one.json()["error"]["code"] for one in said if one.status_code != 200}
        assert codes == {"out_of_files"}
        assert "ulimit -n" in next(one for one in said if one.status_code == 503).text

        engine.delay_s = 0.0
        await until(lambda: engine.running == 0)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30, verify=NO_TLS) as newcomer:
            assert (await newcomer.post("/predict", json={"prompt": "b"})).status_code == 200
        log = gateway.read_log()
        assert "engine_lost" not in log
        assert "warmup_failed" not in log


async def test_probe_that_cannot_be_made_changes_nothing(serve: Serve) -> None:
    async with serve() as served:
        (engine,) = served.app[POOL].engines
        served.engine.delay_s = 1.0
        call = asyncio.create_task(served.predict("a"))  # takes the connection that is there
        await until(lambda: served.engine.running == 1)

        with no_more_files():
            assert await engine.is_healthy()
            with pytest.raises(OutOfFiles):
                await engine.read_model_cards()

        engine.enter_state(EngineState.DOWN, "gone")
        with no_more_files():
            assert not await engine.is_healthy()
        assert (await call).status_code == 200


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free, and so a bound
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
