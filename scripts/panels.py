"""What the Grafana dashboards show: rows of panels, each a question with its expressions.

Data alone; `dashboards.py` makes Grafana's JSON of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["chart", "number", "states", "heatmap", "table"]
# In the order of their numbers on a time line.
STATES = (
    *("stopped", "starting", "warming", "ready", "draining"),
    *("waiting", "parked", "joining", "sleeping"),
)
_GENERATING = 'route=~"/predict|/v1/.*"'
_PREDICT = 'route="/predict"'
# What the choices at a board's top leave over: of launchers and recorded figures, of vLLM's, of the
# gateway's by engine (which it names by address), of those by key.
_ENGINE = 'instance=~"$engine"'
_VLLM = f'{_ENGINE}, model_name=~"$model"'
_CALLED = 'engine=~"(https?://)?($engine)(:.*)?"'
_KEY = 'key=~"$key"'
# The bucket of the chosen SLO, as Prometheus 2 and 3 write whole numbers.
_IN_SLO = 'le=~"$slo([.]0)?"'
SLO_S = ("0.25", "0.5", "1", "2.5", "5", "10")  # buckets of gateway and profiles alike
_PER_S = "si:/s"  # Grafana's way to say 71 k/s
_TOKENS_PER_S = "si:tok/s"


@dataclass(frozen=True)
class Query:
    """An expression, and what its series are called."""

    expr: str
    legend: str = ""
    has_exemplars: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture; `about` says what to make of it, `dashboards.py` adds which metrics it shows."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Kind = "chart"
    about: str = field(kw_only=True)
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
    """One dashboard."""

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]


def number(
    title: str,
    expr: str,
    unit: str = "short",
    *,
    about: str,
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
    return Panel(title, (Query(expr, "{{le}}"),), unit, "heatmap", about=about)


def _number_states(matcher: str = "") -> str:
    more = f", {matcher}" if matcher else ""
    terms = (
        f'launcher_engine_state{{state="{state}"{more}}} * {place}'
        for place, state in enumerate(STATES)
    )
    return f"sum by (instance) ({' or '.join(terms)})"


def _within_slo(metric: str, matcher: str = "") -> str:
    more = f", {matcher}" if matcher else ""
    part = f"sum(rate({metric}_bucket{{{_IN_SLO}{more}}}[5m]))"
    return _share(part, f"sum(rate({metric}_count{{{matcher}}}[5m]))")


def _rate(metric: str, by: str, matcher: str = "") -> str:
    labels = f"{{{matcher}}}" if matcher else ""
    return f"sum by ({by}) (rate({metric}{labels}[$__rate_interval]))"


def _share(part: str, whole: str) -> str:
    """Nothing, not "NaN" or a speed without end, as long as the whole is nought."""
    return f"{part} / ({whole} > 0)"


_SLO_LINE = Query("vector($slo)", "SLO")
_TTFT_ABOUT = (
    "Time to first token: half of the streams have theirs sooner than p50, all but one in a "
    "hundred "
    "sooner than p99."
)


def _build_glance(
    ttft: str, matcher: str, *, tokens: str, errors: Panel, in_flight: str, whose: str
) -> Row:
    """The first row of every board: is it fast, busy, right?"""
    itl = "vllm:inter_token_latency_seconds"
    buckets = f"sum by (le) (rate({ttft}_bucket{{{matcher}}}[5m]))"
    gaps = f"sum by (le) (rate({itl}_bucket{{{_VLLM}}}[5m]))"
    return Row(
        "At a glance",
        (
            number(
                "TTFT p95",
                f"histogram_quantile(0.95, {buckets}) > 0",
                "s",
                about=f"Time to first token, {whose}, over five minutes: one in twenty waits "
                "longer.",
                empty="nothing streamed",
            ),
            number(
                "ITL p95",
                f"histogram_quantile(0.95, {gaps}) > 0",  # nothing, not "NaN"
                "s",
                about="Inter-token latency, by the engines, over five minutes: from one token of "
                "an "
                "answer to the next.",
                empty="no tokens",
            ),
            number(
                "tok/s",
                tokens,
                _TOKENS_PER_S,
                about="Tokens generated a second, over the last minute.",
            ),
            errors,
            number(
                "TTFT within SLO",
                _within_slo(ttft, matcher),
                "percentunit",
                about="Share whose first token came within the SLO that is chosen above, over five "
                "minutes.",
                empty="nothing streamed",
                alarm=0.95,
                is_high_good=True,
            ),
            number("In flight", in_flight, about="Sequences that engines work on at this moment."),
        ),
    )


_ERRORS = number(
    "Errors",
    "gateway:failures:ratio5m",
    "percentunit",
    about="Share of the requests that the gateway or an engine failed in five minutes, broken "
    "streams among them; what callers do wrong or want too soon does not count.",
    alarm=0.05,
    empty="no request",
)
_CALLERS = Row(
    "Callers",
    (
        Panel(
            "Requests by key",
            (
                Query(
                    f"topk(10, {_rate('gateway_usage_requests_total', 'key', _KEY)})",
                    "{{key}}",
                ),
            ),
            "reqps",
            about="The ten keys that ask most. Without keys, or on a port that everybody may read, "
            "there is one row.",
            width=12,
        ),
        Panel(
            "Tokens by key",
            (
                Query(
                    f"topk(10, {_rate('gateway_usage_tokens_total', 'key', _KEY)})",
                    "{{key}}",
                ),
            ),
            _TOKENS_PER_S,
            about="The ten keys that use most, prompts and answers together.",
            width=12,
        ),
    ),
)

_UP = Row(
    "Is it up?",
    (
        number(
            "Gateways up",
            'sum(up{job="gateway"})',
            about="Gateways that answer Prometheus.",
            alarm=1,
            is_high_good=True,
        ),
        number(
            "Engines ready",
            f"sum(max by (engine) (gateway_engine_ready{{{_CALLED}}}))",
            about="Ready: they have answered their warm-up.",
            alarm=1,
            is_high_good=True,
        ),
        number(
            "Alerts firing",
            'count(ALERTS{alertstate="firing", alertname!="Watchdog"}) or vector(0)',
            about="Which: the table below. What to do: docs/runbook.md, a section each.",
            alarm=1,
        ),
        number(
            "Engine restarts, 24 h",
            f"sum(increase(launcher_engine_restarts_total{{{_ENGINE}}}[1d]))",
            about="The launcher's crash cards say why.",
            alarm=1,
        ),
        number(
            "Watchdog",
            'count(ALERTS{alertstate="firing", alertname="Watchdog"}) or vector(0)',
            about="1 as long as Prometheus evaluates its rules; at 0 no other alert can fire.",
            alarm=1,
            is_high_good=True,
        ),
        number(
            "Gateway started",
            "max(gateway_start_time_seconds) * 1000",
            "dateTimeFromNow",
            about="When the youngest gateway started.",
        ),
        Panel(
            "Engine states",
            (Query(_number_states(_ENGINE), "{{instance}}"),),
            kind="states",
            about="As their launchers see them. waiting: a pause before a restart.",
            width=16,
        ),
        Panel(
            "Alerts",
            (Query('ALERTS{alertstate="firing", alertname!="Watchdog"}'),),
            kind="table",
            about="Those that fire. What each means and what to do: docs/runbook.md.",
            empty="none is firing",
        ),
    ),
)
_FAST = Row(
    "Latency and throughput",
    (
        Panel(
            "E2E latency",
            quantiles("gateway_request_seconds", 0.5, 0.95, 0.99, by="route", matcher=_GENERATING),
            "s",
            about="End to end: from a request's first byte to its answer's last.",
        ),
        Panel(
            "TTFT",
            (*quantiles("gateway_first_chunk_seconds", 0.5, 0.95, by="route"), _SLO_LINE),
            "s",
            about="Time to first token, as callers of streams see it: from a request's first byte "
            "to "
            "the first chunk of its stream.",
        ),
        Panel(
            "ITL, as callers see it",
            (
                *quantiles("gateway_chunk_gap_seconds", 0.5, 0.95, legend="mean"),
                *quantiles("gateway_longest_chunk_gap_seconds", 0.95, legend="longest"),
            ),
            "s",
            about="Inter-token latency, between a stream's chunks. One observation a stream: its "
            "mean "
            "gap, and its longest.",
        ),
        Panel(
            "Queue time",
            quantiles("gateway_queue_seconds", 0.5, 0.95, 0.99),
            "s",
            about="How long requests that entered had waited for a place inside the engines.",
        ),
        Panel(
            "Requests",
            (Query("gateway:requests:rate1m", "{{route}}"),),
            "reqps",
            about="Answered requests a second, whatever the answer; without those of health "
            "checks, "
            "metrics and the page.",
            is_stacked=True,
        ),
        Panel(
            "Tokens",
            (Query("gateway:tokens:rate1m", "{{direction}}"),),
            _TOKENS_PER_S,
            about="By the engines' count: read (in) and generated (out).",
        ),
    ),
)
_FULL = Row(
    "Saturation",
    (
        Panel(
            "In flight and queued",
            (
                Query("sum by (lane) (gateway_running_sequences)", "in flight, {{lane}}"),
                Query("sum by (lane) (gateway_waiting_sequences)", "queued, {{lane}}"),
            ),
            about="Sequences inside the engines, and those that wait for a place there, by lane.",
        ),
        Panel(
            "Places taken",
            (Query("gateway:fullness:ratio", "of all places"),),
            "percentunit",
            about="In flight, of what the gateways let in at once. At 100 % requests queue.",
        ),
        Panel(
            "In flight, by engine",
            (Query(f"gateway_engine_running_sequences{{{_CALLED}}}", "{{engine}}"),),
            about="Sequences that the gateway has at each engine.",
        ),
        Panel(
            "KV cache usage",
            (Query(f"engine:kv_usage:max{{{_ENGINE}}}", "{{instance}}"),),
            "percentunit",
            about="Of the memory for tokens that are being worked on. Above 95 % requests are "
            "preempted "
            "and computed again.",
            alarm=0.95,
        ),
        Panel(
            "Event loop lag",
            (Query("gateway:event_loop_lag_seconds:p99_5m", "p99"),),
            "s",
            about="How late the gateway's one thread comes. Above 50 ms the gateway itself is what "
            "is "
            "slow: more gateways.",
            alarm=0.05,
        ),
        Panel(
            "Log lines lost",
            (
                Query(
                    "sum by (instance) (rate(gateway_log_lines_dropped_total[$__rate_interval]))",
                    "gateway, {{instance}}",
                ),
                Query(
                    "sum by (instance, log) (rate(launcher_log_lines_dropped_total"
                    f"{{{_ENGINE}}}[$__rate_interval]))",
                    "launcher, {{log}}, {{instance}}",
                ),
            ),
            _PER_S,
            about="The disk is full, or nobody reads the pipe. Answers do not wait for the log.",
        ),
        Panel(
            "Deduplicated prompts",
            (Query("sum(rate(gateway_deduplicated_prompts_total[$__rate_interval]))", "prompts"),),
            _PER_S,
            about="Greedy prompts that got the answer of an identical one.",
        ),
    ),
)
_FAILS = Row(
    "Errors",
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
            "Refused",
            (Query(_rate("gateway_refused_total", "reason"), "{{reason}}"),),
            _PER_S,
            about="Turned away before an engine saw them: limits, keys, a full queue, no engine.",
            is_stacked=True,
        ),
        Panel(
            "Failed engine calls and retries",
            (
                Query(
                    _rate("gateway_engine_failures_total", "engine", _CALLED), "failed, {{engine}}"
                ),
                Query(
                    "sum(rate(gateway_retried_prompts_total[$__rate_interval]))", "retried prompts"
                ),
            ),
            _PER_S,
            about="Calls that an engine lost or did not take, and prompts run again because of "
            "that.",
        ),
        Panel(
            "Circuit breakers",
            (Query(f"max by (engine) (gateway_engine_breaker_open{{{_CALLED}}})", "{{engine}}"),),
            "bool_on_off",
            about="On: the gateway leaves the engine alone after failures in a row.",
        ),
        Panel(
            "Redis away",
            (Query("max by (instance) (gateway_redis_away)", "{{instance}}"),),
            "bool_yes_no",
            about="Yes: the gateway does not reach the Redis in which keys' limits are kept. No, "
            "too, where there is none.",
        ),
    ),
)
_WHOM = Row(
    "Callers",
    (
        *_CALLERS.panels,
        Panel(
            "Tokens used since the gateway started",
            (Query(f"topk(20, sum by (key, direction) (gateway_usage_tokens_total{{{_KEY}}}))"),),
            kind="table",
            about="By key; GET /usage has all of them.",
            width=24,
        ),
    ),
)
_KEPT = Row(
    "Batch jobs, stored responses, usage and audit",
    (
        Panel(
            "Batch requests at once",
            (
                Query("sum(gateway_batch_running_lines)", "running"),
                Query("sum(gateway_batch_window_lines)", "window"),
            ),
            about="Requests of /v1/batches that run, and how many may, as found out so far. 0 "
            "while there is no batch.",
        ),
        Panel(
            "Batch requests answered",
            (
                Query(_rate("gateway_batch_lines_total", "outcome"), "{{outcome}}"),
                Query("sum(rate(gateway_batch_retries_total[$__rate_interval]))", "asked again"),
            ),
            _PER_S,
            about="By outcome; asked again: refused for a while, by a full queue or a limit.",
        ),
        Panel(
            "Batches: database or disk away",
            (
                Query(
                    "sum by (instance) (rate(gateway_batch_storage_failures_total"
                    "[$__rate_interval]))",
                    "{{instance}}",
                ),
            ),
            _PER_S,
            about="A batch had to wait for where its answers are kept. It goes on by itself.",
        ),
        Panel(
            "Responses stored",
            (Query("sum(rate(gateway_responses_stored_total[$__rate_interval]))", "stored"),),
            _PER_S,
            about="Of /v1/responses, those in the background at their end. 0, too, where none is "
            "stored.",
        ),
        Panel(
            "Responses in the background",
            (Query("sum by (instance) (gateway_background_responses)", "{{instance}}"),),
            about="Waiting or running; more than GATEWAY_RESPONSES_MAX_BACKGROUND are refused.",
        ),
        Panel(
            "Stored responses: database away",
            (
                Query(
                    "sum by (instance) (rate(gateway_response_storage_failures_total"
                    "[$__rate_interval]))",
                    "{{instance}}",
                ),
            ),
            _PER_S,
            about="A call that stores, or goes on from what is stored, was refused, or one in the "
            "background waits to be written.",
        ),
        Panel(
            "Usage and audit: database away",
            (Query("max by (instance) (gateway_records_away)", "{{instance}}"),),
            "bool_yes_no",
            about="Yes: what was used is kept in memory until the database answers. No, too, where "
            "there is none.",
        ),
        Panel(
            "Usage and audit: to be written",
            (Query("sum by (kind) (gateway_records_waiting)", "{{kind}}"),),
            about="usage: sums by key, model and day; audit: rows.",
        ),
        Panel(
            "Usage and audit: lost",
            (Query(_rate("gateway_records_dropped_total", "kind"), "{{kind}}"),),
            _PER_S,
            about="Not kept, because too much waited.",
            empty="nothing was lost",
        ),
    ),
)
OVERVIEW = Board(
    "overview",
    "Gateway: overview",
    "TTFT, ITL, E2E latency, throughput, queue, errors, callers; what fires.",
    (
        _build_glance(
            "gateway_first_chunk_seconds",
            "",
            tokens='sum(gateway:tokens:rate1m{direction="out"})',
            errors=_ERRORS,
            in_flight="sum(gateway_running_sequences)",
            whose="as callers of streams see it",
        ),
        _UP,
        _FAST,
        _FULL,
        _FAILS,
        _WHOM,
        _KEPT,
    ),
)

_WORK = Row(
    "Throughput",
    (
        Panel(
            "Requests running and waiting",
            (
                Query(
                    f"sum by (instance) (vllm:num_requests_running{{{_VLLM}}})",
                    "{{instance}} running",
                ),
                Query(
                    f"sum by (instance) (vllm:num_requests_waiting{{{_VLLM}}})",
                    "{{instance}} waiting",
                ),
            ),
            about="In flight inside each engine, and queued there. The gateway's own queue is on "
            "the "
            "overview.",
        ),
        Panel(
            "Generation throughput",
            (Query(f"engine:generation_tokens:rate1m{{{_ENGINE}}}", "{{instance}}"),),
            _TOKENS_PER_S,
            about="Tokens generated a second, by engine.",
        ),
        Panel(
            "Prompt throughput, by source",
            (Query(_rate("vllm:prompt_tokens_by_source_total", "source", _VLLM), "{{source}}"),),
            _TOKENS_PER_S,
            about="Prompt tokens a second: computed, or found in a cache.",
            is_stacked=True,
        ),
        Panel(
            "Tokens per step",
            quantiles("vllm:iteration_tokens_total", 0.5, 0.95, matcher=_VLLM),
            about="How well the batch fills the engine's steps.",
        ),
        Panel(
            "Finish reasons",
            (
                Query(
                    _rate("vllm:request_success_total", "finished_reason", _VLLM),
                    "{{finished_reason}}",
                ),
            ),
            _PER_S,
            about="How answers end: stop (the model's own end), length (cut off), abort (the "
            "caller "
            "hung up).",
            is_stacked=True,
        ),
        Panel(
            "Prompt and answer lengths",
            (
                *quantiles("vllm:request_prompt_tokens", 0.5, 0.95, matcher=_VLLM, legend="prompt"),
                *quantiles(
                    "vllm:request_generation_tokens", 0.5, 0.95, matcher=_VLLM, legend="answer"
                ),
            ),
            about="In tokens. Long prompts fill the KV cache, long answers take long.",
        ),
    ),
)
_LATENCY = Row(
    "Latency",
    (
        Panel(
            "TTFT",
            (
                *quantiles("vllm:time_to_first_token_seconds", 0.5, 0.95, 0.99, matcher=_VLLM),
                _SLO_LINE,
            ),
            "s",
            about=f"{_TTFT_ABOUT} By the engine: without the gateway's queue.",
        ),
        Panel(
            "ITL",
            quantiles("vllm:inter_token_latency_seconds", 0.5, 0.95, 0.99, matcher=_VLLM),
            "s",
            about="Inter-token latency: from one token of an answer to the next.",
        ),
        Panel(
            "Latency by phase, p95",
            (
                *quantiles("vllm:request_queue_time_seconds", 0.95, matcher=_VLLM, legend="queue"),
                *quantiles(
                    "vllm:request_prefill_time_seconds", 0.95, matcher=_VLLM, legend="prefill"
                ),
                *quantiles(
                    "vllm:request_decode_time_seconds", 0.95, matcher=_VLLM, legend="decode"
                ),
                *quantiles("vllm:e2e_request_latency_seconds", 0.95, matcher=_VLLM, legend="E2E"),
            ),
            "s",
            about="Of a request inside the engine: waiting, reading its prompt, generating, in "
            "all.",
        ),
        heat(
            "ITL, all of them",
            "vllm:inter_token_latency_seconds",
            "s",
            "The buckets are those of the profiles: 1 ms to 5 s.",
            _VLLM,
        ),
    ),
)
_CACHE = Row(
    "Cache",
    (
        Panel(
            "KV cache usage",
            (Query(f"engine:kv_usage:max{{{_ENGINE}}}", "{{instance}}"),),
            "percentunit",
            about="Of the memory for tokens that are being worked on. Above 95 % requests are "
            "preempted.",
            alarm=0.95,
        ),
        Panel(
            "Prefix cache hit rate",
            (Query(f"engine:prefix_hits:ratio5m{{{_ENGINE}}}", "{{instance}}"),),
            "percentunit",
            about="Share of the prompt tokens that were found in the prefix cache, over five "
            "minutes.",
        ),
        Panel(
            "Preemptions",
            (Query(_rate("vllm:num_preemptions_total", "instance", _VLLM), "{{instance}}"),),
            _PER_S,
            about="Requests that are computed again, because the cache was full.",
        ),
    ),
)
_SPECULATION = Row(
    "Speculative decoding",
    (
        Panel(
            "Acceptance rate",
            (
                Query(
                    _share(
                        _rate("vllm:spec_decode_num_accepted_tokens_total", "instance", _VLLM),
                        _rate("vllm:spec_decode_num_draft_tokens_total", "instance", _VLLM),
                    ),
                    "{{instance}}",
                ),
            ),
            "percentunit",
            about="Share of the drafted tokens that the model accepted.",
            empty="this engine does not speculate",
        ),
        Panel(
            "Accepted, by position",
            (
                Query(
                    _rate("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position", _VLLM),
                    "{{position}}",
                ),
            ),
            _TOKENS_PER_S,
            about="By place in the draft: where it falls off, a shorter draft does as well.",
            empty="this engine does not speculate",
        ),
        Panel(
            "Tokens per draft",
            (
                Query(
                    "1 + "
                    + _share(
                        _rate("vllm:spec_decode_num_accepted_tokens_total", "instance", _VLLM),
                        _rate("vllm:spec_decode_num_drafts_total", "instance", _VLLM),
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
            "GPU utilization",
            (Query(f"launcher_gpu_utilization_ratio{{{_ENGINE}}}", "{{instance}} {{gpu}}"),),
            "percentunit",
            about="Share of the time in which a kernel ran, by nvidia-smi: not how well it was "
            "used.",
            empty="no GPU",
            width=6,
        ),
        Panel(
            "GPU memory",
            (
                Query(f"launcher_gpu_memory_used_bytes{{{_ENGINE}}}", "{{instance}} {{gpu}}"),
                Query(f"launcher_gpu_memory_bytes{{{_ENGINE}}}", "{{instance}} {{gpu}}: all"),
            ),
            "bytes",
            about="In use, and all there is. vLLM takes its share at the start and keeps it.",
            empty="no GPU",
            width=6,
        ),
        Panel(
            "GPU power",
            (Query(f"launcher_gpu_power_watts{{{_ENGINE}}}", "{{instance}} {{gpu}}"),),
            "watt",
            about="What the GPU draws: close to its limit it is slowed down.",
            empty="no GPU",
            width=6,
        ),
        Panel(
            "GPU temperature",
            (Query(f"launcher_gpu_temperature_celsius{{{_ENGINE}}}", "{{instance}} {{gpu}}"),),
            "celsius",
            about="How warm the GPU is.",
            empty="no GPU",
            width=6,
        ),
    ),
)
_ENGINE_LIFE = Row(
    "Process",
    (
        Panel(
            "State",
            (Query(_number_states(_ENGINE), "{{instance}}"),),
            kind="states",
            about="As its launcher sees it. waiting: a pause before a restart.",
            width=6,
        ),
        Panel(
            "Hosts of the engine",
            (Query(f"launcher_engine_hosts{{{_ENGINE}}}", "{{instance}} {{state}}"),),
            about="How many it is to have, how many are there; one for most. "
            "It runs only with all of them; the launcher's /status names the missing.",
            width=6,
        ),
        Panel(
            "Front end memory",
            (Query(f'process_resident_memory_bytes{{job="engine", {_ENGINE}}}', "{{instance}}"),),
            "bytes",
            about="Resident memory of the process that answers HTTP. What grows without end leaks.",
            width=6,
        ),
        Panel(
            "What runs",
            (Query(f"launcher_engine_info{{{_ENGINE}}}"),),
            kind="table",
            about="fingerprint: of everything that decides its speed.",
            width=6,
        ),
    ),
)
ENGINE = Board(
    "engine",
    "Gateway: engines",
    "What vLLM does: throughput, TTFT, ITL, KV cache, speculation, GPU.",
    (
        _build_glance(
            "vllm:time_to_first_token_seconds",
            _VLLM,
            tokens=f"sum(engine:generation_tokens:rate1m{{{_ENGINE}}})",
            errors=number(
                "Errors",
                f"sum(rate(gateway_engine_failures_total{{{_CALLED}}}[5m])) "
                f"+ sum(rate(gateway_engine_errors_total{{{_CALLED}}}[5m]))",
                "reqps",
                about="Calls that the engines lost, did not take or answered with an error of "
                "their "
                "own, over five minutes.",
                alarm=0.1,
            ),
            in_flight=f"sum(vllm:num_requests_running{{{_VLLM}}})",
            whose="by the engines",
        ),
        _WORK,
        _LATENCY,
        _CACHE,
        _SPECULATION,
        _GPU,
        _ENGINE_LIFE,
        _CALLERS,
    ),
)

_LAST = Row(
    "The last batch",
    (
        number(
            "Questions",
            "max(gateway_last_batch_prompts)",
            about="Prompts of the last /predict call with several.",
        ),
        number(
            "Seconds",
            "max(gateway_last_batch_seconds)",
            "s",
            about="From its first byte to its answer's last.",
        ),
        number(
            "Tokens a second",
            _share("max(gateway_last_batch_tokens)", "max(gateway_last_batch_seconds)"),
            _TOKENS_PER_S,
            about="New tokens over the time from its first byte to its answer's last.",
            empty="no batch so far",
        ),
        number(
            "Characters a second",
            _share("max(gateway_last_batch_characters)", "max(gateway_last_batch_seconds)"),
            "si:char/s",
            about="Of the answers, over the same time.",
            empty="no batch so far",
        ),
        number(
            "Characters an answer",
            _share("max(gateway_last_batch_characters)", "max(gateway_last_batch_prompts)"),
            about="On average. Answers that grow longer take longer.",
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
            "reqpm",
            about="Calls of /predict a minute, whatever their size.",
        ),
        Panel(
            "E2E latency of a call",
            quantiles("gateway_request_seconds", 0.5, 0.95, matcher=_PREDICT),
            "s",
            about="From a /predict call's first byte to its answer's last.",
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
            about="By all routes' tokens and /predict's characters, pauses between calls included.",
        ),
        Panel(
            "Questions without an answer",
            (Query(_rate("gateway_prompts_failed_total", "code"), "{{code}}"),),
            _PER_S,
            about="Prompts of /predict that got none, and why; the others of their call were "
            "answered.",
            is_stacked=True,
            empty="every question was answered",
        ),
    ),
)
_START = Row(
    "Warm-up",
    (
        number(
            "Warm-up batch",
            f"max(gateway_warmup_seconds{{{_CALLED}}})",
            "s",
            about="How long the last batch took that an engine had to answer before it got work.",
        ),
        number(
            "Warm-ups that failed, 1 h",
            f'sum(increase(gateway_warmups_total{{outcome="failed", {_CALLED}}}[1h]))',
            about="The gateway's log says why (warmup_failed).",
            alarm=1,
        ),
        number(
            "Engine ready after",
            f"max(launcher_engine_start_seconds{{{_ENGINE}}})",
            "s",
            about="From its start to its first token; the judge waits for 420 s in all.",
            alarm=420,
        ),
        Panel(
            "Engines ready",
            (Query(f"max by (engine) (gateway_engine_ready{{{_CALLED}}})", "{{engine}}"),),
            "bool_yes_no",
            about="Yes: it has answered the batch that it will serve.",
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
            _TOKENS_PER_S,
            about="Tokens generated a second while it was graded.",
            empty="not graded",
        ),
        number(
            "Graded: characters a second",
            'max(gateway_grade{figure="characters/s"})',
            "si:char/s",
            about="Characters answered a second while it was graded.",
            empty="not graded",
        ),
        number(
            "Graded: when",
            "max(gateway_grade_timestamp_seconds) * 1000",
            "dateTimeFromNow",
            about="When the record of the last grade was taken.",
            empty="never",
        ),
        Panel(
            "Graded: everything",
            (Query("gateway_grade"),),
            kind="table",
            about="All figures of the last grade, each with its unit.",
            empty="not graded",
        ),
    ),
)
COURSE = Board(
    "course",
    "Gateway: the course",
    "Batches as the course's judge sends them: how large, how fast, how good.",
    (
        _build_glance(
            "vllm:time_to_first_token_seconds",
            _VLLM,
            tokens='sum(gateway:tokens:rate1m{direction="out"})',
            errors=_ERRORS,
            in_flight="sum(gateway_running_sequences)",
            whose="by the engines, of every question",
        ),
        _LAST,
        _BATCHES,
        _START,
        _GRADES,
        _CALLERS,
    ),
)

BOARDS = (OVERVIEW, ENGINE, COURSE)
