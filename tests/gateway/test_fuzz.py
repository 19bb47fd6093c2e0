"""Ten thousand requests, most of them spoilt, at a gateway in a process of its own.

Never a 500, never a traceback, never an answer without OpenAI's envelope, never one caller's text
in another's answer, never a blocked event loop, nothing left behind. `FUZZ_SEED=7
FUZZ_CASES=100000` tries others by hand; `python -m lab fuzz` has a real engine behind the gateway.
"""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest

from lab.fuzz.callers import Callers, Tally
from lab.fuzz.cases.case import KEY, Target
from lab.fuzz.cases.kinds import make_cases
from lab.fuzz.survival import judge_log
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import until
from tests.gateway.process import check_blocks, serve_process
from tests.plain_http import NO_TLS

SEED = int(os.environ.get("FUZZ_SEED", "1"))
COUNT = int(os.environ.get("FUZZ_CASES", "10000"))
_SILENCE_S = 0.15  # one whose request is not whole gets no answer, rightly
_MOST_REPORTED = 10


@pytest.mark.timeout(300)
@pytest.mark.slow
async def test_fuzz_spoilt_requests_get_an_envelope_and_nothing_leaks(tmp_path: Path) -> None:
    engine = Behaviour(delay_s=0.001)
    tally = Tally()
    stores = ["--responses-database", str(tmp_path / "responses.sqlite")]
    stores += ["--batch-folder", str(tmp_path / "batches")]
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(
            tmp_path,
            engine_url,
            *("--api-keys", KEY, "--max-body-bytes", "1000000", *stores),
            blocks=tmp_path / "blocks.jsonl",
        ) as gateway,
    ):
        callers = Callers(gateway.url, tally, silence_s=_SILENCE_S)
        await callers.send(make_cases(SEED, COUNT, Target()))

        assert not tally.findings, report(tally)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(
            base_url=gateway.url, headers=headers, verify=NO_TLS
        ) as client:
            last = await client.post("/predict", json={"prompt": "still here"})
            await until(lambda: engine.running == 0)
            gauges = (await client.get("/metrics")).text
        log = gateway.read_log()
        await until(lambda: gateway.count_sockets() < 12)

    check_blocks(tmp_path / "blocks.jsonl")
    assert last.json() == {"response": "answer:still here"}
    assert list(judge_log(log.encode())) == []
    assert 'gateway_running_sequences{lane="interactive"} 0' in gauges
    assert 'gateway_running_sequences{lane="batch"} 0' in gauges
    assert engine.unreadable == 0
    assert not tally.failures  # this engine fails at nothing
    assert tally.count_statuses(200, 200) > COUNT * 0.3, tally.statuses
    assert tally.count_statuses(400, 504) > COUNT * 0.2, tally.statuses


def report(tally: Tally) -> str:
    found = [one.describe(SEED) for one in tally.findings[:_MOST_REPORTED]]
    return "\n".join([f"{len(tally.findings)} findings", *found])
