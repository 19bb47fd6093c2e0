"""API keys: who may do what, how much of it, and what each has used."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import orjson
import pytest
import structlog

from common.web.addresses import is_loopback
from gateway.admission.accounts import ACCOUNTS
from gateway.admission.keys import KEYRING, Keyring, make_key
from gateway.admission.served_models import MODELS
from gateway.admission.throughput import Pace
from gateway.admission.tickets import LANES
from gateway.config import SettingsError
from gateway.engines.engine import hide_password
from lab.fuzz.raw_http import address, build_request
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, make_settings, until


def _keys_file(folder: Path, **extras: str) -> tuple[Path, dict[str, str]]:
    """A file with an entry for each name; the plain keys by name."""
    path, keys, text = folder / "keys.toml", {}, ""
    for name, extra in extras.items():
        keys[name], entry = make_key(name)
        text += f"{entry}{extra}\n\n"
    path.write_text(text)
    return path, keys


def _has_made(pace: Pace, begun: float, tokens: int) -> bool:
    """Whether an engine makes so many in the time since then."""
    return pace.count_tokens(time.perf_counter() - begun) >= tokens


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_key_missing_or_unknown_is_401_and_known_passes(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, alice="")
    async with serve(keys_file=path) as served:
        body = {"prompt": "a"}
        missing = await served.client.post("/predict", json=body)
        wrong = await served.client.post("/predict", json=body, headers=_bearer("vg-nope"))
        right = await served.client.post("/predict", json=body, headers=_bearer(keys["alice"]))
        anthropic = await served.client.post(
            "/predict", json=body, headers={"x-api-key": keys["alice"]}
        )

        assert (missing.status_code, missing.json()["error"]["code"]) == (401, "missing_key")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (right.status_code, anthropic.status_code) == (200, 200)
        assert (await served.client.get("/")).status_code == 200


async def test_keys_file_that_becomes_a_fifo_stops_nobody(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, alice="")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with serve(keys_file=path) as served:
        reload = served.app[KEYRING].reload
        fifo.replace(path)
        await asyncio.wait_for(reload(), 20)  # if the gateway has not been quicker
        answer = await served.client.post(
            "/predict", json={"prompt": "a"}, headers=_bearer(keys["alice"])
        )
        assert answer.status_code == 200


async def test_key_from_the_environment_passes(serve: Serve) -> None:
    async with serve(api_keys=("sk-one", "sk-two")) as served:
        answer = await served.client.post(
            "/predict", json={"prompt": "a"}, headers=_bearer("sk-two")
        )
        assert answer.status_code == 200
        assert "sk-two" not in repr(served.app)


async def test_key_may_use_only_its_routes_and_models(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, bob='routes = ["/v1/completions"]\nmodels = ["other"]')
    async with serve(keys_file=path) as served:
        headers = _bearer(keys["bob"])
        route = await served.client.post("/predict", json={"prompt": "a"}, headers=headers)
        model = await served.client.post(
            "/v1/completions", json={"model": "fake", "prompt": "a"}, headers=headers
        )

        assert (route.status_code, route.json()["error"]["code"]) == (403, "route_not_allowed")
        assert (model.status_code, model.json()["error"]["code"]) == (403, "model_not_allowed")


@pytest.mark.parametrize("path", ["/usage", "/ui/status", "/v1/models", "/v1/models/fake"])
async def test_key_limited_to_routes_reads_no_other(
    serve: Serve, tmp_path: Path, path: str
) -> None:
    path_of_file, keys = _keys_file(
        tmp_path, bob='routes = ["/predict"]\nadmin = true', root="admin = true"
    )
    async with serve(keys_file=path_of_file) as served:
        refused = await served.client.get(path, headers=_bearer(keys["bob"]))
        passed = await served.client.get(path, headers=_bearer(keys["root"]))

        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "route_not_allowed")
        assert passed.status_code == 200


async def test_key_requests_a_minute_are_limited(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, carl="requests_per_minute = 2", dora="")
    async with serve(keys_file=path) as served:

        async def ask(name: str) -> tuple[int, str | None]:
            answer = await served.client.post(
                "/predict", json={"prompt": "a"}, headers=_bearer(keys[name])
            )
            return answer.status_code, answer.headers.get("Retry-After")

        assert [(await ask("carl"))[0] for _ in range(2)] == [200, 200]
        status, retry_after = await ask("carl")
        assert status == 429
        assert retry_after is not None
        assert 1 <= int(retry_after) <= 30
        assert (await ask("dora"))[0] == 200


async def test_key_tokens_a_minute_count_streams_too(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, eve="tokens_per_minute = 10", root="admin = true")
    async with serve(keys_file=path) as served:
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        headers = _bearer(keys["eve"])
        first = await served.client.post("/v1/chat/completions", json=body, headers=headers)
        second = await served.client.post("/v1/chat/completions", json=body, headers=headers)

        assert first.status_code == 200
        assert "usage" not in first.text  # it was asked for by the gateway, not by the caller
        assert (second.status_code, second.json()["error"]["code"]) == (429, "tokens_per_minute")
        usage = (await served.client.get("/usage", headers=_bearer(keys["root"]))).json()
        assert usage["keys"]["eve"] == {
            "requests": 2,
            "prompt_tokens": 5,
            "completion_tokens": len("answer:hi"),
        }


async def test_key_is_charged_for_what_it_leaves_in_the_middle(
    serve: Serve, tmp_path: Path
) -> None:
    """Else its limit would hold for those alone who listen to the end."""
    path, keys = _keys_file(tmp_path, eve="tokens_per_minute = 1000", root="admin = true")
    async with serve(keys_file=path) as served:
        served.engine.stream_gap_s = served.engine.delay_s = 0.02
        body = {"model": "fake", "messages": [{"role": "user", "content": "x" * 400}]}
        headers, client = _bearer(keys["eve"]), served.client

        async def read_used() -> tuple[int, int]:
            usage = (await client.get("/usage", headers=_bearer(keys["root"]))).json()
            row = usage["keys"].get("eve", {"prompt_tokens": 0, "completion_tokens": 0})
            return row["prompt_tokens"], row["completion_tokens"]

        async with client.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True}, headers=headers
        ) as answer:
            chunks = answer.aiter_bytes()
            for _ in range(5):
                await anext(chunks)
        await until(lambda: served.engine.running == 0)
        taken, given = await read_used()
        assert taken >= 100
        assert given >= 5

        served.engine.delay_s = 30
        for url, asked in (("/v1/chat/completions", body), ("/predict", {"prompt": "y " * 50})):
            call = asyncio.create_task(client.post(url, json=asked, headers=headers))
            await until(lambda: served.engine.running == 1)
            call.cancel()
            await until(lambda: served.engine.running == 0)
            more, given_then = await read_used()
            assert more >= taken + 40
            assert given_then == given
            taken = more


@pytest.mark.parametrize("asks_for_usage", [False, True])
async def test_key_is_charged_for_tokens_and_not_for_chunks(
    serve: Serve, tmp_path: Path, asks_for_usage: bool
) -> None:
    """`stream_interval` puts many tokens into a chunk."""
    path, keys = _keys_file(tmp_path, eve="", root="admin = true")
    async with serve(keys_file=path) as served:
        served.engine.stream_gap_s = 0.05
        body = {
            "model": "fake",
            "messages": [{"role": "user", "content": "x" * 4000}],
            "stream": True,
            "stream_interval": 300,
        }
        if asks_for_usage:
            body["stream_options"] = {"include_usage": True}
        seen = b""
        async with served.client.stream(
            "POST", "/v1/chat/completions", json=body, headers=_bearer(keys["eve"])
        ) as answer:
            async for chunk in answer.aiter_bytes():
                seen += chunk
                if seen.count(b"data: ") >= 4:
                    break
        await until(lambda: served.engine.running == 0)

        assert b"usage" not in seen  # it is with each chunk, and was not asked for
        text = b"".join(part.split(b'"')[0] for part in seen.split(b'"content":"')[1:])
        usage = (await served.client.get("/usage", headers=_bearer(keys["root"]))).json()
        assert usage["keys"]["eve"]["completion_tokens"] >= len(text) > 600

        served.engine.stream_gap_s = 0.0
        whole = await served.client.post(
            "/v1/chat/completions", json=body, headers=_bearer(keys["eve"])
        )
        assert whole.text.count('"usage"') == asks_for_usage
        assert whole.text.endswith("data: [DONE]\n\n")


async def test_key_is_charged_for_the_time_of_a_whole_answer_that_it_leaves(
    serve: Serve, tmp_path: Path
) -> None:
    """Nothing is told of it; what other answers took in that time is known."""
    path, keys = _keys_file(tmp_path, eve="", root="admin = true")
    async with serve(keys_file=path) as served:
        served.client.headers.update(_bearer(keys["eve"]))
        assert (await served.chat("x" * 400, stream=True)).status_code == 200

        async def read_given() -> int:
            usage = await served.client.get("/usage", headers=_bearer(keys["root"]))
            return int(usage.json()["keys"]["eve"]["completion_tokens"])

        served.engine.delay_s = 60
        for most in (3, 5):
            before = await read_given()
            call = asyncio.create_task(served.chat("x", max_tokens=most))
            await until(lambda: served.engine.running == 1)
            pace, begun = served.app[ACCOUNTS]._pace, time.perf_counter()
            await until(partial(_has_made, pace, begun, most))
            call.cancel()
            await until(lambda: served.engine.running == 0)
            assert await read_given() == before + most  # and no more than were asked for


async def test_key_is_charged_for_what_the_engine_made_until_its_time_was_over(
    serve: Serve, tmp_path: Path
) -> None:
    """A call that takes too long has kept the engine busy for longest of all."""
    path, keys = _keys_file(tmp_path, eve="tokens_per_minute = 100000", root="admin = true")
    async with serve(keys_file=path, engine_timeout_s=1.0, max_prompts_per_call=1) as served:
        served.client.headers.update(_bearer(keys["eve"]))

        async def read_used() -> tuple[int, int]:
            usage = await served.client.get("/usage", headers=_bearer(keys["root"]))
            row = usage.json()["keys"]["eve"]
            return row["prompt_tokens"], row["completion_tokens"]

        served.app[ACCOUNTS]._pace.learn(1000, 1)  # a thousand tokens a second
        served.engine.stream_gap_s = 60
        taken, given = 0, 0
        chat, stream = partial(served.chat, "x" * 400), partial(served.chat, "x" * 400, stream=True)
        for delay_s, ask in ((60, chat), (0, stream), (60, partial(served.predict, "y " * 150))):
            served.engine.delay_s = delay_s
            assert "engine_timeout" in (await ask(max_tokens=50)).text
            then_taken, then_given = await read_used()
            assert then_taken >= taken + 100
            assert then_given == given + 50
            taken, given = then_taken, then_given
        served.engine.delay_s = 0
        served.engine.delays = lambda question: 60 if "y" in question else 0
        batch = await served.predict(["z", "y " * 150], max_tokens=50)
        while batch.status_code != 200:  # the one that is answered took too long, too
            taken, given = await read_used()
            batch = await served.predict(["z", "y " * 150], max_tokens=50)
        assert set(batch.json()["errors"]) == {"1"}
        then_taken, then_given = await read_used()
        assert then_taken >= taken + 100
        assert then_given == given + 2 + 50


async def test_slow_reader_does_not_tell_how_long_a_token_takes(serve: Serve) -> None:
    """Else whoever reads slowly would make it cheap for everybody to leave in the middle."""
    content = "x" * 8_000  # more than the gateway writes to who reads nothing
    body = {"model": "fake", "messages": [{"role": "user", "content": content}], "stream": True}
    async with serve(Behaviour(max_model_len=100_000)) as served:
        pace, engine, began = served.app[ACCOUNTS]._pace, served.engine, time.monotonic()
        pace.learn(10**6, 1)
        known = pace.count_tokens(10**6)
        loop = asyncio.get_running_loop()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            await loop.sock_connect(slow, address(served.url))
            request = build_request("POST", "/v1/chat/completions", orjson.dumps(body))
            await loop.sock_sendall(slow, request)
            at_last = -1
            while at_last != engine.streamed or not at_last:  # until nothing moves
                at_last = engine.streamed
                await asyncio.sleep(0.1)
            await asyncio.sleep(3 * (time.monotonic() - began))  # most of the time is the reader's
            while not (await loop.sock_recv(slow, 2**16)).endswith(b"0\r\n\r\n"):
                pass
        await until(lambda: served.app[ACCOUNTS].sum_usage().completion_tokens >= len(content))

        assert pace.count_tokens(10**6) == known
        engine.stream_gap_s = 0.005
        quick = await served.chat("x" * 40, stream=True)
        assert quick.status_code == 200
        assert pace.count_tokens(10**6) != known


async def test_key_tokens_a_minute_hold_for_calls_at_the_same_time(
    serve: Serve, tmp_path: Path
) -> None:
    path, keys = _keys_file(tmp_path, eve="tokens_per_minute = 1000")
    async with serve(keys_file=path) as served:
        served.client.headers.update(_bearer(keys["eve"]))
        served.engine.delay_s = 60
        calls = [asyncio.create_task(served.predict(f"{n}", max_tokens=300)) for n in range(2)] + [
            asyncio.create_task(served.chat(f"{n}", max_tokens=300)) for n in range(1)
        ]
        await until(lambda: served.engine.running == 3)

        for refused in (await served.predict("a", max_tokens=300), await served.chat("a")):
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (429, "tokens_per_minute")
        small = asyncio.create_task(served.chat("b", max_tokens=2))
        await until(lambda: served.engine.running == 4)

        for call in (*calls, small):
            call.cancel()
        await until(lambda: served.engine.running == 0)
        served.engine.delay_s = 0
        # What was set aside is there again; they have used next to nothing of it.
        assert (await served.predict("c", max_tokens=400)).status_code == 200


async def test_key_whose_batch_was_long_has_as_much_set_aside_as_one_answer_takes(
    serve: Serve, tmp_path: Path
) -> None:
    path, keys = _keys_file(tmp_path, eve="tokens_per_minute = 10000")
    async with serve(keys_file=path, max_tokens=20) as served:
        served.client.headers.update(_bearer(keys["eve"]))
        assert (await served.predict([f"{n}" for n in range(250)])).status_code == 200
        served.engine.delay_s = 60

        calls = [asyncio.create_task(served.chat(f"{n}")) for n in range(10)]

        await until(lambda: served.engine.running == 10)
        for call in calls:
            call.cancel()


async def test_batches_do_not_tell_how_long_a_token_takes(serve: Serve) -> None:
    async with serve() as served:
        pace = served.app[ACCOUNTS]._pace
        pace.learn(100, 1)
        for n in range(10):
            await served.predict([f"{n} {m}" for m in range(20)])

        assert pace.count_tokens(1) == 100


async def test_usage_needs_an_admin_key(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, fred="")
    async with serve(keys_file=path) as served:
        answer = await served.client.get("/usage", headers=_bearer(keys["fred"]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_admin")


async def test_thousands_of_keys_are_served_and_told_of(serve: Serve, tmp_path: Path) -> None:
    hashed = "hash = 'sha256:{:064x}'\nmax_concurrency = 2"
    entries = (f"[[keys]]\nname = 'k{n}'\n{hashed.format(n)}\n" for n in range(3000))
    key, entry = make_key("last")
    path = tmp_path / "keys.toml"
    path.write_text("".join(entries) + entry + "admin = true\nmax_concurrency = 2\n")
    async with serve(keys_file=path) as served:
        served.client.headers.update(_bearer(key))
        answers = [await served.predict("a")]
        answers += [await served.client.get(path) for path in ("/metrics", "/usage", "/ui/status")]

        assert [answer.status_code for answer in answers] == [200] * 4
        assert answers[2].json()["keys"]["last"]["requests"] == 2
        assert len(answers[2].json()["keys"]) == 3001


async def test_key_concurrency_is_limited_in_sequences(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, gina="max_concurrency = 3")
    async with serve(keys_file=path) as served:
        served.engine.delay_s = 0.3
        headers = _bearer(keys["gina"])

        def ask(prompts: list[str]) -> asyncio.Task[object]:
            call = served.client.post("/predict", json={"prompt": prompts}, headers=headers)
            return asyncio.create_task(call)

        first = ask(["a", "b"])
        await until(lambda: served.engine.running == 2)
        second = await ask(["c", "d"])
        assert second.status_code == 429  # type: ignore[attr-defined]
        assert second.json()["error"]["code"] == "key_concurrency"  # type: ignore[attr-defined]
        assert (await first).status_code == 200  # type: ignore[attr-defined]
        large = await ask(["e", "f", "g", "h"])
        assert large.status_code == 200  # type: ignore[attr-defined]


async def test_key_concurrency_counts_every_sequence_of_a_list(
    serve: Serve, tmp_path: Path
) -> None:
    """A list takes no more than a share of the places, and counts for all that it is."""
    path, keys = _keys_file(tmp_path, gina="max_concurrency = 10")
    async with serve(keys_file=path, max_running=8) as served:
        served.client.headers.update(_bearer(keys["gina"]))
        served.engine.delay_s = 60
        body = {"model": "fake", "prompt": ["a"] * 4, "n": 2}
        first = asyncio.create_task(served.client.post("/v1/completions", json=body))
        await until(lambda: served.engine.running == 8)

        refused = await served.chat("a", n=3)
        passing = asyncio.create_task(served.chat("a", n=2))
        await until(lambda: served.engine.running == 9)

        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_concurrency")
        for call in (first, passing):
            call.cancel()


async def test_key_concurrency_counts_what_takes_no_place(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, hugo="max_concurrency = 1")
    async with serve(keys_file=path) as served:
        served.client.headers.update(_bearer(keys["hugo"]))
        served.engine.delay_s = 0.5
        first = asyncio.create_task(served.predict("a"))
        await until(lambda: served.engine.running == 1)

        refused = await served.client.post("/tokenize", json={"prompt": "a b"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_concurrency")

        assert (await first).status_code == 200
        for _ in range(2):  # what it counted, it has given back
            passed = await served.client.post("/tokenize", json={"prompt": "a b"})
            assert passed.status_code == 200


async def test_keys_are_read_again_when_the_file_changes(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, old="")
    async with serve(keys_file=path) as served:

        async def status(key: str) -> int:
            answer = await served.client.post(
                "/predict", json={"prompt": "a"}, headers=_bearer(key)
            )
            return answer.status_code

        assert await status(keys["old"]) == 200
        path.write_text("[[keys]\n")
        os.utime(path, ns=(1, 1))
        await asyncio.sleep(0.15)
        assert await status(keys["old"]) == 200
        key, entry = make_key("new")
        path.write_text(entry)

        async def is_changed() -> bool:
            return await status(key) == 200 and await status(keys["old"]) == 401

        await until(is_changed)


async def test_key_taken_out_of_the_file_ends_what_it_has_running_and_waiting(
    serve: Serve, tmp_path: Path
) -> None:
    path, keys = _keys_file(tmp_path, gone="", stays="")
    body = {"model": "fake", "messages": [{"role": "user", "content": "x" * 400}], "stream": True}
    async with serve(keys_file=path, max_running=3) as served:
        served.engine.stream_gap_s = 0.05

        async def stream(name: str) -> str:
            answer = await served.client.post(
                "/v1/chat/completions", json=body, headers=_bearer(keys[name])
            )
            return answer.text

        gone, stays = asyncio.create_task(stream("gone")), asyncio.create_task(stream("stays"))
        await until(lambda: served.engine.running == 2)
        served.engine.delay_s = 60
        headers = _bearer(keys["gone"])
        running = asyncio.create_task(
            served.client.post("/predict", json={"prompt": "a"}, headers=headers)
        )
        await until(lambda: served.engine.running == 3)
        waiting = asyncio.create_task(
            served.client.post("/predict", json={"prompt": "b"}, headers=headers)
        )
        await until(lambda: served.app[MODELS].count("interactive")[1] == 1)

        path.write_text(path.read_text().partition("\n\n")[2])

        events = (await gone).split("\n\n")
        assert [
            orjson.loads(event[6:])["error"]["code"] for event in events if "error" in event
        ] == ["key_revoked"]
        assert events[-2:] == ["data: [DONE]", ""]
        for call in (running, waiting):
            answer = await call
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "key_revoked")
        await until(lambda: served.engine.running == 1)
        assert not stays.done()
        served.engine.stream_gap_s = 0.0
        assert "key_revoked" not in await stays
        assert [served.app[MODELS].count(lane) for lane in LANES] == [(0, 0), (0, 0)]


async def test_keys_file_of_tens_of_thousands_is_read_beside_the_requests(
    serve: Serve, tmp_path: Path
) -> None:
    """Told by what the event loop does in the meantime, not by a clock."""
    path, keys = _keys_file(tmp_path, alice="")
    async with serve(keys_file=path, reload_interval_s=3600) as served:
        hashed = "[[keys]]\nname = 'k{0}'\nhash = 'sha256:{0:064x}'\n"
        key, entry = make_key("last")
        path.write_text("".join(map(hashed.format, range(5000))) + entry)
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        with structlog.testing.capture_logs() as logs:
            os.utime(path, ns=(1, 1))
            reading = asyncio.create_task(served.app[KEYRING].reload())
            counting = asyncio.create_task(count_turns())
            await reading
            counting.cancel()

        assert turns > 5  # parsed on the loop it would be none or one
        assert [one["count"] for one in logs if one["event"] == "keys_reloaded"] == [5001]
        body = {"prompt": "a"}
        old = await served.client.post("/predict", json=body, headers=_bearer(keys["alice"]))
        new = await served.client.post("/predict", json=body, headers=_bearer(key))
        assert (old.status_code, new.status_code) == (401, 200)


@pytest.mark.parametrize("same", ["name", "key"])
def test_key_of_the_environment_and_of_the_file_stops_the_start(tmp_path: Path, same: str) -> None:
    digest = hashlib.sha256(b"other").hexdigest()
    key, entry = make_key(f"key-{digest[:8]}" if same == "name" else "alice")
    path = tmp_path / "keys.toml"
    path.write_text(entry)
    settings = make_settings(keys_file=path, api_keys=("other" if same == "name" else key,))

    with pytest.raises(SettingsError, match="GATEWAY_API_KEYS"):
        Keyring(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[keys]]\nname = 'a'", "key 1 \\(a\\) has no hash"),
        ("[[keys]]\nname = 'a'\nhash = 'plain'", "key 1: hash"),
        ("[[keys]]\nname = 'a'\nhash = 'x'\nrpm = 1", "key 1: "),
        ("keys", "cannot read"),
        ("keys = 3", "holds \\[\\[keys\\]\\] entries"),
        ("key = []", "holds \\[\\[keys\\]\\] entries"),
    ],
)
def test_keys_file_that_is_bad_stops_the_start(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)

    with pytest.raises(SettingsError, match=message):
        Keyring(make_settings(keys_file=path))


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "0.0.0.0", "allow_anonymous": True}, False),
        ({"host": "0.0.0.0", "api_keys": ("k",)}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "::1"}, False),
    ],
)
def test_open_gateway_leaves_the_loopback_only_when_told(
    settings: dict[str, object], is_refused: bool
) -> None:
    if is_refused:
        with pytest.raises(SettingsError, match="GATEWAY_ALLOW_ANONYMOUS"):
            Keyring(make_settings(**settings))
    else:
        Keyring(make_settings(**settings))


def test_new_key_is_printed_once_and_only_its_hash_is_stored() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "gateway", "new-key", "alice"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert made.stdout.startswith('[[keys]]\nname = "alice"\nhash = "sha256:')
    key = made.stderr.split()[-1]
    assert key.startswith("vg-")
    assert key not in made.stdout


@pytest.mark.parametrize(
    ("host", "is_near"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("127.evil.example", False),
        ("::", False),
    ],
)
def test_loopback_is_an_address_not_a_beginning(host: str, is_near: bool) -> None:
    assert is_loopback(host) is is_near


def test_address_of_an_engine_is_told_without_its_password() -> None:
    assert hide_password("http://me:pw@host:81/base") == "http://host:81/base"
    assert hide_password("http://host:81") == "http://host:81"
