"""What the engine's own counters are read as."""

from __future__ import annotations

import pytest

from launcher.engine.probe import Activity, parse_activity

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 3.0
vllm:num_requests_running{engine="1",model_name="demo"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="demo"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="a \\"b\\" {c} d"} 1.5e+03
vllm:prompt_tokens_total{engine="0",model_name="demo"} 20.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf"} 70.0
vllm:iteration_tokens_total_count{engine="0"} 7.0
"""


def test_activity_sums_engines_and_takes_no_other_name() -> None:
    assert parse_activity(PAGE) == Activity(in_flight=6, moved=1527.0)


@pytest.mark.parametrize("text", ["", "up 1\n", "vllm:num_requests_running{ 1\n"])
def test_activity_of_a_page_without_counters_is_none(text: str) -> None:
    assert parse_activity(text) is None
