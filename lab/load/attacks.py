"""What a hostile caller sends, as fast as they can, and the process that does it.

One line of `ATTACKS` is one attack. Nothing of the others' requests is here.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

import aiohttp

from lab.load.piped_process import PipedProcess

CHAT, COMPLETIONS, PREDICT, TOKENIZE = (
    "/v1/chat/completions",
    "/v1/completions",
    "/predict",
    "/tokenize",
)
_JSON = {"Content-Type": "application/json"}
_GZIP = _JSON | {"Content-Encoding": "gzip"}
_MIB = 2**20
_PIECE_BYTES = 2**18


@dataclass(frozen=True)
class Blow:
    """One request of an attack."""

    path: str
    body: bytes
    is_packed: bool = False

    @property
    def headers(self) -> dict[str, str]:
        return _GZIP if self.is_packed else _JSON


@dataclass(frozen=True)
class Rival:
    """Honest callers in the attack's place."""

    build: Callable[[str], list[Blow]]
    connections: int = 1


@dataclass(frozen=True)
class Attack:
    """`ending`: the answer is read; the caller leaves at its first bytes; or they never send the
    last byte of their body. `rival` asks in the windows without the attack, where the engine has as
    much to do for honest callers: each of its steps takes longer the more it runs, for whomever.
    """

    meaning: str
    build: Callable[[str], list[Blow]]  # from the model's name
    connections: int = 4
    ending: Literal["read", "hang up", "hold back"] = "read"
    rival: Rival | None = None


def _chat(model: str, **fields: Any) -> Blow:
    fixed = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 16}
    return Blow(CHAT, json.dumps(fixed | fields).encode())


def _pack(path: str, body: bytes) -> Blow:
    return Blow(path, gzip.compress(body, 9), is_packed=True)


def _costly_grammars(model: str) -> list[Blow]:
    """Each another one: a verdict that is remembered would not be asked for again."""
    patterns = [f"([^a]{{0,{n}}}[^b]{{0,{n}}}){{0,{n}}}q" for n in range(60, 91, 2)]
    return [_chat(model, structured_outputs={"regex": pattern}) for pattern in patterns]


def _bad_parameters(model: str) -> list[Blow]:
    """vLLM's own checks miss these, and it says 500."""
    beam = {"use_beam_search": True, "n": 2, "length_penalty": -1e308}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    choice = {"choice": ["yes", "no"]}
    return [
        _chat(model, top_k=2**70),
        _chat(model, vllm_xargs={"kv_transfer_params": "x"}),
        _chat(model, **beam),
        _chat(model, response_format=schema),
        _chat(model, structured_outputs={"regex": r"[\p{L}\p{N}]{1,200}"}),
        _chat(model, structured_outputs=choice, allowed_token_ids=[0]),
    ]


def _long_texts(model: str) -> list[Blow]:
    text = "word " * (12 * _MIB // 5)
    cut = {"model": model, "prompt": text, "truncate_prompt_tokens": 8, "max_tokens": 1}
    return [
        _pack(TOKENIZE, json.dumps({"model": model, "prompt": text}).encode()),
        _pack(COMPLETIONS, json.dumps(cut).encode()),
    ]


def _many_values(model: str) -> list[Blow]:
    objects = b",".join([b"{}"] * 10_000_000)
    chat = b'{"model": "%s", "messages": [%s]}' % (model.encode(), objects)
    return [_pack(PREDICT, b'{"prompt": [%s]}' % objects), _pack(CHAT, chat)]


def _streams(model: str) -> list[Blow]:
    long = {"max_tokens": 1900, "ignore_eos": True, "stream": True}
    return [_chat(model, **long), _chat(model, stream_interval=1000, **long)]


def _short_streams(model: str) -> list[Blow]:
    """What those who leave at the first bytes are charged for."""
    return [_chat(model, max_tokens=1, stream=True)]


def _large_bodies(model: str) -> list[Blow]:
    return [_chat(model, user="x" * (30 * _MIB))]


def _large_batches(model: str) -> list[Blow]:
    call = {"model": model, "prompt": _list_prompts(1000), "max_tokens": 64}
    return [Blow(COMPLETIONS, json.dumps(call).encode()), *_one_batch(model)]


def _one_batch(_model: str) -> list[Blow]:
    return [Blow(PREDICT, json.dumps({"prompt": _list_prompts(2000), "max_tokens": 64}).encode())]


def _list_prompts(count: int) -> list[str]:
    return [f"{number}: what is a warp?" for number in range(count)]


ATTACKS = {
    "grammars": Attack("regular expressions that take long to compile", _costly_grammars),
    "bad-parameters": Attack("parameters that the engine answers with 500", _bad_parameters),
    "long-texts": Attack("12 MB of text to be cut into tokens, packed", _long_texts),
    "many-values": Attack("10 million empty objects, packed", _many_values),
    "hang-ups": Attack(
        "long streams, left at their first bytes, against streams of one token",
        _streams,
        connections=16,
        ending="hang up",
        rival=Rival(_short_streams, connections=16),
    ),
    "held-bodies": Attack("30 MB bodies without their last byte", _large_bodies, 24, "hold back"),
    "large-batches": Attack(
        "thousands of prompts a call, against one honest caller's",
        _large_batches,
        rival=Rival(_one_batch),
    ),
}


class Attacker(PipedProcess):
    """Whoever sends them."""

    def __init__(self, name: str, url: str, model: str) -> None:
        super().__init__(_serve_attacks, name, url, model)

    def begin(self, until: float, *, is_rival: bool = False) -> None:
        """By the machine's monotonic clock; the honest caller in the hostile one's place."""
        self.send((until, is_rival))

    async def read_statuses(self) -> Counter[str]:
        """How it was answered in the window that has ended."""
        statuses: Counter[str] = await self.receive()
        return statuses


def _serve_attacks(pipe: Connection, name: str, url: str, model: str) -> None:
    """One window after another, until the pipe's other end is closed or gone."""
    attack = ATTACKS[name]
    rival = attack.rival and replace(
        attack, build=attack.rival.build, connections=attack.rival.connections, ending="read"
    )
    try:
        pipe.send(None)
        while True:
            until, is_rival = pipe.recv()
            one = rival if is_rival and rival else attack
            pipe.send(asyncio.run(_attack(one, one.build(model), url, until)))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return


async def _attack(attack: Attack, blows: Sequence[Blow], url: str, until: float) -> Counter[str]:
    statuses: Counter[str] = Counter()
    order = itertools.cycle(blows)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        strikes = (
            _strike_on(session, url, attack, order, statuses) for _ in range(attack.connections)
        )
        tasks = [asyncio.create_task(strike) for strike in strikes]
        await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return statuses


async def _strike_on(
    session: aiohttp.ClientSession,
    url: str,
    attack: Attack,
    order: Iterator[Blow],
    statuses: Counter[str],
) -> None:
    while True:
        try:
            statuses[await _strike(session, url, attack, next(order))] += 1
        except asyncio.CancelledError:  # by the window's end
            statuses["unanswered"] += 1
            raise
        except aiohttp.ClientError as error:
            statuses[type(error).__name__] += 1
            await asyncio.sleep(0.01)  # refused connections would be a storm of nothing


async def _strike(session: aiohttp.ClientSession, url: str, attack: Attack, blow: Blow) -> str:
    body: Any = blow.body
    headers = blow.headers
    if attack.ending == "hold back":
        headers = headers | {"Content-Length": str(len(blow.body))}
        body = _send_but_last(blow.body)
    async with session.post(url + blow.path, data=body, headers=headers) as answer:
        if attack.ending == "hang up":
            await answer.content.readany()
            answer.close()
        else:
            await answer.read()
        return str(answer.status)


async def _send_but_last(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body) - 1, _PIECE_BYTES):
        yield body[start : min(start + _PIECE_BYTES, len(body) - 1)]
    await asyncio.Event().wait()
