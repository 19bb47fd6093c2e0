"""The launcher's own scheduler in the real engine: the answers are those of vLLM's own."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Stack
from tests.launcher.programs import Launcher, wait_for
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
Pairs = list[dict[str, str]]
FEW = 60  # questions, where each costs the engines much


def ask(url: str, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 120, "temperature": 0} | fields
    answer = httpx.post(
        f"{url}/v1/completions", json=body, timeout=300, trust_env=False, verify=NO_TLS
    ).json()
    choices: list[dict[str, Any]] = answer["choices"]
    for choice in choices:
        choice["usage"] = answer["usage"]
    return sorted(choices, key=lambda choice: int(choice["index"]))


def read_stream(url: str, prompt: str, **fields: Any) -> list[str]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 120, "temperature": 0} | fields
    body["stream"] = True
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, timeout=300, trust_env=False, verify=NO_TLS
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]


def read_scheduler(stack: Stack) -> dict[str, Any]:
    return dict(httpx.get(f"{stack.status}/status", verify=NO_TLS).json()["scheduler"])


def test_engine_to_compare_with_has_vllms_own(stock: Launcher) -> None:
    scheduler = stock.status()["scheduler"]
    assert scheduler["planned"].startswith("vLLM's own")
    assert scheduler["state"] == ""
    assert "Decode scheduler" not in (stock.state / "engine.log").read_text()


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"ignore_eos": True, "max_tokens": 37},
    {"max_tokens": 1},
    {"stop": ["。"]},
    {"stop_token_ids": [50, 60, 70, 80]},
    {"min_tokens": 20},
    {"n": 2, "temperature": 0.8, "seed": 7},
    {"logprobs": 1, "max_tokens": 8},
    {"echo": True, "max_tokens": 9},
)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_batch_is_answered_as_by_vllms_own(
    stack: Stack, stock: Launcher, pairs: Pairs, fields: dict[str, Any]
) -> None:
    questions = [pair["question"] for pair in pairs[: FEW if fields else len(pairs)]]
    assert ask(stack.engine, questions, **fields) == ask(stock.engine_url, questions, **fields)


def test_streams_beside_a_batch_and_the_batch_are_answered_as_by_vllms_own(
    stack: Stack, stock: Launcher, pairs: Pairs
) -> None:
    questions = [pair["question"] for pair in pairs]
    expected = ask(stock.engine_url, questions, ignore_eos=True)
    with ThreadPoolExecutor(9) as threads:
        batch = threads.submit(ask, stack.engine, questions, ignore_eos=True)
        streams = [threads.submit(read_stream, stack.engine, one) for one in questions[:8]]
        chunks = [stream.result() for stream in streams]
    assert batch.result() == expected
    alone = [choice["text"] for choice in ask(stock.engine_url, questions[:8])]
    assert ["".join(parts) for parts in chunks] == alone
    assert all(len(parts) > 3 for parts in chunks)  # handed over as they came, not in the end


def test_caller_gone_amid_a_batch_costs_the_other_batch_nothing(
    stack: Stack, stock: Launcher, pairs: Pairs
) -> None:
    questions = [pair["question"] for pair in pairs]
    expected = ask(stock.engine_url, questions[:100])
    gone = threading.Thread(target=hang_up, args=(stack.engine, questions))
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(ask, stack.engine, questions[:100])
        gone.start()
        assert other.result() == expected
    gone.join()
    wait_for(lambda: count_running(stack) == 0, "the engine is idle", within_s=30)
    assert ask(stack.engine, questions[:100]) == expected


def hang_up(url: str, questions: list[str]) -> None:
    body = {"model": "demo", "prompt": questions, "max_tokens": 1500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.7, trust_env=False, verify=NO_TLS)


def count_running(stack: Stack) -> float:
    lines = httpx.get(f"{stack.engine}/metrics", trust_env=False, verify=NO_TLS).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if "num_requests_running{" in line)


def test_scheduler_after_all_this_is_still_the_launchers(stack: Stack) -> None:
    scheduler = read_scheduler(stack)
    assert scheduler["planned"].startswith("the launcher's")
    assert (scheduler["state"], scheduler["fallbacks"]) == ("on", 0)
