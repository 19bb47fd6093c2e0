"""An engine behind TLS: its certificate is checked, and where that is the trouble, all are told."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from lab.faults.servers.certificates import Certificates
from lab.faults.servers.link import Link
from lab.fuzz.raw_http import address
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import until
from tests.gateway.process import serve_process
from tests.plain_http import NO_TLS


async def test_engine_whose_certificate_expires_is_down_for_that_reason_until_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = Certificates(tmp_path / "certificates")
    certificates.make()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    async with serve_app(build_fake_engine(Behaviour())) as engine_url:
        link = Link(address(engine_url)[1], certificates.serve())
        async with (
            link.serve(),
            serve_process(
                *(tmp_path, f"https://127.0.0.1:{link.port}", "--restart-hold-s", "0"),
                *("--probe-interval-s", "0.1"),
            ) as gateway,
            httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS) as client,
        ):
            good = await client.post("/predict", json={"prompt": "a"})
            certificates.serve(is_expired=True)
            link.cut()

            async def is_ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            async def is_down() -> bool:
                return not await is_ready()

            await until(is_down)
            refused = await client.post("/predict", json={"prompt": "b"})
            certificates.serve()
            await until(is_ready)
            again = await client.post("/predict", json={"prompt": "c"})
        log = gateway.read_log()

    assert good.json() == {"response": "answer:a"}
    assert refused.status_code == 503
    assert "certificate has expired" in refused.json()["error"]["message"]
    assert again.json() == {"response": "answer:c"}
    (lost,) = [line for line in log.splitlines() if '"engine_lost"' in line]
    assert "certificate has expired" in lost
