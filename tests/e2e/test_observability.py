"""The real engine seen from outside: a request followed through all, and every panel filled."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from tests.collector import Collector, SeenSpan
from tests.deploy.check_live import check, check_live, make_traffic
from tests.deploy.expressions import Expression, read_engine_list
from tests.deploy.live import run_prometheus
from tests.deploy.promtool import run_promtool
from tests.e2e.conftest import Stack
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
T = TypeVar("T")
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
# What the check must not take for data.
WRONG = {"gateway_nothing": "no data", "0 / 0 * sum(gateway_requests_total)": "not a number"}
KEYS = {"timestamp", "level", "source", "event"}


def wait_for(read: Callable[[], T], what: str, within_s: float = 60) -> T:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = read()
        if found:
            return found
        time.sleep(0.1)
    pytest.fail(f"not within {within_s} s: {what}")


def read_log(stack: Stack) -> list[dict[str, Any]]:
    text = stack.log.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n")].splitlines()]


def test_one_request_is_followed_from_its_header_through_logs_and_trace(
    stack: Stack, collector: Collector
) -> None:
    request_id = f"follow-me-{time.time_ns()}"
    headers = {"X-Request-Id": request_id, "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    body = {"prompt": ["What is a CUDA warp?", "为什么需要共享内存？"], "max_tokens": 8}

    answer = httpx.post(
        f"{stack.gateway}/predict", json=body, headers=headers, timeout=60, verify=NO_TLS
    )

    assert answer.headers["X-Request-Id"] == request_id

    def read_lines(source: str) -> list[dict[str, Any]]:
        return [
            row
            for row in read_log(stack)
            if row.get("request_id") == request_id and row["source"] == source
        ]

    (own,) = wait_for(lambda: read_lines("gateway"), "the gateway's line")
    assert (own["event"], own["route"], own["trace_id"]) == ("request_done", "/predict", TRACE_ID)
    engine_lines = wait_for(lambda: read_lines("engine"), "the engine's lines")
    named = {row["engine_request_id"] for row in engine_lines}
    assert all(re.fullmatch(rf"cmpl-{request_id}-[01]-[0-9a-f]{{8}}", name) for name in named)
    assert len(named) == 2

    def read_spans() -> list[SeenSpan]:
        spans = [span for span in collector.spans if span.trace_id == TRACE_ID]
        return spans if len(spans) >= 5 else []

    spans = wait_for(read_spans, "five spans of one trace")
    by_name = {span.name: span for span in spans}
    request, call = by_name["POST /predict"], by_name["engine"]
    assert (request.parent_id, request.attributes["gateway.request_id"]) == (PARENT_ID, request_id)
    assert (call.parent_id, by_name["queue"].parent_id) == (request.span_id, request.span_id)
    sequences = [span for span in spans if span.name == "llm_request"]
    assert {span.parent_id for span in sequences} == {call.span_id}
    assert {span.service for span in sequences} == {"vllm"}
    assert {span.attributes["gen_ai.request.id"] for span in sequences} == {
        f"cmpl-{request_id}-0",
        f"cmpl-{request_id}-1",
    }


def test_every_log_line_has_the_same_keys_and_no_prompt(stack: Stack) -> None:
    secret = "Xyzzy is what nobody asks."
    stack.predict(secret, max_tokens=1)
    rows = read_log(stack)

    assert {row["source"] for row in rows} == {"launcher", "gateway", "engine"}
    assert [row for row in rows if not row.keys() >= KEYS] == []
    assert secret not in stack.log.read_text(encoding="utf-8")


def test_engine_exports_what_dashboards_and_rules_may_use(stack: Stack) -> None:
    stack.predict("What is a CUDA warp?")
    text = httpx.get(f"{stack.engine}/metrics", verify=NO_TLS).text
    exported = dict(re.findall(r"^# TYPE (vllm:\S+) (\w+)$", text, re.MULTILINE))

    for when, name, kind in read_engine_list():
        if when == "always":
            assert exported.get(name) == kind, name
    # The profile's buckets, not vLLM's: those begin at 10 ms.
    assert re.search(r'vllm:inter_token_latency_seconds_bucket\{.*le="0.001".*\}', text)
    assert re.search(r'vllm:e2e_request_latency_seconds_bucket\{.*le="0.025".*\}', text)


def test_metrics_of_gateway_and_launcher_please_promtool(stack: Stack) -> None:
    make_traffic(stack.gateway)
    for url in (stack.gateway, stack.status):
        text = httpx.get(f"{url}/metrics", verify=NO_TLS).text
        assert run_promtool("check", "metrics", text=text) == "", url


def test_every_panel_shows_something_and_no_alert_fires(stack: Stack, tmp_path: Path) -> None:
    urls = {"gateway": stack.gateway, "engine": stack.engine, "launcher": stack.status}
    targets = {job: url.removeprefix("http://") for job, url in urls.items()}
    with run_prometheus(tmp_path, targets) as prometheus:
        wait_for(lambda: count_up(prometheus) == len(targets), "every target is scraped")
        make_traffic(stack.gateway)

        findings = check_live(prometheus, within_s=90)

        assert [str(finding) for finding in findings] == []
        with httpx.Client(base_url=prometheus, trust_env=False, verify=NO_TLS) as client:
            wrong = {name: check(client, Expression("board", "panel", name)) for name in WRONG}
        assert {name: found and found.problem for name, found in wrong.items()} == WRONG
        rules = read(prometheus, "/api/v1/rules")["groups"]
        assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}
        alerts = read(prometheus, "/api/v1/alerts")["alerts"]
        firing = [alert for alert in alerts if alert["state"] == "firing"]
        assert [alert["labels"]["alertname"] for alert in firing] == ["Watchdog"]


def count_up(prometheus: str) -> int:
    targets = read(prometheus, "/api/v1/targets")["activeTargets"]
    return sum(target["health"] == "up" for target in targets)


def read(prometheus: str, path: str) -> dict[str, Any]:
    data: dict[str, Any] = httpx.get(prometheus + path, trust_env=False, verify=NO_TLS).json()[
        "data"
    ]
    return data
