"""A request followed: its id, the caller's W3C context, and spans where they are wanted."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from gateway.app import build_app
from gateway.config import SettingsError
from tests.collector import Collector, SeenSpan, serve_collector
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, make_settings, serve_gateway, until

ROOT = Path(__file__).parents[3]
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {
    "x-request-id": "from-the-caller",
    "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01",
    "tracestate": "vendor=kept",
}
COMPLETION = {"model": "fake", "prompt": "a", "max_tokens": 3}


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    async with serve_collector() as running:
        yield running


@contextlib.asynccontextmanager
async def serve_traced(collector: Collector, *engines: Behaviour) -> AsyncIterator[Served]:
    async with serve_gateway(*engines, otlp_endpoint=collector.url) as served:
        yield served


def read_headers(engine: Behaviour) -> list[dict[str, str]]:
    """What the engine was sent with each call."""
    return [{name.lower(): text for name, text in sent.items()} for sent in engine.headers]


async def wait_request(collector: Collector, name: str) -> SeenSpan:
    """The request's own span, which ends last."""
    await until(lambda: collector.named(name))
    return collector.named(name)[-1]


@pytest.mark.parametrize(
    ("path", "body"), [("/predict", {"prompt": ["a", "b"]}), ("/v1/completions", COMPLETION)]
)
async def test_engine_gets_the_callers_id_and_context_without_spans(
    served: Served, path: str, body: dict[str, object]
) -> None:
    answer = await served.client.post(path, json=body, headers=CALLER)

    assert answer.headers["X-Request-Id"] == "from-the-caller"
    seen = read_headers(served.engine)[-1]
    assert {name: seen[name] for name in CALLER} == CALLER


async def test_calls_of_one_request_have_names_of_their_own(serve: Serve) -> None:
    async with serve(max_prompts_per_call=2) as served:
        await served.client.post("/predict", json={"prompt": list("abcde")}, headers=CALLER)

        names = sorted(seen["x-request-id"] for seen in read_headers(served.engine))
        assert names == ["from-the-caller", "from-the-caller.2", "from-the-caller.3"]


async def test_warmup_is_called_so_in_the_engines_log(serve: Serve) -> None:
    engine = Behaviour()
    async with serve(engine, wait_ready=False):
        await until(lambda: engine.headers)

        assert read_headers(engine)[0]["x-request-id"].startswith("warmup-")


@pytest.mark.parametrize(
    ("path", "body"), [("/predict", {"prompt": ["a", "b"]}), ("/v1/completions", COMPLETION)]
)
async def test_spans_are_request_over_queue_and_engine(
    collector: Collector, path: str, body: dict[str, object]
) -> None:
    async with serve_traced(collector, Behaviour(delay_s=0.05)) as served:
        await served.client.post(path, json=body, headers=CALLER)

        request = await wait_request(collector, f"POST {path}")
        (queue,), (engine,) = collector.named("queue"), collector.named("engine")
        sent = read_headers(served.engine)[-1]

    assert (request.trace_id, request.parent_id) == (TRACE_ID, PARENT_ID)
    assert request.service == "vllm-gateway"
    assert {queue.parent_id, engine.parent_id} == {request.span_id}
    assert {queue.trace_id, engine.trace_id} == {TRACE_ID}
    assert sent["traceparent"] == f"00-{TRACE_ID}-{engine.span_id}-01"
    assert sent["tracestate"] == "vendor=kept"
    assert request.attributes["gateway.request_id"] == sent["x-request-id"] == "from-the-caller"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["gen_ai.usage.output_tokens"] > 0
    assert request.began_ns <= queue.began_ns <= queue.ended_ns <= engine.ended_ns
    assert engine.ended_ns - engine.began_ns >= 0.05e9
    assert not any(span.is_error for span in collector.spans)


async def test_span_of_a_stream_lasts_to_its_end_and_counts_chunks(collector: Collector) -> None:
    async with serve_traced(collector, Behaviour(stream_gap_s=0.01)) as served:
        await served.client.post("/v1/completions", json=COMPLETION | {"stream": True})

        request = await wait_request(collector, "POST /v1/completions")

    (engine,) = collector.named("engine")
    assert request.parent_id == ""
    assert engine.ended_ns - engine.began_ns >= 0.07e9
    assert request.attributes["gateway.chunks"] >= 2


async def test_span_of_a_call_that_was_lost_says_so_and_a_second_follows(
    collector: Collector,
) -> None:
    async with serve_traced(collector, Behaviour(), Behaviour()) as served:
        served.engine.cuts_connection = True
        answer = await served.client.post("/predict", json={"prompt": "a"})

        request = await wait_request(collector, "POST /predict")

    assert answer.json() == {"response": "answer:a"}
    lost, kept = sorted(collector.named("engine"), key=lambda span: span.began_ns)
    assert (lost.is_error, kept.is_error, request.is_error) == (True, False, False)
    assert lost.attributes["server.address"] != kept.attributes["server.address"]


async def test_span_of_a_refused_request_tells_the_code(collector: Collector) -> None:
    async with serve_traced(collector) as served:
        await served.client.post("/predict", content=b"{", headers=CALLER)

        request = await wait_request(collector, "POST /predict")

    assert request.attributes["error.type"] == "invalid_json"
    assert request.attributes["http.response.status_code"] == 400
    assert not request.is_error  # the caller's mistake is no failure of the gateway
    assert collector.named("engine") == []


async def test_span_of_a_caller_who_hung_up_ends_too(collector: Collector) -> None:
    async with serve_traced(collector, Behaviour(delay_s=5)) as served:
        with pytest.raises(httpx.ReadTimeout):
            await served.client.post("/v1/completions", json=COMPLETION, timeout=0.2)

        request = await wait_request(collector, "POST /v1/completions")

    assert request.attributes["http.response.status_code"] == 499
    assert collector.named("engine")[0].is_error


async def test_unsampled_caller_makes_no_spans(collector: Collector) -> None:
    unsampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    async with serve_traced(collector) as served:
        await served.client.post("/v1/completions", json=COMPLETION, headers=unsampled)
        sent = read_headers(served.engine)[-1]["traceparent"]
        await served.client.post("/predict", json={"prompt": "a"})
        await wait_request(collector, "POST /predict")

    assert sent.startswith(f"00-{TRACE_ID}-")
    assert sent.endswith("-00")
    assert collector.named("POST /v1/completions") == []


async def test_probes_make_no_spans(collector: Collector) -> None:
    async with serve_traced(collector) as served:
        for path in ("/", "/readyz", "/metrics"):
            await served.client.get(path)
        await served.client.post("/predict", json={"prompt": "a"})
        await wait_request(collector, "POST /predict")

    assert {span.name for span in collector.spans} == {"POST /predict", "queue", "engine"}


async def test_exemplars_lead_from_a_figure_to_its_trace(collector: Collector) -> None:
    async with serve_traced(collector) as served:
        body = COMPLETION | {"stream": True}
        await served.client.post("/v1/completions", json=body, headers=CALLER)
        wanted = {"Accept": "application/openmetrics-text; version=1.0.0"}
        text = (await served.client.get("/metrics", headers=wanted)).text

    for name in ("request", "queue", "first_chunk", "chunk_gap", "longest_chunk_gap"):
        lines = [line for line in text.splitlines() if f"gateway_{name}_seconds_bucket" in line]
        assert any(f'# {{trace_id="{TRACE_ID}"}}' in line for line in lines), name


async def test_collector_that_is_away_costs_neither_answers_nor_the_stop() -> None:
    async with serve_gateway(otlp_endpoint="http://127.0.0.1:9") as served:
        answer = await served.predict("a")
        stopping = time.monotonic()

    assert answer.json() == {"response": "answer:a"}
    await asyncio.get_running_loop().shutdown_default_executor()
    assert time.monotonic() - stopping < 5


def test_without_the_setting_nothing_of_it_is_loaded() -> None:
    code = (
        "import sys; from gateway.app import build_app; from gateway.config import Settings; "
        f"build_app(Settings(tokenizer={str(ROOT / 'demo' / 'model')!r})); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_setting_without_the_packages_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gateway.observability.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    with pytest.raises(SettingsError, match=r"GATEWAY_OTLP_ENDPOINT needs the extra `otel`"):
        build_app(make_settings(otlp_endpoint="http://127.0.0.1:4318"))


def test_setting_that_is_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="is not an http:// or https:// address"):
        make_settings(otlp_endpoint="localhost:4318")
