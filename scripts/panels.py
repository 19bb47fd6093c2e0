"""What the Grafana dashboards show: rows of panels, each a question with its expressions.

Data alone; `dashboards.py` makes Grafana's JSON of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["chart", "number", "states", "heatmap", "table"]
# In the order of their numbers on a time line.
STATES = ("stopped", "starting", "warming", "ready", "draining", "waiting", "parked")
_GENERATING = 'route=~"/predict|/v1/.*"'
_PREDICT = 'route="/predict"'
_ENGINE = 'instance=~"$instance"'
_PER_S = "si:/s"  # Grafana's way to say 71 k/s


@dataclass(frozen=True)
class Query:
    """An expression, and what its series are called."""

    expr: str
    legend: str = ""
    has_exemplars: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture; `about` says what to make of it."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Kind = "chart"
    about: str = ""
    is_stacked: bool = False
    # From this value on it is red; with `is_high_good`, below it.
    alarm: float | None = None
    is_high_good: bool = False
    empty: str = ""
    width: int = 8


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """One dashboard; with `by_engine` there is a choice of engines at its top."""

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    by_engine: bool = False


def number(
    title: str,
    expr: str,
    unit: str = "short",
    *,
    about: str = "",
    alarm: float | None = None,
    is_high_good: bool = False,
    empty: str = "",
    width: int = 4,
) -> Panel:
    return Panel(
        title,
        (Query(expr),),
        unit,
        "number",
        about=about,
        alarm=alarm,
        is_high_good=is_high_good,
        empty=empty,
        width=width,
    )


def quantiles(
    metric: str, *levels: float, by: str = "", matcher: str = "", legend: str = ""
) -> tuple[Query, ...]:
    """Of a histogram: p50 is what half of them stay below."""
    labels = f"le, {by}" if by else "le"
    rate = f"sum by ({labels}) (rate({metric}_bucket{{{matcher}}}[$__rate_interval]))"
    head = f"{legend} " if legend else f"{{{{{by}}}}} " if by else ""
    return tuple(
        Query(f"histogram_quantile({level}, {rate})", f"{head}p{level * 100:g}", True)
        for level in levels
    )


def heat(title: str, metric: str, unit: str, about: str, matcher: str = "") -> Panel:
    expr = f"sum by (le) (increase({metric}_bucket{{{matcher}}}[$__rate_interval]))"
    return Panel(title, (Query(expr, "{{le}}"),), unit, "heatmap", about)


def _number_states(matcher: str = "") -> str:
    more = f", {matcher}" if matcher else ""
    terms = (
        f'launcher_engine_state{{state="{state}"{more}}} * {place}'
        for place, state in enumerate(STATES)
    )
    return f"sum by (instance) ({' or '.join(terms)})"


def _rate(metric: str, by: str, matcher: str = "") -> str:
    labels = f"{{{matcher}}}" if matcher else ""
    return f"sum by ({by}) (rate({metric}{labels}[$__rate_interval]))"


def _share(part: str, whole: str) -> str:
    """Nothing, not "NaN" or a speed without end, as long as the whole is nought."""
    return f"{part} / ({whole} > 0)"


_UP = Row(
    "Is it up?",
    (
        number("Gateways that answer", 'sum(up{job="gateway"})', alarm=1, is_high_good=True),
        number(
            "Engines that serve",
            "sum(max by (engine) (gateway_engine_ready))",
            about="Ready: they have answered their warm-up.",
            alarm=1,
            is_high_good=True,
        ),
        number(
            "Alerts firing",
            'count(ALERTS{alertstate="firing"}) or vector(0)',
            about="Which: the table below. What to do: docs/metrics.md.",
            alarm=1,
        ),
        number(
            "Engine restarts, a day",
            "sum(increase(launcher_engine_restarts_total[1d]))",
            about="The launcher's crash cards say why.",
            alarm=1,
        ),
        number(
            "Requests that fail",
            "gateway:failures:ratio5m",
            "percentunit",
            about="By the gateway's or an engine's doing, broken streams among them, in five "
            "minutes; what callers do wrong or want too soon does not count.",
            alarm=0.05,
            empty="no request",
        ),
        number("Gateway started", "max(gateway_start_time_seconds) * 1000", "dateTimeFromNow"),
        Panel(
            "Engines",
            (Query(_number_states(), "{{instance}}"),),
            kind="states",
            about="As their launchers see them. waiting: a pause before a restart.",
            width=16,
        ),
        Panel(
            "Alerts",
            (Query('ALERTS{alertstate="firing"}'),),
            kind="table",
            empty="none is firing",
        ),
    ),
)
_FAST = Row(
    "How fast?",
    (
        Panel(
            "From a request's first byte to its answer's last",
            quantiles("gateway_request_seconds", 0.5, 0.95, 0.99, by="route", matcher=_GENERATING),
            "s",
        ),
        Panel(
            "To a stream's first chunk",
            quantiles("gateway_first_chunk_seconds", 0.5, 0.95, by="route"),
            "s",
        ),
        Panel(
            "Between a stream's chunks",
            (
                *quantiles("gateway_chunk_gap_seconds", 0.5, 0.95, legend="mean"),
                *quantiles("gateway_longest_chunk_gap_seconds", 0.95, legend="longest"),
            ),
            "s",
            about="One observation a stream: its mean gap, and its longest.",
        ),
        Panel("Waiting to enter", quantiles("gateway_queue_seconds", 0.5, 0.95, 0.99), "s"),
        Panel(
            "Requests",
            (Query("gateway:requests:rate1m", "{{route}}"),),
            "reqps",
            is_stacked=True,
        ),
        Panel(
            "Tokens",
            (Query("gateway:tokens:rate1m", "{{direction}}"),),
            _PER_S,
            about="By the engines' count: read (in) and made (out).",
        ),
    ),
)
_FULL = Row(
    "How full?",
    (
        Panel(
            "Sequences inside and waiting",
            (
                Query("sum by (lane) (gateway_running_sequences)", "inside, {{lane}}"),
                Query("sum by (lane) (gateway_waiting_sequences)", "waiting, {{lane}}"),
            ),
        ),
        Panel(
            "Places taken",
            (Query("gateway:fullness:ratio", "of all places"),),
            "percentunit",
        ),
        Panel("Inside each engine", (Query("gateway_engine_running_sequences", "{{engine}}"),)),
        Panel("KV cache", (Query("engine:kv_usage:max", "{{instance}}"),), "percentunit"),
        Panel(
            "The gateway's event loop is late by",
            (Query("gateway:event_loop_lag_seconds:p99_5m", "p99"),),
            "s",
            about="Above 50 ms the gateway itself is what is slow: more gateways.",
        ),
        Panel(
            "Answers shared by identical prompts",
            (Query("sum(rate(gateway_deduplicated_prompts_total[$__rate_interval]))", "prompts"),),
            _PER_S,
        ),
    ),
)
_FAILS = Row(
    "What fails?",
    (
        Panel(
            "Errors by code",
            (Query(_rate("gateway_errors_total", "code, source"), "{{code}} ({{source}})"),),
            _PER_S,
            about="source: who failed, the gateway, the engine or the caller, whose is any 4xx.",
            is_stacked=True,
            empty="no error so far",
        ),
        Panel(
            "Turned away",
            (Query(_rate("gateway_refused_total", "reason"), "{{reason}}"),),
            _PER_S,
            about="Before an engine saw them: limits, keys, a full queue, no engine.",
            is_stacked=True,
        ),
        Panel(
            "Calls that engines failed, and calls made again",
            (
                Query(_rate("gateway_engine_failures_total", "engine"), "failed, {{engine}}"),
                Query(
                    "sum(rate(gateway_retried_prompts_total[$__rate_interval]))", "prompts again"
                ),
                Query("sum by (engine) (gateway_engine_breaker_open)", "left alone, {{engine}}"),
            ),
        ),
    ),
)
_WHOM = Row(
    "For whom?",
    (
        Panel(
            "Requests by key",
            (Query(f"topk(10, {_rate('gateway_usage_requests_total', 'key')})", "{{key}}"),),
            "reqps",
        ),
        Panel(
            "Tokens by key",
            (Query(f"topk(10, {_rate('gateway_usage_tokens_total', 'key')})", "{{key}}"),),
            _PER_S,
        ),
        Panel(
            "Used since the gateway started",
            (Query("topk(20, sum by (key, direction) (gateway_usage_tokens_total))"),),
            kind="table",
            about="Tokens, by key; GET /usage has all of them.",
        ),
    ),
)
OVERVIEW = Board(
    "overview",
    "Gateway: overview",
    "Is it up, how fast, how full, what fails, for whom.",
    (_UP, _FAST, _FULL, _FAILS, _WHOM),
)

_WORK = Row(
    "Work",
    (
        Panel(
            "Requests running and waiting",
            (
                Query(
                    f"sum by (instance) (vllm:num_requests_running{{{_ENGINE}}})",
                    "{{instance}} running",
                ),
                Query(
                    f"sum by (instance) (vllm:num_requests_waiting{{{_ENGINE}}})",
                    "{{instance}} waiting",
                ),
            ),
        ),
        Panel(
            "Tokens made",
            (Query(f"engine:generation_tokens:rate1m{{{_ENGINE}}}", "{{instance}}"),),
            _PER_S,
        ),
        Panel(
            "Prompt tokens, by where they came from",
            (Query(_rate("vllm:prompt_tokens_by_source_total", "source", _ENGINE), "{{source}}"),),
            _PER_S,
            is_stacked=True,
        ),
        Panel(
            "Tokens a step",
            quantiles("vllm:iteration_tokens_total", 0.5, 0.95, matcher=_ENGINE),
            about="How well the batch fills the engine's steps.",
        ),
        Panel(
            "How answers end",
            (
                Query(
                    _rate("vllm:request_success_total", "finished_reason", _ENGINE),
                    "{{finished_reason}}",
                ),
            ),
            _PER_S,
            is_stacked=True,
        ),
        Panel(
            "Length of prompts and answers",
            (
                *quantiles(
                    "vllm:request_prompt_tokens", 0.5, 0.95, matcher=_ENGINE, legend="prompt"
                ),
                *quantiles(
                    "vllm:request_generation_tokens", 0.5, 0.95, matcher=_ENGINE, legend="answer"
                ),
            ),
        ),
    ),
)
_LATENCY = Row(
    "Time",
    (
        Panel(
            "To the first token",
            quantiles("vllm:time_to_first_token_seconds", 0.5, 0.95, 0.99, matcher=_ENGINE),
            "s",
        ),
        Panel(
            "Between tokens",
            quantiles("vllm:inter_token_latency_seconds", 0.5, 0.95, 0.99, matcher=_ENGINE),
            "s",
        ),
        Panel(
            "A request: waiting, reading, writing, in all",
            (
                *quantiles(
                    "vllm:request_queue_time_seconds", 0.95, matcher=_ENGINE, legend="queue"
                ),
                *quantiles(
                    "vllm:request_prefill_time_seconds", 0.95, matcher=_ENGINE, legend="prefill"
                ),
                *quantiles(
                    "vllm:request_decode_time_seconds", 0.95, matcher=_ENGINE, legend="decode"
                ),
                *quantiles("vllm:e2e_request_latency_seconds", 0.95, matcher=_ENGINE, legend="all"),
            ),
            "s",
        ),
        heat(
            "Between tokens, all of them",
            "vllm:inter_token_latency_seconds",
            "s",
            "The buckets are those of the profiles: 1 ms to 5 s.",
            _ENGINE,
        ),
    ),
)
_CACHE = Row(
    "Cache",
    (
        Panel(
            "KV cache in use",
            (Query(f"engine:kv_usage:max{{{_ENGINE}}}", "{{instance}}"),),
            "percentunit",
            alarm=0.95,
        ),
        Panel(
            "Prompt tokens found in the prefix cache",
            (Query(f"engine:prefix_hits:ratio5m{{{_ENGINE}}}", "{{instance}}"),),
            "percentunit",
        ),
        Panel(
            "Requests preempted",
            (Query(_rate("vllm:num_preemptions_total", "instance", _ENGINE), "{{instance}}"),),
            _PER_S,
            about="Computed again, because the cache was full.",
        ),
    ),
)
_SPECULATION = Row(
    "Speculation",
    (
        Panel(
            "Drafted tokens that were accepted",
            (
                Query(
                    _share(
                        _rate("vllm:spec_decode_num_accepted_tokens_total", "instance", _ENGINE),
                        _rate("vllm:spec_decode_num_draft_tokens_total", "instance", _ENGINE),
                    ),
                    "{{instance}}",
                ),
            ),
            "percentunit",
            empty="this engine does not speculate",
        ),
        Panel(
            "Accepted, by place in the draft",
            (
                Query(
                    _rate(
                        "vllm:spec_decode_num_accepted_tokens_per_pos_total", "position", _ENGINE
                    ),
                    "{{position}}",
                ),
            ),
            _PER_S,
            empty="this engine does not speculate",
        ),
        Panel(
            "Tokens a draft",
            (
                Query(
                    "1 + "
                    + _share(
                        _rate("vllm:spec_decode_num_accepted_tokens_total", "instance", _ENGINE),
                        _rate("vllm:spec_decode_num_drafts_total", "instance", _ENGINE),
                    ),
                    "{{instance}}",
                ),
            ),
            about="What one step of the model yields.",
            empty="this engine does not speculate",
        ),
    ),
)
_GPU = Row(
    "GPU",
    (
        Panel(
            "Busy",
            (Query(f"launcher_gpu_utilization_ratio{{{_ENGINE}}}", "{{instance}} {{gpu}}"),),
            "percentunit",
            empty="no GPU",
        ),
        Panel(
            "Memory",
            (
                Query(f"launcher_gpu_memory_used_bytes{{{_ENGINE}}}", "{{instance}} {{gpu}}"),
                Query(f"launcher_gpu_memory_bytes{{{_ENGINE}}}", "{{instance}} {{gpu}}: all"),
            ),
            "bytes",
            empty="no GPU",
        ),
        Panel(
            "Power and temperature",
            (
                Query(f"launcher_gpu_power_watts{{{_ENGINE}}}", "{{instance}} {{gpu}}: W"),
                Query(f"launcher_gpu_temperature_celsius{{{_ENGINE}}}", "{{instance}} {{gpu}}: °C"),
            ),
            empty="no GPU",
        ),
    ),
)
_ENGINE_LIFE = Row(
    "The process",
    (
        Panel(
            "State",
            (Query(_number_states(_ENGINE), "{{instance}}"),),
            kind="states",
            about="As its launcher sees it.",
        ),
        Panel(
            "Memory of its front end",
            (Query(f'process_resident_memory_bytes{{job="engine", {_ENGINE}}}', "{{instance}}"),),
            "bytes",
        ),
        Panel(
            "What runs",
            (Query(f"launcher_engine_info{{{_ENGINE}}}"),),
            kind="table",
            about="fingerprint: of everything that decides its speed.",
        ),
    ),
)
ENGINE = Board(
    "engine",
    "Gateway: engines",
    "What vLLM does: its batch, its cache, its latencies, its GPU.",
    (_WORK, _LATENCY, _CACHE, _SPECULATION, _GPU, _ENGINE_LIFE),
    by_engine=True,
)

_LAST = Row(
    "The last batch",
    (
        number("Questions", "max(gateway_last_batch_prompts)"),
        number("Seconds", "max(gateway_last_batch_seconds)", "s"),
        number(
            "Tokens a second",
            _share("max(gateway_last_batch_tokens)", "max(gateway_last_batch_seconds)"),
            _PER_S,
            about="New tokens over the time from its first byte to its answer's last.",
            empty="no batch so far",
        ),
        number(
            "Characters a second",
            _share("max(gateway_last_batch_characters)", "max(gateway_last_batch_seconds)"),
            _PER_S,
            empty="no batch so far",
        ),
        number(
            "Characters an answer",
            _share("max(gateway_last_batch_characters)", "max(gateway_last_batch_prompts)"),
            empty="no batch so far",
        ),
        number(
            "Answers shared",
            "sum(increase(gateway_deduplicated_prompts_total[1h]))",
            about="Identical questions within an hour, generated once.",
        ),
    ),
)
_BATCHES = Row(
    "Batches",
    (
        heat(
            "Questions in a call",
            "gateway_predict_prompts",
            "short",
            "The course's judge sends 358 at once.",
        ),
        Panel(
            "Calls",
            (
                Query(
                    f"60 * sum(rate(gateway_requests_total{{{_PREDICT}}}[$__rate_interval]))",
                    "/predict",
                ),
            ),
            "si:/min",
        ),
        Panel(
            "A call's duration",
            quantiles("gateway_request_seconds", 0.5, 0.95, matcher=_PREDICT),
            "s",
        ),
        Panel(
            "Speed while a call runs",
            (
                Query(
                    _share(
                        'sum(rate(gateway_tokens_total{direction="out"}[$__rate_interval]))',
                        f"sum(rate(gateway_request_seconds_sum{{{_PREDICT}}}[$__rate_interval]))",
                    ),
                    "tokens",
                ),
                Query(
                    _share(
                        "sum(rate(gateway_predict_characters_total[$__rate_interval]))",
                        f"sum(rate(gateway_request_seconds_sum{{{_PREDICT}}}[$__rate_interval]))",
                    ),
                    "characters",
                ),
            ),
            _PER_S,
            about="Per second of a /predict call, so pauses between calls do not count. Tokens are "
            "those of all routes.",
        ),
        Panel(
            "Tokens and characters, by the clock",
            (
                Query('gateway:tokens:rate1m{direction="out"}', "tokens"),
                Query("sum(rate(gateway_predict_characters_total[1m]))", "characters"),
            ),
            _PER_S,
        ),
        Panel(
            "Questions without an answer",
            (Query(_rate("gateway_prompts_failed_total", "code"), "{{code}}"),),
            _PER_S,
            is_stacked=True,
            empty="every question was answered",
        ),
    ),
)
_START = Row(
    "Warm-up",
    (
        number("Warm-up batch", "max(gateway_warmup_seconds)", "s"),
        number(
            "Warm-ups that failed, an hour",
            'sum(increase(gateway_warmups_total{outcome="failed"}[1h]))',
            alarm=1,
        ),
        number(
            "Engine ready after",
            "max(launcher_engine_start_seconds)",
            "s",
            about="From its start to its first token; the judge waits for 420 s in all.",
            alarm=420,
        ),
        Panel(
            "Engines ready",
            (Query("max by (engine) (gateway_engine_ready)", "{{engine}}"),),
            about="1: it has answered the batch that it will serve.",
            width=12,
        ),
    ),
)
_GRADES = Row(
    "The last grade",
    (
        number(
            "Graded: ROUGE-L, course reading",
            'max(gateway_grade{figure="ROUGE-L, course reading"})',
            empty="not graded",
            about="python -m lab grade --record FILE, and GATEWAY_GRADE_RECORD=FILE.",
        ),
        number(
            "Graded: tokens a second",
            'max(gateway_grade{figure="tokens/s"})',
            _PER_S,
            empty="not graded",
        ),
        number(
            "Graded: characters a second",
            'max(gateway_grade{figure="characters/s"})',
            _PER_S,
            empty="not graded",
        ),
        number(
            "Graded: when",
            "max(gateway_grade_timestamp_seconds) * 1000",
            "dateTimeFromNow",
            empty="never",
        ),
        Panel(
            "Graded: everything",
            (Query("gateway_grade"),),
            kind="table",
            empty="not graded",
        ),
    ),
)
COURSE = Board(
    "course",
    "Gateway: the course",
    "Batches as the course's judge sends them: how large, how fast, how good.",
    (_LAST, _BATCHES, _START, _GRADES),
)

BOARDS = (OVERVIEW, ENGINE, COURSE)
