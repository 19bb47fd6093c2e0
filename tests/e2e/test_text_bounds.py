"""Megabytes of text are refused before the real engine's tokenizer sees them."""

from __future__ import annotations

import gzip
import json
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.e2e.conftest import Stack
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
TEXT = "Every kernel waits for its warps. " * 360_000  # 12 MB; cutting it takes vLLM 15 s
HEADERS = {"Content-Type": "application/json", "Content-Encoding": "gzip"}


def read_engine_cpu_s(stack: Stack) -> float:
    """What the API server that listens there has worked, tokenizer and all."""
    port = urlsplit(stack.engine).port
    for process in psutil.process_iter():
        try:
            if any(
                one.laddr.port == port and one.status == "LISTEN"
                for one in process.net_connections()
            ):
                times = process.cpu_times()
                return float(times.user + times.system)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise LookupError("nobody listens on the engine's port")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/tokenize", {"prompt": TEXT}),
        ("/tokenize", {"messages": [{"role": "user", "content": TEXT}]}),
        ("/v1/completions", {"prompt": TEXT, "truncate_prompt_tokens": 8, "max_tokens": 1}),
        ("/v1/embeddings", {"input": TEXT, "truncate_prompt_tokens": 8}),
        ("/detokenize", {"tokens": [7] * 3_000_000}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_megabytes_of_text_cost_the_engine_nothing(
    stack: Stack, path: str, fields: dict[str, Any]
) -> None:
    model = httpx.get(f"{stack.engine}/v1/models", verify=NO_TLS).json()["data"][0]["id"]
    body = gzip.compress(json.dumps({"model": model, **fields}).encode(), 6)
    worked_s = read_engine_cpu_s(stack)

    answer = httpx.post(
        f"{stack.gateway}{path}", content=body, headers=HEADERS, timeout=120, verify=NO_TLS
    )

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["source"]) == (
        400,
        "prompt_too_long",
        "gateway",
    )
    assert read_engine_cpu_s(stack) - worked_s < 1


def test_tokenizer_still_answers_what_fits(stack: Stack) -> None:
    text = "Every kernel waits for its warps. " * 20

    told = httpx.post(
        f"{stack.gateway}/tokenize", json={"prompt": text}, timeout=60, verify=NO_TLS
    ).json()
    back = httpx.post(
        f"{stack.gateway}/detokenize", json={"tokens": told["tokens"]}, timeout=60, verify=NO_TLS
    )

    assert told["count"] > 100
    assert back.json()["prompt"].endswith(text)
