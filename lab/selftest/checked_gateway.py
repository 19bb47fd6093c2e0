"""What every check holds: the OpenAI SDK's client, a plain one for the other routes, a question."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from openai.types.chat import ChatCompletion

from common.json_text import parse_json
from common.prometheus_text import parse_samples, sum_samples
from lab.options import build_headers
from lab.service import LauncherStatus, load_authorities, open_http, read_launcher

QUESTION = "多个线程读取共享内存中同一个地址会不会产生 bank 冲突？请说明原因。"
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
_TIMEOUT_S = 300.0
_RUNNING = "gateway_running_sequences"


class CheckFailed(Exception):
    """What a check saw that it should not have seen."""


@dataclass(frozen=True)
class Observation:
    """What a check saw: words for the line, figures for the record."""

    text: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckedGateway:
    """One gateway, with the model that it serves."""

    url: str
    status_url: str
    sdk: openai.OpenAI
    http: httpx.Client
    model: str
    max_model_len: int

    def predict(self, prompt: object, **fields: object) -> httpx.Response:
        return self.http.post("/predict", json={"prompt": prompt, **fields})

    def chat(self, content: str = QUESTION, **fields: Any) -> ChatCompletion:
        """Greedy and short unless told otherwise; no thinking block where a model has one."""
        answer: ChatCompletion = self.sdk.chat.completions.create(
            **self.build_chat(content), **{"temperature": 0, "max_tokens": 64, **fields}
        )
        return answer

    def build_chat(self, content: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "extra_body": NO_THINKING}

    def text(self, content: str = QUESTION, **fields: Any) -> str:
        return self.chat(content, **fields).choices[0].message.content or ""

    def read_launcher(self) -> LauncherStatus:
        async def read() -> LauncherStatus:
            async with open_http() as client:
                return await read_launcher(self.status_url, client)

        return asyncio.run(read())

    def count_running(self) -> float | None:
        """Sequences inside the engines by the gateway's own count; None if it does not tell."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            samples = parse_samples(self.http.get("/metrics").text)
            return sum_samples(samples, _RUNNING) if _RUNNING in samples else None
        return None


@contextlib.contextmanager
def open_gateway(url: str, status_url: str, api_key: str) -> Iterator[CheckedGateway]:
    """Raises httpx's error or `CheckFailed` when nobody answers, or nobody who serves a model."""
    options: dict[str, Any] = {"timeout": _TIMEOUT_S, "trust_env": False}
    options["verify"] = load_authorities()
    with (
        httpx.Client(base_url=url, headers=build_headers(api_key), **options) as http,
        openai.DefaultHttpxClient(**options) as inner,
        # A retry would hide what is looked for here.
        openai.OpenAI(
            base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, http_client=inner
        ) as sdk,
    ):
        model, length = _read_card(http)
        yield CheckedGateway(url, status_url, sdk, http, model, length)


def _read_card(http: httpx.Client) -> tuple[str, int]:
    """The first model's name and length: the way in, so whatever answers must not break it."""
    answer = http.get("/v1/models")
    expect(answer.is_success, f"{answer.status_code}: {answer.text[:200]}")
    cards = read_object(answer).get("data")
    card = cards[0] if isinstance(cards, list) and cards else None
    name = card.get("id") if isinstance(card, dict) else None
    if not isinstance(card, dict) or not isinstance(name, str):
        raise CheckFailed(f"it names no model: {answer.text[:120]!r}")
    length = card.get("max_model_len")
    return name, length if isinstance(length, int) else 0


def expect(condition: object, complaint: str) -> None:
    if not condition:
        raise CheckFailed(complaint)


def read_object(answer: httpx.Response) -> dict[str, Any]:
    """A JSON object, or a complaint that shows what came instead."""
    try:
        data = parse_json(answer.content)
    except ValueError:
        raise CheckFailed(f"{answer.status_code}, no JSON: {answer.text[:120]!r}") from None
    expect(isinstance(data, dict), f"{answer.status_code}, no object: {answer.text[:120]}")
    return dict(data)


def read_responses(answer: httpx.Response, count: int) -> list[str]:
    """The list in `response`: so many texts."""
    data = read_object(answer)
    expect(answer.status_code == httpx.codes.OK, f"{answer.status_code}: {answer.text[:200]}")
    response = data.get("response")
    if not isinstance(response, list) or not all(isinstance(one, str) for one in response):
        raise CheckFailed(f"`response` is no list of texts: {answer.text[:120]}")
    expect(len(response) == count, f"{len(response)} answers to {count} prompts")
    return response
