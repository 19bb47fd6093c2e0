"""GATEWAY_CONFIG while the gateway runs: each setting that is taken at once, seen to be taken."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
from tokenizers import Tokenizer

from gateway.config import Settings, list_taken_at_once, load_settings
from gateway.engines.pool import POOL
from tests.fake_engine import MODEL_FOLDER, Behaviour
from tests.gateway.conftest import Serve, Served, until

ROOT = Path(__file__).parents[2]
_OWN = {
    "tokenizer": str(MODEL_FOLDER),
    "warmup_prompts": 2,
    "probe_interval_s": 0.05,
    "reload_interval_s": 0.05,
    "root_hold_s": 0.2,
    "restart_hold_s": 0.3,
}
_TOKENIZER = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
_NOWHERE = "http://127.0.0.1:9"

Look = Callable[[Served], Awaitable[Any]]


@dataclass(frozen=True)
class Case:
    """A setting's new value, what somebody sees of it, before and after."""

    value: Any
    look: Look
    before: Any
    after: Any
    own: dict[str, Any] = field(default_factory=dict)  # further settings, all the while


def asked(name: str) -> Look:
    """What the engine was told by a question to /predict."""

    async def look(served: Served) -> Any:
        await served.predict("hi")
        return served.engine.calls[-1].get(name)

    return look


def prompts(text: str, *, has: str) -> Look:
    """Whether it is in what the engine got of a question to /predict."""

    async def look(served: Served) -> bool:
        await served.predict(text)
        (prompt,) = served.engine.calls[-1]["prompt"]
        told = prompt if isinstance(prompt, str) else _TOKENIZER.decode(prompt, False)
        return has in told

    return look


def answers(prompt: Any) -> Look:
    async def look(served: Served) -> Any:
        return (await served.predict(prompt)).json().get("response")

    return look


def posts(path: str, fields: dict[str, Any], *, code: bool = False) -> Look:
    """The status, or the code of the error."""

    async def look(served: Served) -> Any:
        answer = await served.client.post(path, json={"model": "fake", **fields})
        return answer.json()["error"]["code"] if code else answer.status_code

    return look


def chats(**fields: Any) -> Look:
    return posts(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **fields}
    )


async def see_root(served: Served) -> Any:
    return (await served.client.get("/")).json()["status"]


async def list_engines(served: Served) -> Any:
    return [engine.url == _NOWHERE for engine in served.app[POOL].engines]


async def see_refusal(served: Served) -> Any:
    """What somebody is told who asks while another one has the only place."""
    slots = served.engine.slots = asyncio.Semaphore(0)
    inside = asyncio.create_task(served.chat("first"))
    await until(lambda: served.engine.running == 1)
    refused = await served.chat("second")
    slots.release()
    await inside
    return refused.json()["error"]["message"]


async def see_log_level(_served: Served) -> Any:
    """Of libraries; what it is to ours, `tests/common/test_logs.py` shows."""
    return logging.getLogger().level


_REGEX = {"structured_outputs": {"regex": "a{11}"}}
_UNCERTAIN = {"structured_outputs": {"regex": ".{0,50}foo.{0,50}"}}
_ONE_PLACE = {"max_running": 1, "engine_sequences": 1, "warmup_prompts": 1}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
_LONG = {"prompt": "a " * 20_000}

CASES = {
    "engines": Case([_NOWHERE], list_engines, [False], [True]),
    "prompt_style": Case("raw", prompts("hi", has="<|im_start|>"), True, False),
    "system_prompt": Case("Be brief.", prompts("hi", has="Be brief."), False, True),
    "system_prompt_file": Case("one-line", prompts("hi", has="1)"), False, True),
    "enable_thinking": Case(True, prompts("hi", has="THINK"), False, True),
    "max_input_tokens": Case(30, prompts("x " * 200 + "LAST", has="LAST"), True, False),
    "max_tokens": Case(7, asked("max_tokens"), 256, 7),
    "temperature": Case(0.5, asked("temperature"), 0, 0.5),
    "top_p": Case(0.5, asked("top_p"), 1, 0.5),
    "top_k": Case(5, asked("top_k"), 0, 5),
    "seed": Case(3, asked("seed"), None, 3),
    "stop": Case(["END"], asked("stop"), [], ["END"]),
    "single_line": Case(True, answers("a\nb"), "answer:a\nb", "answer:a b"),
    "strip_thinking": Case(False, answers("<think>x</think>y"), "y", "answer:<think>x</think>y"),
    "single_as_list": Case(True, answers("a"), "answer:a", ["answer:a"]),
    "root_status": Case("ok", see_root, "batch", "ok"),
    "max_body_values": Case(
        9,
        posts("/v1/completions", {"prompt": [1] * 40_000}, code=True),
        "prompt_too_long",
        "too_many_values",
    ),
    "max_bytes_per_token": Case(1000, posts("/v1/completions", _LONG), 400, 200),
    "max_prompts": Case(1, posts("/predict", {"prompt": ["a", "b"]}), 200, 400),
    "max_n": Case(1, chats(n=2), 200, 400),
    "max_logprobs": Case(1, chats(logprobs=True, top_logprobs=2), 200, 400),
    "max_new_tokens": Case(9, chats(max_tokens=10), 200, 400),
    "max_schema_bytes": Case(9, chats(response_format=_SCHEMA), 200, 400),
    "media_options": Case(True, chats(mm_processor_kwargs={"a": 1}), 400, 200),
    "structured_outputs": Case(["json"], chats(structured_outputs={"choice": ["a"]}), 200, 403),
    "max_regex_characters": Case(3, chats(**_REGEX), 200, 400),
    "max_regex_states": Case(9, chats(**_REGEX), 200, 400),
    "max_uncertain_states": Case(500, chats(**_UNCERTAIN), 400, 200),
    "max_prompts_per_call": Case(1, posts("/v1/completions", {"prompt": ["a", "b"]}), 200, 400),
    "max_waiting": Case(
        0,
        see_refusal,
        "no place became free within 0.1 s",
        "0 sequences are waiting already; try again in 1 s",
        own={**_ONE_PLACE, "queue_timeout_s": 0.1},
    ),
    "queue_timeout_s": Case(
        0.2,
        see_refusal,
        "no place became free within 0.1 s",
        "no place became free within 0.2 s",
        own={**_ONE_PLACE, "queue_timeout_s": 0.1},
    ),
    "aliases": Case(["mine=fake"], chats(model="mine"), 404, 200),
    "log_level": Case("error", see_log_level, logging.WARNING, logging.ERROR),
}


def test_each_setting_that_is_taken_at_once_has_a_case() -> None:
    assert CASES.keys() == set(list_taken_at_once())


def test_operators_are_told_which_these_are() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("## Other settings while it runs")[2].partition("\n## ")[0]
    listed = section.partition("from then on:")[2].strip().partition("\n\n")[0]

    assert re.findall(r"`(\w+)`", listed) == list_taken_at_once()


@dataclass
class File:
    """A settings file that a gateway follows."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def read(self) -> Settings:
        return load_settings(["--config", str(self.path)])

    def write(self, **changed: Any) -> None:
        lines = {**self.settings, **changed}.items()
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines)
        self.path.write_text(text, encoding="utf-8")


@pytest.fixture
def file(tmp_path: Path) -> File:
    path = tmp_path / "gateway.toml"
    path.write_text("")
    return File(path)


@pytest.fixture
def thinking_model(tmp_path: Path) -> str:
    """The demo's tokenizer with a template that knows of thinking."""
    folder = tmp_path / "thinking"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_FOLDER / name, folder / name)
    template = "{{ messages[-1].content }}{% if enable_thinking %} THINK{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture
def libraries_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)


async def wait_for(look: Look, served: Served, wanted: Any) -> None:
    async def is_so() -> bool:
        return bool(await look(served) == wanted)

    await until(is_so, 5)


@pytest.mark.parametrize("name", list_taken_at_once())
async def test_setting_is_taken_at_once(
    serve: Serve, file: File, thinking_model: str, name: str, libraries_level: None
) -> None:
    case = CASES[name]
    own = {**_OWN, **case.own}
    if name == "enable_thinking":
        own["tokenizer"] = thinking_model
    started = {**own, "tokenizer": Path(own["tokenizer"])}
    async with serve(
        Behaviour(max_model_len=512), config=file.path, reload=file.read, **started
    ) as served:
        file.settings = {**own, "engines": [served.engine_url]}
        before = await case.look(served)
        file.write(**{name: case.value})
        await wait_for(case.look, served, case.after)

    assert before == case.before


async def test_file_that_is_bad_changes_nothing(serve: Serve, file: File) -> None:
    """Nothing at all: not what is good in it, either."""
    with structlog.testing.capture_logs() as lines:
        async with serve(config=file.path, reload=file.read, **_OWN) as served:
            file.settings = {**_OWN, "engines": [served.engine_url]}
            file.write(max_tokens=5, prompt_style="poem")
            await until(lambda: find(lines, "settings_not_reloaded"))
            file.write(max_tokens=5, stop=["a"] * 500)
            await until(lambda: len(find(lines, "settings_not_reloaded")) == 2)
            kept = await asked("max_tokens")(served)
            file.write(max_tokens=5)
            await wait_for(asked("max_tokens"), served, 5)

    reasons = [one["reason"] for one in find(lines, "settings_not_reloaded")]
    assert "GATEWAY_PROMPT_STYLE" in reasons[0]
    assert "GATEWAY_STOP" in reasons[1]
    assert kept == 256


async def test_what_is_taken_at_the_next_start_is_named(serve: Serve, file: File) -> None:
    with structlog.testing.capture_logs() as lines:
        async with serve(config=file.path, reload=file.read, **_OWN) as served:
            file.settings = {**_OWN, "engines": [served.engine_url]}
            file.write(max_tokens=5, routing="prefix", batch_weight=2.0)
            await until(lambda: find(lines, "settings_reloaded"))

    (told,) = find(lines, "settings_reloaded")
    assert told["taken"] == ["max_tokens"]
    assert {"routing", "batch_weight"} <= set(told["at_next_start"])
    assert not set(told["at_next_start"]) & set(list_taken_at_once())


async def test_figures_say_that_settings_are_others_now(serve: Serve, file: File) -> None:
    async def read(served: Served) -> str:
        text = (await served.client.get("/metrics")).text
        (line,) = [one for one in text.splitlines() if one.startswith("gateway_config_info{")]
        return line

    async with serve(config=file.path, reload=file.read, **_OWN) as served:
        file.settings = {**_OWN, "engines": [served.engine_url]}
        before = await read(served)
        file.write(max_tokens=5)
        await wait_for(asked("max_tokens"), served, 5)
        after = await read(served)

    assert before != after
    assert 'max_tokens="5"' in after


def find(lines: Sequence[MutableMapping[str, Any]], name: str) -> list[Any]:
    return [one for one in lines if one["event"] == name]
