"""What GET /metrics tells is what is declared, and what happened."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from common.ports import find_free_ports
from gateway.admission.keys import make_key
from gateway.config import SettingsError
from gateway.engines.pool import POOL
from gateway.observability.metrics import (
    GAP_SECONDS,
    SECONDS,
    LoopCounter,
    LoopHistogram,
    Metrics,
    list_metrics,
)
from gateway.observability.request_record import RequestRecord, StreamTiming
from lab.fuzz.raw_http import ask, build_request
from lab.records.record import RecordFigure, take_record, write_record
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, Served, make_settings, serve_gateway, until
from tests.plain_http import NO_TLS

STREAM = {"model": "fake", "prompt": "a", "max_tokens": 3, "stream": True}
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"}


def parse(text: str) -> dict[str, tuple[str, str, set[tuple[str, ...]]]]:
    """Type, meaning and label names (without a bucket's) of each family."""
    families = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {
            tuple(label for label in sample.labels if label != "le") for sample in family.samples
        }
        families[name] = (family.type, family.documentation, labels)
    return families


async def read(served: Served) -> str:
    return (await served.client.get("/metrics")).text


def open_metrics_port(port: int) -> httpx.AsyncClient:
    url = f"http://127.0.0.1:{port}"
    return httpx.AsyncClient(base_url=url, trust_env=False, verify=NO_TLS, timeout=20)


async def number(served: Served, series: str) -> float:
    """One series, written as it is exported."""
    found = [line for line in (await read(served)).splitlines() if line.startswith(series + " ")]
    assert len(found) == 1, f"{series}: {found}"
    return float(found[0].rpartition(" ")[2])


async def cause_everything(served: Served) -> None:
    """At least one sample of each figure."""
    await served.predict(["a", "b", "b", ""])
    await served.client.post("/v1/completions", json=STREAM)
    await served.client.get("/nowhere")
    served.engine.cuts_connection = True
    await served.predict("lost by the one, answered by the other")
    for engine in served.all_engines:
        engine.cuts_connection, engine.stream_cut_after = False, 2
    await until(lambda: served.app[POOL].is_ready)
    await served.client.post("/v1/completions", json=STREAM)


async def test_exported_figures_are_those_declared(serve: Serve, tmp_path: Path) -> None:
    record = keep_grade(tmp_path / "grade.json")
    async with serve(Behaviour(), Behaviour(), grade_record=record) as served:
        await cause_everything(served)
        await asyncio.sleep(0.6)  # a beat of the pulse
        families = parse(await read(served))

    assert families == {
        one.name: (one.kind, one.meaning, {tuple(sorted(one.labels))}) for one in list_metrics()
    }


async def test_metrics_are_openmetrics_for_who_asks_and_text_for_others(served: Served) -> None:
    await served.predict("a")

    plain = await served.client.get("/metrics", headers={"Accept": "*/*"})
    asked = await served.client.get("/metrics", headers=OPENMETRICS)

    assert plain.headers["Content-Type"].startswith("text/plain; version=")
    assert "# TYPE gateway_requests_total counter" in plain.text
    assert asked.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "# TYPE gateway_requests counter" in asked.text
    assert asked.text.endswith("# EOF\n")
    assert "_created" not in plain.text + asked.text


@pytest.mark.parametrize(
    "version", ["abc", "x.y", "2.x", "", '"1.0.0"', "1..0", "9" * 5000, "3.\xff", "3.\u0661"]
)
@pytest.mark.parametrize("form", ["application/openmetrics-text", "text/plain"])
async def test_metrics_in_a_version_that_is_none_are_plain_text(
    served: Served, form: str, version: str
) -> None:
    accept = f"{form};version={version}".encode("utf-8" if "\u0661" in version else "latin-1")
    request = build_request("GET", "/metrics", headers=[("Accept", accept)])
    answer = await ask(served.url, request, "GET")

    assert answer.status == 200
    assert b"gateway_build_info{" in answer.body
    assert answer.headers["content-type"].startswith("text/plain; version=")


async def test_metrics_tell_no_password_of_an_engine() -> None:
    async with serve_app(build_fake_engine(Behaviour())) as url:
        secret = url.replace("//", "//me:hunter2@")
        async with serve_gateway(engines=(secret,)) as served:
            await cause_everything(served)
            text = await read(served)

    assert f'gateway_engine_failures_total{{engine="{url}"}}' in text
    assert f'gateway_breaker_trips_total{{engine="{url}"}}' in text
    assert "hunter2" not in text
    assert "me:" not in text


async def test_stream_is_observed_once_however_many_chunks(serve: Serve) -> None:
    async with serve(Behaviour(stream_gap_s=0.02)) as served:
        await served.client.post("/v1/completions", json=STREAM)

        count = 'gateway_{}_seconds_count{{route="/v1/completions"}}'
        for name in ("request", "queue", "first_chunk", "chunk_gap", "longest_chunk_gap"):
            assert await number(served, count.format(name)) == 1, name
        total = 'gateway_{}_seconds_sum{{route="/v1/completions"}}'
        mean = await number(served, total.format("chunk_gap"))
        longest = await number(served, total.format("longest_chunk_gap"))
        assert 0.015 <= mean <= longest


async def test_what_did_not_wait_or_stream_is_not_observed_as_if(served: Served) -> None:
    await served.predict("a")
    await served.client.post("/predict", content=b"{")

    text = await read(served)

    assert 'gateway_request_seconds_count{route="/predict"} 2.0' in text
    assert 'gateway_queue_seconds_count{route="/predict"} 1.0' in text
    assert 'gateway_chunk_gap_seconds_count{route="/predict"} 0.0' in text


def list_values(text: str, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """A metric's samples by some of their labels."""
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


async def test_series_that_panels_read_begin_at_nought(served: Served) -> None:
    """One that is born with its first count hides that count from `rate`."""
    text = await read(served)

    requests = list_values(text, "gateway_requests_total", "route", "status")
    errors = list_values(text, "gateway_errors_total", "route", "code", "source")
    for route in ("/predict", "/v1/chat/completions", "/v1/models/{model}", "/tokenize"):
        assert {status for path, status in requests if path == route} >= {"200", "400", "502"}
        known = {(code, source) for path, code, source in errors if path == route}
        assert known >= {
            ("engine_failed", "engine"),
            ("engine_unreachable", "engine"),
            ("not_ready", "gateway"),
            ("internal_error", "gateway"),
            ("http_500", "engine"),
            ("caller_gone", "caller"),
        }
    assert {route for route, _ in requests} & {"/", "/metrics", "/ui", "/ui/{file}"} == set()
    routes = {
        name: {route for (route,) in list_values(text, f"gateway_{name}_seconds_count", "route")}
        for name in ("request", "queue", "first_chunk", "chunk_gap", "longest_chunk_gap")
    }
    for name in ("request", "queue"):
        assert routes[name] >= {"/predict", "/v1/completions", "/v1/embeddings"}
        assert "/tokenize" not in routes[name]
    for name in ("first_chunk", "chunk_gap", "longest_chunk_gap"):
        assert "/v1/chat/completions" in routes[name]
        assert not routes[name] & {"/predict", "/v1/embeddings"}
    broken = list_values(text, "gateway_broken_streams_total", "route")
    assert ("/v1/chat/completions",) in broken
    failed = list_values(text, "gateway_prompts_failed_total", "code")
    assert failed.keys() >= {("empty_prompt",), ("engine_failed",), ("prompt_too_long",)}
    for values in (requests, errors, broken, failed):
        assert set(values.values()) == {0.0}


async def test_series_at_the_start_are_not_thousands(served: Served) -> None:
    """Each scrape is written by the event loop."""
    text = await read(served)

    assert sum(not line.startswith("#") for line in text.splitlines()) < 1500


@pytest.mark.parametrize(
    ("path", "body", "code", "source"),
    [
        ("/v1/completions", b"{", "invalid_json", "caller"),
        ("/v1/completions", b'{"model": "fake", "prompt": "bad"}', "http_400", "caller"),
        ("/predict", b'{"prompt": "bad"}', "engine_refused", "caller"),
        ("/predict", b'{"prompt": "a", "top_p": 7}', "invalid_value", "caller"),
        ("/v1/completions", b'{"model": "fake", "prompt": "lost"}', "http_500", "engine"),
    ],
)
async def test_error_is_counted_with_who_failed(
    serve: Serve, path: str, body: bytes, code: str, source: str
) -> None:
    """Whatever is answered by a 4xx, by whom ever it is found, is the caller's."""
    async with serve(Behaviour(refuses=lambda question: question == "bad")) as served:
        if b"lost" in body:
            served.engine.status = 500
        answer = await served.client.post(path, content=body)

        assert answer.status_code == (500 if b"lost" in body else 400)
        labels = f'code="{code}",route="{path}",source="{source}"'
        assert await number(served, f"gateway_errors_total{{{labels}}}") == 1


async def test_unknown_path_is_the_callers_error(served: Served) -> None:
    await served.client.get("/nowhere")

    labels = 'code="not_found",route="other",source="caller"'
    assert await number(served, f"gateway_errors_total{{{labels}}}") == 1


async def test_what_a_gateway_that_stops_turns_away_is_counted_apart(served: Served) -> None:
    """`not_ready` to callers, but no failure."""
    served.app[POOL].draining = True

    answer = await served.predict("a")

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    labels = 'code="stopping",route="/predict",source="gateway"'
    assert await number(served, f"gateway_errors_total{{{labels}}}") == 1
    assert await number(served, 'gateway_refused_total{reason="stopping"}') == 1
    assert await number(served, 'gateway_refused_total{reason="not_ready"}') == 0


@pytest.mark.parametrize(
    ("status", "code", "source"),
    [(400, "engine_refused", "caller"), (500, "engine_failed", "engine")],
)
async def test_error_within_a_stream_is_counted_with_who_failed(
    served: Served, status: int, code: str, source: str
) -> None:
    served.engine.stream_error = {"message": "no", "code": status}

    await served.client.post("/v1/completions", json=STREAM)

    labels = f'code="{code}",route="/v1/completions",source="{source}"'
    assert await number(served, f"gateway_errors_total{{{labels}}}") == 1


async def test_gateway_that_fails_within_a_stream_is_not_a_caller_who_left(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_chunk: bytes) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("gateway.streaming.parse_usage", fail)
    with pytest.raises(httpx.RemoteProtocolError):
        await served.client.post("/v1/completions", json=STREAM)

    labels = 'code="internal_error",route="/v1/completions",source="gateway"'
    assert await number(served, f"gateway_errors_total{{{labels}}}") == 1


async def test_stream_that_breaks_is_an_error_although_its_status_was_200(served: Served) -> None:
    served.engine.stream_cut_after = 2

    await served.client.post("/v1/completions", json=STREAM)

    labels = 'code="engine_failed",route="/v1/completions",source="engine"'
    assert await number(served, f"gateway_errors_total{{{labels}}}") == 1
    requests = 'gateway_requests_total{route="/v1/completions",status="200"}'
    assert await number(served, requests) == 1
    assert await number(served, 'gateway_broken_streams_total{route="/v1/completions"}') == 1


async def test_caller_who_hangs_up_is_counted_as_such(serve: Serve) -> None:
    async with serve(Behaviour(delay_s=1)) as served:
        asking = asyncio.create_task(served.predict("a"))
        await until(lambda: served.engine.running)
        asking.cancel()
        labels = 'code="caller_gone",route="/predict",source="caller"'

        async def is_counted() -> bool:
            return f"gateway_errors_total{{{labels}}} 1.0" in await read(served)

        await until(is_counted)


@pytest.mark.parametrize(
    ("settings", "headers", "reason"),
    [
        ({"api_keys": ("k",)}, {}, "missing_key"),
        ({"api_keys": ("k",)}, {"Authorization": "Bearer x"}, "invalid_api_key"),
        ({"max_running": 1, "max_waiting": 0}, {}, "overloaded"),
        ({"max_running": 1, "queue_timeout_s": 0.05}, {}, "queue_timeout"),
    ],
)
async def test_refusal_is_counted_by_its_reason(
    serve: Serve, settings: dict[str, Any], headers: dict[str, str], reason: str
) -> None:
    async with serve(Behaviour(delay_s=0.3), **settings) as served:
        series = f'gateway_refused_total{{reason="{reason}"}}'
        assert await number(served, series) == 0  # there from the start, for `increase`

        post = served.client.post
        answers = await asyncio.gather(
            *(post("/predict", json={"prompt": str(n)}, headers=headers) for n in range(2))
        )

        refused = [answer for answer in answers if answer.status_code in {401, 429}]
        assert 0 < len(refused) == await number(served, series)


async def test_breaker_is_seen_opening_and_closing(serve: Serve) -> None:
    settings = {"breaker_failures": 2, "breaker_pause_s": 0.4, "max_attempts": 1}
    async with serve(Behaviour(), Behaviour(), **settings) as served:
        engine = f'{{engine="{served.engine_url}"}}'
        opened = f"gateway_engine_breaker_open{engine}"
        assert await number(served, opened) == 0
        served.engine.cuts_connection = True

        for attempt in range(6):
            await served.predict(f"{attempt}", temperature=0.5)
            await until(lambda: not served.app[POOL].engines[0].suspect.is_set())

        assert await number(served, opened) == 1
        assert await number(served, f"gateway_engine_failures_total{engine}") >= 2
        assert await number(served, f"gateway_breaker_trips_total{engine}") >= 1

        async def is_closed() -> bool:
            return await number(served, opened) == 0

        await until(is_closed)


async def test_failed_warmup_is_counted_and_a_good_one_timed(serve: Serve) -> None:
    async with serve(Behaviour(status=500), wait_ready=False) as served:
        engine = f'engine="{served.engine_url}"'
        failed = f'gateway_warmups_total{{{engine},outcome="failed"}}'

        async def has_failed() -> bool:
            return await number(served, failed) >= 1

        await until(has_failed)
        assert await number(served, f"gateway_engine_ready{{{engine}}}") == 0
        served.engine.status = 200
        await until(lambda: served.app[POOL].is_ready)

        assert await number(served, f'gateway_warmups_total{{{engine},outcome="done"}}') == 1
        assert 0 < await number(served, f"gateway_warmup_seconds{{{engine}}}") < 5
        assert await number(served, f'gateway_engine_state{{{engine},state="ready"}}') == 1


async def test_engine_that_left_the_settings_leaves_the_figures(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour()) as served:
        kept, gone = served.app[POOL].engines
        assert f'gateway_engine_ready{{engine="{gone.url}"}} 1.0' in await read(served)

        await served.app[POOL].set_engines([kept])

        assert f'gateway_engine_ready{{engine="{gone.url}"}}' not in await read(served)


async def test_last_batch_is_that_of_the_last_list(served: Served) -> None:
    await served.predict(["a", "b", "c"])
    await served.predict("alone")

    assert await number(served, "gateway_last_batch_prompts") == 3
    assert await number(served, "gateway_last_batch_tokens") == 6
    assert await number(served, "gateway_last_batch_characters") == 3 * len("answer:a")
    assert 0 < await number(served, "gateway_last_batch_seconds") < 5
    answers = 3 * len("answer:a") + len("answer:alone")
    assert await number(served, "gateway_predict_characters_total") == answers


def keep_grade(path: Path) -> Path:
    """As `python -m lab grade --record` does."""
    figures = (
        RecordFigure("ROUGE-L, course reading", 0.75),
        RecordFigure("tokens/s", 70_940.0, "/s"),
    )
    write_record(take_record("Grade of demo", figures, command="x", machine="y"), path)
    return path


async def test_last_grade_is_told_as_soon_as_there_is_one(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "grade.json"
    async with serve(grade_record=path) as served:
        assert "gateway_grade{" not in await read(served)

        keep_grade(path)

        score = 'gateway_grade{figure="ROUGE-L, course reading",unit=""}'
        assert await number(served, score) == 0.75
        assert await number(served, 'gateway_grade{figure="tokens/s",unit="/s"}') == 70940
        taken = await number(served, 'gateway_grade_timestamp_seconds{name="Grade of demo"}')
        assert -1 <= time.time() - taken <= 61  # to the minute

        path.write_text("{}")
        assert "gateway_grade{" not in await read(served)


async def test_usage_of_many_keys_is_bounded(serve: Serve, tmp_path: Path) -> None:
    keys = dict(make_key(f"user-{number}") for number in range(5))
    (tmp_path / "keys.toml").write_text("".join(keys.values()))
    (port,) = find_free_ports(1)
    options = {"keys_file": tmp_path / "keys.toml", "metrics_keys": 2, "metrics_port": port}
    async with serve(**options) as served, open_metrics_port(port) as port_alone:
        for key in keys:
            headers = {"Authorization": f"Bearer {key}"}
            await served.client.post("/predict", json={"prompt": "a"}, headers=headers)
        text = (await port_alone.get("/metrics")).text

        assert 'gateway_usage_requests_total{key="user-1"} 1.0\n' in text
        assert 'gateway_usage_requests_total{key="(others)"} 3.0\n' in text
        assert 'gateway_usage_tokens_total{direction="out",key="(others)"} 6.0\n' in text
        assert 'key="user-2"' not in text


@pytest.mark.parametrize("accept", ["*/*", OPENMETRICS["Accept"]])
async def test_names_of_keys_are_told_on_the_inner_port_alone(
    serve: Serve, tmp_path: Path, accept: str
) -> None:
    keys = dict(make_key(name) for name in ("alice", "bob"))
    (tmp_path / "keys.toml").write_text("admin = true\n".join(keys.values()))
    (port,) = find_free_ports(1)
    options = {"keys_file": tmp_path / "keys.toml", "metrics_port": port}
    async with serve(**options) as served, open_metrics_port(port) as port_alone:
        for key in keys:
            headers = {"Authorization": f"Bearer {key}"}
            await served.client.post("/predict", json={"prompt": "a"}, headers=headers)
        public = (await served.client.get("/metrics", headers={"Accept": accept})).text
        told = (await port_alone.get("/metrics", headers={"Accept": accept})).text

        assert "alice" not in public
        assert "bob" not in public
        assert 'gateway_usage_requests_total{key="(all)"} 2.0\n' in public
        assert public.count("gateway_usage_tokens_total{") == 2
        assert 'gateway_usage_tokens_total{direction="out",key="(all)"} 4.0\n' in public
        for name in ("alice", "bob"):
            assert f'gateway_usage_requests_total{{key="{name}"}} 1.0\n' in told
        # Whatever else is told is told on both.
        assert [line for line in public.splitlines() if line.startswith("# ")] == [
            line for line in told.splitlines() if line.startswith("# ")
        ]


async def test_inner_port_serves_the_figures_and_nothing_else(serve: Serve) -> None:
    (port,) = find_free_ports(1)
    async with serve(metrics_port=port) as served, open_metrics_port(port) as port_alone:
        codes = {
            path: (await port_alone.get(path)).status_code
            for path in ("/metrics", "/", "/v1/models", "/ui", "/ui/status", "/usage")
        }
        predicted = await port_alone.post("/predict", json={"prompt": "a"})

        assert {path for path, code in codes.items() if code != 404} == {"/metrics"}
        assert predicted.status_code == 404
        assert served.engine.calls == []
    async with open_metrics_port(port) as port_alone:
        with pytest.raises(httpx.ConnectError):
            await port_alone.get("/metrics")


async def test_inner_port_that_is_taken_stops_the_start(serve: Serve) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(SettingsError, match=f"127.0.0.1:{port} .* GATEWAY_METRICS_PORT"):
            async with serve(metrics_port=port):
                pass


def test_inner_port_cannot_be_the_public_one() -> None:
    with pytest.raises(ValidationError, match="another than port"):
        make_settings(port=8000, metrics_port=8000)


async def test_loop_that_is_held_up_shows_as_lag(served: Served) -> None:
    await asyncio.sleep(0.1)
    ends_s = time.thread_time() + 1.0
    while time.thread_time() < ends_s:  # this is the fault
        pass

    async def is_seen() -> bool:
        return await number(served, "gateway_event_loop_lag_seconds_sum") >= 0.3

    await until(is_seen)


async def test_settings_and_limits_are_told() -> None:
    async with serve_gateway(max_running=77, routing="prefix") as one:
        first = await read(one)
    async with serve_gateway(
        max_running=78, routing="prefix", api_keys=("not-to-be-told",)
    ) as other:
        second = await read(other)

    assert "gateway_max_running_sequences 77.0" in first
    assert 'routing="prefix"' in first
    marks = {
        text.partition('gateway_config_info{dedup="true",fingerprint="')[2][:12]
        for text in (first, second)
    }
    assert len(marks) == 2
    assert "not-to-be-told" not in second


@pytest.mark.parametrize("buckets", [SECONDS, GAP_SECONDS])
def test_buckets_fit_a_small_model(buckets: tuple[float, ...]) -> None:
    """Each decade in which its figures lie has steps of its own."""
    assert list(buckets) == sorted(set(buckets))
    for decade in (0.001, 0.01, 0.1):
        assert sum(decade <= bound < 10 * decade for bound in buckets) >= 3


def test_counting_a_request_takes_microseconds() -> None:
    metrics = Metrics()
    stream = StreamTiming()
    record = RequestRecord("/v1/completions", stream=stream)
    record.note_queued()
    record.note_entered()
    for _ in range(3):
        stream.note_chunk()

    def count() -> float:
        began = time.perf_counter()
        for _ in range(1000):
            metrics.count_request(record, 200, 0.01)
        return time.perf_counter() - began

    assert min(count() for _ in range(5)) / 1000 < 50e-6


def test_figures_without_a_lock_count_what_those_with_one_do() -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    kinds = (Counter, Histogram), (LoopCounter, LoopHistogram)
    for registry, (counter, histogram) in zip(registries, kinds, strict=True):
        counted = counter("counted", "text", ["route"], registry=registry).labels("/")
        times = histogram("times", "text", ["route"], buckets=(0.5, 1, 5), registry=registry)
        for value in (0.0, 0.1, 0.5, 0.50001, 1, 5, 5.1, 1e9):
            counted.inc()
            counted.inc(value)
            times.labels("/").observe(value)
            times.labels("/").observe(value, {"trace_id": "a"})

    locked, free = (generate_latest(registry) for registry in registries)

    def drop_created(text: bytes) -> list[bytes]:
        return [line for line in text.splitlines() if b"_created" not in line]

    assert drop_created(free) == drop_created(locked)
    assert b'times_bucket{le="+Inf",route="/"} 16.0' in free


async def test_many_series_are_collected_in_steps() -> None:
    metrics = Metrics()
    many = [f"key {number}" for number in range(20_000)]
    metrics.usage_requests.read = lambda: [((key,), 1.0) for key in many]
    metrics.usage_tokens.read = lambda: [((key, "in"), 1.0) for key in many]
    steps = 0

    async def count_steps() -> None:
        nonlocal steps
        while True:
            steps += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_steps())
    families = await metrics._collect(by_key=True)
    counting.cancel()

    assert steps >= 2
    assert sum(len(family.samples) for family in families) > 40_000
