"""What the status port answers before, while and after everything is ready."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import TestClient, TestServer

from launcher.status import StatusSource, build_status_app
from launcher.supervisor import Standing


@pytest.mark.parametrize(
    ("engine", "gateway", "status"),
    [("ready", "ready", 200), ("starting", "ready", 503), ("ready", "warming", 503)],
)
async def test_readyz_says_whether_all_programs_are_ready(
    engine: str, gateway: str, status: int
) -> None:
    standings = {"engine": Standing(engine), "gateway": Standing(gateway)}
    source = StatusSource(standings, {}, {}, lambda: None, lambda: None)
    async with TestClient(TestServer(build_status_app(source))) as client:
        response = await client.get("/readyz")
        assert response.status == status
        assert await response.json() == {"engine": engine, "gateway": gateway}
