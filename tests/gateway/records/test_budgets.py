"""Tokens of a day and of a month: refused before the fact, over gateways and over a restart."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.admission.limits import LIMITS
from gateway.records.periods import Calendar, count_seconds_left
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import ask as write_line
from tests.gateway.batches.conftest import open_batches
from tests.gateway.conftest import Serve, Served
from tests.gateway.process import serve_process
from tests.gateway.records.conftest import (
    Keys,
    ask,
    open_records,
    read_audit,
    until,
    wait_for_tokens,
)
from tests.redis_server import run_redis

DAY_S = 86_400
CHAT_TOKENS = 7  # by the fake engine's count; what is set aside for one is some twenty


async def _use_up(served: Served, headers: dict[str, str]) -> tuple[int, Any]:
    """How many chats were answered, and the refusal of the one after them."""
    for number in range(20):
        answer = await ask(served.url, headers)
        if answer.status_code != 200:
            return number, answer
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize(("limit", "longest_s"), [("day", DAY_S), ("month", 31 * DAY_S)])
async def test_used_up_budget_is_refused_until_the_next_one_begins(
    serve: Serve, keys: Keys, kept: dict[str, Any], limit: str, longest_s: float
) -> None:
    settings = keys.write(alice=f"tokens_per_{limit} = 50", bob="") | kept
    async with serve(**settings) as served:
        answered, refusal = await _use_up(served, keys.headers["alice"])

        assert answered >= 2
        assert answered * CHAT_TOKENS <= 50
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (
            429,
            f"tokens_per_{limit}",
        )
        assert 1 <= int(refusal.headers["Retry-After"]) <= longest_s
        assert refusal.headers["x-should-retry"] == "false"
        assert "max_tokens" in refusal.json()["error"]["message"]
        assert len(served.engine.calls) == answered
        assert (await ask(served.url, keys.headers["bob"])).status_code == 200
        models = await served.client.get("/v1/models", headers=keys.headers["alice"])
        assert models.status_code == 200  # which uses no tokens


def read_budget(headers: Mapping[str, str], period: str) -> tuple[int, int, float]:
    """The budget, what is left of it and the seconds until the next one begins."""
    limit, left, reset = (
        headers[f"x-ratelimit-{field}-tokens-{period}"] for field in ("limit", "remaining", "reset")
    )
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?([\d.]+)(ms|s)", reset)
    assert match is not None
    seconds = float(match[3]) / (1000 if match[4] == "ms" else 1)
    return int(limit), int(left), seconds + 60 * int(match[2] or 0) + 3600 * int(match[1] or 0)


async def test_what_budgets_leave_is_on_every_answer(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    entry = "tokens_per_day = 50\ntokens_per_month = 1000"
    settings = keys.write(alice=entry, bob="tokens_per_month = 9") | kept
    headers = keys.headers["alice"]
    async with serve(**settings) as served:
        first = await ask(served.url, headers)
        before, beginning_s = time.time(), count_seconds_left(month=False)
        models = await served.client.get("/v1/models", headers=headers)
        bobs = await served.client.get("/v1/models", headers=keys.headers["bob"])
        slots = served.engine.slots = asyncio.Semaphore(0)
        running = asyncio.create_task(ask(served.url, headers))
        await until(lambda: served.engine.running == 1)
        beside = await served.client.get("/v1/models", headers=headers)
        slots.release()
        last = await running
        refused = await ask(served.url, headers, max_tokens=50)

    for answer in (first, models):
        assert read_budget(answer.headers, "day")[:2] == (50, 50 - CHAT_TOKENS)
        assert read_budget(answer.headers, "month")[:2] == (1000, 1000 - CHAT_TOKENS)
    set_aside = 50 - CHAT_TOKENS - read_budget(beside.headers, "day")[1]
    assert set_aside > CHAT_TOKENS
    assert read_budget(beside.headers, "month")[1] == 1000 - CHAT_TOKENS - set_aside
    assert refused.status_code == 429
    for answer in (last, refused):
        assert read_budget(answer.headers, "day")[:2] == (50, 50 - 2 * CHAT_TOKENS)
    told_s = read_budget(models.headers, "day")[2]
    assert beginning_s - (time.time() - before) - 1 <= told_s <= beginning_s + 1
    assert read_budget(models.headers, "month")[2] >= told_s - 1
    assert read_budget(bobs.headers, "month")[:2] == (9, 9)
    assert not any(name.endswith(("-tokens", "-tokens-day")) for name in bobs.headers)


async def test_what_a_budget_leaves_is_told_with_a_streams_head(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    """After what the stream has set aside for itself."""
    settings = keys.write(alice="tokens_per_day = 50")
    async with serve(**settings, usage_database=str(tmp_path / "usage")) as served:
        stream = await ask(served.url, keys.headers["alice"], stream=True)
        after = await served.client.get("/v1/models", headers=keys.headers["alice"])

    assert read_budget(stream.headers, "day")[1] < read_budget(after.headers, "day")[1] < 50


async def test_client_does_not_come_again_to_a_budget_that_is_used_up(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    """Within the last minute of a day either: the SDK would else wait for it."""
    settings = keys.write(alice="tokens_per_day = 1")
    async with serve(**settings, usage_database=str(tmp_path / "usage")) as served:
        key = keys.headers["alice"]["Authorization"].removeprefix("Bearer ")
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=key) as client:
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model="fake", prompt="a")

        refused = 'gateway_requests_total{route="/v1/completions",status="429"} 1.0'
        assert refused in (await served.client.get("/metrics")).text


async def test_calls_at_once_never_pass_a_budget(serve: Serve, keys: Keys, tmp_path: Path) -> None:
    settings = keys.write(alice="tokens_per_day = 50")
    async with serve(**settings, usage_database=str(tmp_path / "usage")) as served:
        slots = served.engine.slots = asyncio.Semaphore(0)
        asked = [asyncio.create_task(ask(served.url, keys.headers["alice"])) for _ in range(10)]
        await until(lambda: len(served.engine.calls) + sum(one.done() for one in asked) == 10)
        assert 0 < len(served.engine.calls) <= 2  # each sets some twenty aside
        for _ in range(2):
            slots.release()
        answers = await asyncio.gather(*asked)
        refused = [one for one in answers if one.status_code == 429]

        assert len(refused) + len(served.engine.calls) == 10
        assert {one.json()["error"]["code"] for one in refused} == {"tokens_per_day"}
        assert all("x-should-retry" not in one.headers for one in refused)
        assert all(int(one.headers["Retry-After"]) <= 120 for one in refused)
        assert (await ask(served.url, keys.headers["alice"])).status_code == 200  # given back


async def test_budget_and_minute_hold_beside_each_other(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    entry = "tokens_per_day = 1000\nrequests_per_minute = 2\nmax_concurrency = 1"
    async with serve(**keys.write(alice=entry), usage_database=str(tmp_path / "usage")) as served:
        answers = [await ask(served.url, keys.headers["alice"]) for _ in range(3)]

        assert [one.status_code for one in answers] == [200, 200, 429]
        assert answers[2].json()["error"]["code"] == "requests_per_minute"
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"


async def test_what_another_gateway_used_counts(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    settings = keys.write(alice="tokens_per_day = 50") | kept
    async with serve(**settings) as first, serve(**settings) as second:
        await _use_up(first, keys.headers["alice"])

        async def is_refused() -> bool:
            answer = await ask(second.url, keys.headers["alice"], max_tokens=30)
            return bool(answer.status_code == 429)

        await until(is_refused)
        assert len(second.engine.calls) <= 1


@pytest.mark.programs
async def test_budget_and_audit_outlive_a_gateway_that_is_killed(
    keys: Keys, kept: dict[str, Any], tmp_path: Path
) -> None:
    keys.write(alice="tokens_per_day = 50\naudit_text = true")
    flags = [f"--keys-file={keys.path}", "--audit"]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in kept.items()]
    root, alice = keys.headers["root"], keys.headers["alice"]
    async with serve_app(build_fake_engine(Behaviour())) as engine_url:
        async with serve_process(tmp_path, engine_url, *flags) as gateway:
            answered = 0
            while (await ask(gateway.url, alice, "remember me")).status_code == 200:
                answered += 1
            await wait_for_tokens(gateway.url, root, "alice", answered * CHAT_TOKENS)

            async def is_audited() -> bool:
                rows = (await read_audit(gateway.url, root, "key=alice"))["data"]
                return len(rows) == answered + 1

            await until(is_audited)
            gateway.process.kill()
            await gateway.process.wait()
        async with serve_process(tmp_path, engine_url, *flags) as gateway:
            refusal = await ask(gateway.url, alice, "remember me")
            left = read_budget(refusal.headers, "day")[1]
            rows = (await read_audit(gateway.url, root, "key=alice"))["data"]
            row = await wait_for_tokens(gateway.url, root, "alice", answered * CHAT_TOKENS)

    assert answered > 0
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "tokens_per_day")
    assert left == 50 - answered * CHAT_TOKENS
    assert row["prompt_tokens"] + row["completion_tokens"] == answered * CHAT_TOKENS
    assert len(rows) >= answered + 1
    assert {one["prompt"] for one in rows} == {"remember me"}


async def test_budget_that_is_raised_holds_at_once(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    settings = keys.write(alice="tokens_per_month = 30")
    async with serve(**settings, usage_database=str(tmp_path / "usage")) as served:
        await _use_up(served, keys.headers["alice"])
        text = keys.path.read_text().replace("tokens_per_month = 30", "tokens_per_month = 3000")
        keys.path.write_text(text)

        async def is_answered() -> bool:
            return bool((await ask(served.url, keys.headers["alice"])).status_code == 200)

        await until(is_answered)


def test_days_and_months_begin_at_midnight_of_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_767_225_599.5]  # half a second before 2026
    monkeypatch.setattr("gateway.records.periods.time.time", lambda: now[0])
    calendar = Calendar()
    before = calendar.today()
    now[0] += 1
    after = calendar.today()
    now[0] -= 1  # a clock that is set back

    assert (before, after) == (("2025-12-31", "2025-12"), ("2026-01-01", "2026-01"))
    assert calendar.today() == before
    assert 0 < count_seconds_left(month=False) <= DAY_S
    assert count_seconds_left(month=False) <= count_seconds_left(month=True) + 1


async def test_new_day_has_a_budget_of_its_own_and_its_month_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_767_187_800.0]  # 31 December 2025
    monkeypatch.setattr("gateway.records.periods.time.time", lambda: now[0])
    records, ledger = open_records({"usage_database": str(tmp_path / "usage")})
    try:

        def spent() -> tuple[int, int]:
            found = [ledger.find_spent("alice", month=month) for month in (False, True)]
            return found[0], found[1]

        now[0] -= DAY_S
        ledger.add_tokens("alice", "fake", 1, 2)
        assert spent() == (3, 3)
        await records._sync()
        assert spent() == (3, 3)
        now[0] += DAY_S
        assert spent() == (0, 3)
        ledger.add_tokens("alice", "fake", 0, 1)
        await records._sync()
        assert spent() == (1, 4)
        now[0] += DAY_S
        await records._sync()
        assert spent() == (0, 0)
    finally:
        await records.store.close()


async def test_budgets_do_not_need_the_redis_that_keeps_the_minutes(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    entries = {
        "alice": "tokens_per_day = 1000",
        "bob": "tokens_per_day = 1000\ntokens_per_minute = 1000",
    }
    kept = {"usage_database": str(tmp_path / "usage"), "redis_away": "refuse"}
    with run_redis(tmp_path) as redis:
        async with serve(**keys.write(**entries), **kept, redis_url=redis.url) as served:
            both = [await ask(served.url, keys.headers[name]) for name in entries]
            redis.kill()
            away = [await ask(served.url, keys.headers[name]) for name in entries]

            assert [one.status_code for one in both] == [200, 200]
            assert [one.status_code for one in away] == [200, 503]
            assert away[1].json()["error"]["code"] == "limits_away"


async def test_batch_waits_for_a_budget_and_goes_on_when_it_is_raised(
    serve: Serve, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.batches.runner._LONGEST_REFUSAL_S", 0.1)
    kept = {"usage_database": str(tmp_path / "usage"), "batch_folder": tmp_path / "batches"}
    async with serve(**keys.write(alice="tokens_per_day = 1"), **kept) as served:
        key = keys.headers["alice"]["Authorization"].removeprefix("Bearer ")
        async with open_batches(served, key) as batches:
            batch = await batches.create([write_line(1)])

            async def has_waited() -> bool:
                told = (await served.client.get("/metrics")).text
                return bool(re.search(r'batch_retries_total{code="tokens_per_day"} [1-9]', told))

            await until(has_waited)
            text = keys.path.read_text().replace("tokens_per_day = 1", "tokens_per_day = 1000")
            keys.path.write_text(text)
            ended = await batches.wait(batch)

            assert (ended.status, ended.request_counts.completed) == ("completed", 1)


async def test_whatever_becomes_of_a_call_gives_back_what_it_set_aside(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    settings = keys.write(alice="tokens_per_day = 1000000\nmax_concurrency = 2")
    headers = keys.headers["alice"]
    async with serve(**settings, usage_database=str(tmp_path / "usage")) as served:
        set_aside = served.app[LIMITS]._set_aside  # type: ignore[attr-defined]

        async def leave(path: str, body: dict[str, Any], *, is_refused_beside: bool) -> None:
            known = len(served.engine.calls)
            post = served.client.post(path, json=body, headers=headers)
            asked = asyncio.create_task(post)
            await until(lambda: len(served.engine.calls) > known)
            assert set_aside["alice"] > 0
            if is_refused_beside:
                refused = await ask(served.url, headers)
                assert refused.json()["error"]["code"] == "key_concurrency"
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await until(lambda: not set_aside)

        for status in (500, 400):
            served.engine.status = status
            assert (await ask(served.url, headers)).status_code >= 400
            await until(lambda: not set_aside)
        served.engine.status = 200
        assert (await ask(served.url, headers, max_tokens="x")).status_code == 400
        assert (await ask(served.url, headers, model="none")).status_code == 404
        served.engine.slots = asyncio.Semaphore(0)
        for is_stream in (False, True):
            chat = {"model": "fake", "prompt": "a", "stream": is_stream}
            await leave("/v1/completions", chat, is_refused_beside=False)
        predict = {"prompts": ["a", "b"], "max_tokens": 3}
        await leave("/predict", predict, is_refused_beside=True)


async def test_call_that_takes_too_long_gives_back_what_it_set_aside(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    settings = keys.write(alice="tokens_per_day = 1000000")
    folder = {"usage_database": str(tmp_path / "usage"), "engine_timeout_s": 0.5}
    async with serve(**settings, **folder) as served:
        served.engine.slots = asyncio.Semaphore(0)
        for is_stream in (False, True):
            answer = await ask(served.url, keys.headers["alice"], stream=is_stream)
            assert "engine_timeout" in answer.text
        await until(lambda: not served.app[LIMITS]._set_aside)  # type: ignore[attr-defined]
