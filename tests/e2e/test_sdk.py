"""Every route through the real OpenAI SDK, sync and async, with the real engine behind."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from tokenizers import Tokenizer

from common.ports import find_free_ports
from gateway.admission.keys import make_key
from tests.e2e.clients import KINDS, Kind, Sdk, open_sdk
from tests.e2e.conftest import ROOT, Stack
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

USER: list[dict[str, Any]] = [{"role": "user", "content": "什么是 warp？"}]
DIGIT = {"type": "integer", "enum": [7]}
SCHEMA = {
    "type": "object",
    "properties": {"n": DIGIT},
    "required": ["n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "count", "parameters": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "count"}}


class Digit(pydantic.BaseModel):
    """What the demo model can be made to say by a schema."""

    n: Literal[7]


@pytest.fixture(scope="session")
def no_blanks() -> dict[str, float]:
    """A bias against blanks: JSON allows any number of them, and so small a model loves them."""
    tokenizer = Tokenizer.from_file(str(ROOT / "demo" / "model" / "tokenizer.json"))
    ids = range(tokenizer.get_vocab_size())
    return {str(one): -100.0 for one in ids if not tokenizer.decode([one]).strip()}


@pytest.fixture(params=KINDS)
async def sdk(request: pytest.FixtureRequest, stack: Stack) -> AsyncIterator[Sdk]:
    async with open_sdk(request.param, stack.gateway) as opened:
        yield opened


async def test_models_are_listed_and_retrieved(sdk: Sdk) -> None:
    listed = await sdk.ask(lambda client: client.models.list())
    one = await sdk.ask(lambda client: client.models.retrieve("demo"))

    assert [model.id for model in listed.data] == ["demo"]
    assert one.id == "demo"


async def test_completion_and_its_stream_say_the_same(sdk: Sdk) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "CUDA", "max_tokens": 12, "temperature": 0}

    whole = await sdk.ask(lambda client: client.completions.create(**asked))
    events = await sdk.collect(
        lambda client: client.completions.create(
            stream=True, stream_options={"include_usage": True}, **asked
        )
    )

    assert "".join(one.choices[0].text for one in events if one.choices) == whole.choices[0].text
    assert events[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12


async def test_completion_of_several_prompts_keeps_their_order(sdk: Sdk) -> None:
    prompts = [f"number {number}" for number in range(20)]

    answer = await sdk.ask(
        lambda client: client.completions.create(
            model="demo", prompt=prompts, max_tokens=1, echo=True
        )
    )

    for choice, prompt in zip(answer.choices, prompts, strict=True):
        assert choice.text.startswith(prompt)


async def test_chat_and_its_stream_say_the_same(sdk: Sdk) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": USER, "max_tokens": 12, "temperature": 0}

    whole = await sdk.ask(lambda client: client.chat.completions.create(**asked))
    events = await sdk.collect(lambda client: client.chat.completions.create(stream=True, **asked))

    pieces = [one.choices[0].delta.content or "" for one in events]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


async def test_chat_with_several_choices_and_logprobs(sdk: Sdk) -> None:
    answer = await sdk.ask(
        lambda client: client.chat.completions.create(
            model="demo",
            messages=USER,
            max_tokens=4,
            n=3,
            seed=1,
            temperature=1.5,
            logprobs=True,
            top_logprobs=2,
        )
    )

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(len(choice.logprobs.content) == 4 for choice in answer.choices)


async def test_chat_parses_what_a_schema_asks_for(sdk: Sdk, no_blanks: dict[str, float]) -> None:
    answer = await sdk.ask(
        lambda client: client.chat.completions.parse(
            model="demo",
            messages=USER,
            max_tokens=60,
            temperature=0,
            response_format=Digit,
            logit_bias=no_blanks,
        )
    )

    assert answer.choices[0].message.parsed == Digit(n=7)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [({"choice": ["#12345#"]}, "#12345#"), ({"regex": "[a-c]{5}"}, "[a-c]{5}")],
    ids=["choice", "regex"],
)
async def test_chat_answers_within_its_bounds(
    sdk: Sdk, outputs: dict[str, object], pattern: str
) -> None:
    events = await sdk.collect(
        lambda client: client.chat.completions.create(
            model="demo",
            messages=USER,
            stream=True,
            max_tokens=30,
            extra_body={"structured_outputs": outputs},
        )
    )

    text = "".join(one.choices[0].delta.content or "" for one in events)
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
async def test_chat_calls_a_tool(
    sdk: Sdk, no_blanks: dict[str, float], choice: dict[str, Any] | str
) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": USER,
        "max_tokens": 60,
        "temperature": 0,
        "tools": [TOOL],
        "tool_choice": choice,
        "logit_bias": no_blanks,
    }

    whole = await sdk.ask(lambda client: client.chat.completions.create(**asked))
    events = await sdk.collect(lambda client: client.chat.completions.create(stream=True, **asked))

    (called,) = whole.choices[0].message.tool_calls
    assert (called.function.name, json.loads(called.function.arguments)) == ("count", {"n": 7})
    deltas = [call for one in events for call in one.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in deltas if call.function.name] == ["count"]
    arguments = "".join(call.function.arguments or "" for call in deltas)
    assert json.loads(arguments) == {"n": 7}


async def test_chat_may_leave_a_tool_alone(sdk: Sdk) -> None:
    answer = await sdk.ask(
        lambda client: client.chat.completions.create(
            model="demo", messages=USER, max_tokens=8, temperature=0, tools=[TOOL]
        )
    )

    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


async def test_response_and_its_stream_say_the_same(sdk: Sdk) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": "什么是 warp？", "max_output_tokens": 12}
    asked |= {"temperature": 0}

    whole = await sdk.ask(lambda client: client.responses.create(**asked))
    events = await sdk.collect(lambda client: client.responses.create(stream=True, **asked))

    assert whole.output_text
    assert whole.usage.output_tokens == 12
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text


async def test_stored_response_is_retrieved_and_gone_on_from(sdk: Sdk) -> None:
    """The gateway keeps it, and one turn follows another."""
    asked: dict[str, Any] = {"model": "demo", "max_output_tokens": 8, "temperature": 0}

    first = await sdk.ask(lambda client: client.responses.create(input="CUDA", **asked))
    kept = await sdk.ask(lambda client: client.responses.retrieve(first.id))
    second = await sdk.ask(
        lambda client: client.responses.create(input="warp", previous_response_id=first.id, **asked)
    )
    with pytest.raises(openai.BadRequestError) as failure:
        await sdk.ask(lambda client: client.responses.cancel(first.id))

    assert (kept.id, kept.output_text) == (first.id, first.output_text)
    assert second.usage.input_tokens > first.usage.input_tokens
    assert _read_error(failure.value)["code"] == "not_in_background"


async def test_embeddings_are_refused_as_the_engine_does(sdk: Sdk) -> None:
    """The demo model makes text; the engine has no such route for it."""
    with pytest.raises(openai.NotFoundError) as failure:
        await sdk.ask(lambda client: client.embeddings.create(model="demo", input="a"))

    assert _read_error(failure.value)["source"] == "engine"


def test_messages_and_their_stream_say_the_same(stack: Stack) -> None:
    """Anthropic's dialect, by plain HTTP."""
    body = {"model": "demo", "messages": USER, "max_tokens": 12, "temperature": 0}
    url = f"{stack.gateway}/v1/messages"

    whole = httpx.post(url, json=body, timeout=60, verify=NO_TLS).json()
    stream = httpx.post(url, json={**body, "stream": True}, timeout=60, verify=NO_TLS)

    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line[:5] == "data:"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == whole["content"][0]["text"]
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    assert whole["usage"]["output_tokens"] == 12


def test_text_survives_its_way_through_tokens(stack: Stack) -> None:
    text = "问题 #12345# ok"
    with httpx.Client(base_url=stack.gateway, verify=NO_TLS) as client:
        tokens = client.post("/tokenize", json={"model": "demo", "prompt": text}).json()["tokens"]
        back = client.post("/detokenize", json={"model": "demo", "tokens": tokens}).json()

    assert back == {"prompt": text}


# Errors, as the SDK's own exceptions.


@dataclass(frozen=True)
class Locked:
    """A second gateway before the same engine, with keys."""

    url: str
    keys: dict[str, str]


LIMITS = {
    "free": "",
    "poor": "requests_per_minute = 1",
    "chat-only": 'routes = ["/v1/chat/completions"]',
    "other-model": 'models = ["other"]',
}


@pytest.fixture(scope="module")
def locked(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    keys_file = tmp_path_factory.mktemp("locked") / "keys.toml"
    made = {name: make_key(name) for name in LIMITS}
    keys_file.write_text("".join(f"{made[name][1]}{limit}\n" for name, limit in LIMITS.items()))
    flags = ["--engines", stack.engine, "--tokenizer", str(ROOT / "demo" / "model")]
    flags += ["--keys-file", str(keys_file), "--warmup-prompts", "2", "--max-body-bytes", "20000"]
    with _serve_gateway(*flags) as url:
        _wait_for(url, "/readyz")
        yield Locked(url, {name: key for name, (key, _) in made.items()})


@contextlib.contextmanager
def _serve_gateway(*flags: str) -> Iterator[str]:
    (port,) = find_free_ports(1)
    command = [sys.executable, "-m", "gateway", "--port", str(port), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait_for(url: str, path: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}{path}", verify=NO_TLS).status_code == 200:
                return
        time.sleep(0.1)
    pytest.fail(f"the second gateway does not answer {path}")


def _complete(**fields: Any) -> Callable[[Any], Any]:
    asked: dict[str, Any] = {"model": "demo", "prompt": "CUDA", "max_tokens": 2} | fields
    return lambda client: client.completions.create(**asked)


@pytest.mark.parametrize(
    ("call", "expected", "status"),
    [
        (_complete(temperature=-1), openai.BadRequestError, 400),
        (_complete(n=1000), openai.BadRequestError, 400),
        (_complete(prompt=""), openai.BadRequestError, 400),
        (_complete(model="nope"), openai.NotFoundError, 404),
        (lambda client: client.files.list(), openai.NotFoundError, 404),
        (
            _complete(extra_headers={"X-Deadline-Ms": "1"}, max_tokens=500),
            openai.InternalServerError,
            504,
        ),
    ],
    ids=["engine-400", "gateway-400", "empty", "model", "path", "deadline"],
)
async def test_refusal_is_the_sdks_own_exception(
    sdk: Sdk, call: Callable[[Any], Any], expected: type[openai.APIStatusError], status: int
) -> None:
    with pytest.raises(expected) as failure:
        await sdk.ask(call)

    assert failure.value.status_code == status
    assert failure.value.request_id == failure.value.response.headers["x-request-id"]
    assert _read_error(failure.value)["message"]
    assert _read_error(failure.value)["source"] in {"gateway", "engine"}


def _read_error(error: openai.APIStatusError) -> dict[str, Any]:
    assert isinstance(error.body, dict)
    return error.body


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "expected", "code"),
    [
        ("unknown", openai.AuthenticationError, "invalid_api_key"),
        ("chat-only", openai.PermissionDeniedError, "route_not_allowed"),
        ("other-model", openai.PermissionDeniedError, "model_not_allowed"),
    ],
)
async def test_key_that_may_not_is_the_sdks_own_exception(
    locked: Locked, kind: Kind, key: str, expected: type[openai.APIStatusError], code: str
) -> None:
    async with open_sdk(kind, locked.url, locked.keys.get(key, "unknown")) as sdk:
        with pytest.raises(expected) as failure:
            await sdk.ask(_complete())

    assert failure.value.code == code


@pytest.mark.parametrize("kind", KINDS)
async def test_key_with_nothing_left_is_a_rate_limit_error(locked: Locked, kind: Kind) -> None:
    async with open_sdk(kind, locked.url, locked.keys["poor"]) as sdk:

        async def ask_twice() -> None:
            await sdk.ask(_complete())
            await sdk.ask(_complete())

        with pytest.raises(openai.RateLimitError) as failure:
            await ask_twice()

    assert int(failure.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("kind", KINDS)
async def test_body_too_large_is_a_status_error(locked: Locked, kind: Kind) -> None:
    async with open_sdk(kind, locked.url, locked.keys["free"]) as sdk:
        with pytest.raises(openai.APIStatusError) as failure:
            await sdk.ask(_complete(prompt="a" * 30_000))

    assert failure.value.status_code == 413


@pytest.mark.parametrize("kind", KINDS)
async def test_slow_answer_is_a_timeout_error(stack: Stack, kind: Kind) -> None:
    async with open_sdk(kind, stack.gateway, timeout_s=0.3) as sdk:
        with pytest.raises(openai.APITimeoutError):
            await sdk.ask(_complete(max_tokens=1900, extra_body={"ignore_eos": True}))


@pytest.mark.parametrize("kind", KINDS)
async def test_closed_port_is_a_connection_error(kind: Kind) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it meanwhile
        async with open_sdk(kind, f"http://127.0.0.1:{held.getsockname()[1]}") as sdk:
            with pytest.raises(openai.APIConnectionError):
                await sdk.ask(_complete())


async def test_stream_that_fails_amid_raises_while_it_is_read(sdk: Sdk) -> None:
    with pytest.raises(openai.APIError, match="deadline"):
        await sdk.collect(
            _complete(
                stream=True,
                max_tokens=1900,
                extra_body={"ignore_eos": True},
                extra_headers={"X-Deadline-Ms": "700"},
            )
        )


def test_engine_that_is_away_is_503_with_a_time_to_come_back() -> None:
    flags = ["--engines", "http://127.0.0.1:9", "--prompt-style", "raw", "--restart-hold-s", "0.1"]
    with _serve_gateway(*flags) as url:
        _wait_for(url, "/healthz")
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.InternalServerError) as failure,
        ):
            _complete()(client)

    assert failure.value.status_code == 503
    assert int(failure.value.response.headers["retry-after"]) >= 1
