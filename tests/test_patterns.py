"""Patterns over text that others write: none takes longer than in proportion to it.

Callers, engines and their logs, model folders and files of questions: whoever writes a megabyte of
the worst character must not stop anybody. Measured in CPU time, a hundred times what it takes.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from common import json_text, questions, settings
from common.web import foreign_pages
from gateway import middleware, request_body
from gateway.observability import metrics
from gateway.page import launchers
from gateway.records import ranges, redaction
from gateway.routes import page
from gateway.schemas import large_json, media, openai, predict, vllm
from gateway.schemas.constraints import regex_cost
from launcher import config
from launcher.engine import vllm_log
from launcher.models import families, model

pytestmark = pytest.mark.programs

MODULES = (
    *(json_text, questions, settings, middleware, metrics, launchers, page, openai),
    *(
        large_json,
        media,
        regex_cost,
        foreign_pages,
        request_body,
        predict,
        vllm,
        config,
        vllm_log,
        families,
        model,
        ranges,
        redaction,
    ),
)
FEW, MANY = 2_000, 1_000_000
LONGEST_FEW_S, LONGEST_MANY_S = 0.005, 3.0  # what grows with the square takes minutes for many
# Only ever asked whether they fit a whole text; looking for them inside would be another question.
WHOLE = {
    "_HUB_NAME",
    "_ID",
    "_KEY",
    "_PROXY_HEADERS",
    "_REQUEST_ID",
    "_NUMBERS",
    "_HEADER_SAFE",
    "_JSON",
}
CUT = {"gateway.page.launchers": 400}  # what they look at is cut to so many characters before
# What a pattern may be drawn into, and what keeps it there until the end.
UNITS = (
    *(" ", "\n", "\t", "\r", "1", "a", "-", ".", ":", "=", "_", "(", ")", "[", "]", "{", "}", '"'),
    *("\\", "\\\\", "\\u", "\\ud800", "/", "@", "█", "<think>", "问题", "（1", "{}", "[]"),
    *('"usage":{', '"usage": ', '"usage":{"a":{', '"type": "response.', '"url": "', '"a",', "1,"),
    *(
        " Loading ",
        "checkpoint shards: ",
        "Capturing CUDA graphs",
        "Capturing CUDA graph: ",
        "Error",
    ),
    *("init engine (", "INFO 11-28 00:00:00 [", "api_utils.py:1] ", "error: ", "\x1b[1", "://a:"),
    *(
        "bearer ",
        "--key ",
        "key= ",
        "key=",
        "version=",
        "vllm:num_requests_running ",
        "x-proxy",
        "tools",
    ),
    *("\n1", "\n ", " a=", "a=", "forwarded-", "sk-", "Received request ", "cmpl-a", "hf_", "NUMA"),
)
STARTS = (
    *(
        "",
        "(a",
        "(",
        "\n1",
        "（1",
        "api_utils.py:1]",
        "checkpoint shards:",
        "Capturing CUDA graph:",
    ),
    *("INFO 11-28 00:00:00 [a]", "INFO:", "INFO 11-28 ", "Received request a-", "bearer", "--key"),
    *(
        "key=",
        "://",
        "<think>",
        '"',
        '"usage":',
        '"usage":{',
        '"type":',
        "cmpl-a-",
        "init engine (",
    ),
)
ENDS = ("", "!")


def find_patterns() -> Iterator[tuple[str, re.Pattern[Any]]]:
    for module in MODULES:
        own = {name: one for name, one in vars(module).items() if not name.startswith("__")}
        for name, value in own.items():
            for number, one in enumerate(_flatten(value)):
                yield f"{module.__name__}.{name}[{number}]", one


def _flatten(value: object) -> Iterator[re.Pattern[Any]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _flatten(one)


PATTERNS = dict(find_patterns())


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_over_the_worst_text_takes_no_longer_than_in_proportion(name: str) -> None:
    module, _, variable = name.partition("[")[0].rpartition(".")
    pattern = PATTERNS[name]
    most = CUT.get(module, MANY)

    def measure(text: str, times: int = 1) -> float:
        data = text.encode() if isinstance(pattern.pattern, bytes) else text
        return min(_measure(pattern, data, is_whole=variable in WHOLE) for _ in range(times))

    slowest, slowest_s = ("", "", ""), 0.0
    for parts in itertools.product(STARTS, UNITS, ENDS):
        text = _fill(parts, min(FEW, most))
        took_s = measure(text)
        if took_s > LONGEST_FEW_S:
            took_s = measure(text, times=3)  # or something else came between
        assert took_s < LONGEST_FEW_S, f"{took_s:.3f} s for {parts}"
        if took_s > slowest_s:
            slowest, slowest_s = parts, took_s
    took_s = measure(_fill(slowest, most))
    assert took_s < LONGEST_MANY_S, f"{took_s:.1f} s for {slowest}"


def _fill(parts: tuple[str, str, str], length: int) -> str:
    start, unit, end = parts
    return start + unit * (length // len(unit)) + end


def _measure(pattern: re.Pattern[Any], data: Any, *, is_whole: bool) -> float:
    began = time.thread_time()
    if is_whole:
        pattern.fullmatch(data)
    else:
        deque(pattern.finditer(data), maxlen=0)
    return time.thread_time() - began
