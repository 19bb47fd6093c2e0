"""Real engines of two models behind one gateway, found by DNS: each call gets its model's answer,
an engine joins, takes work and leaves, and one that dies within a batch costs no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from common.project import DEMO_MODEL
from tests.e2e.conftest import Stack
from tests.gateway.process import serve_process
from tests.launcher.programs import Launcher, running, wait_for
from tests.name_server import NameServer, run_name_server
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
NAME = "_http._tcp.vllm.test"
START_S = 120.0
BATCH = 358


@dataclass
class Fleet:
    """A gateway, the name server that tells it of engines, and those that this module started."""

    gateway: str
    names: NameServer
    demo: int  # the ports of the engines: of the session's stack,
    second: Launcher  # of the demo model once more,
    other: Launcher  # and of another one

    def list_engines(self, *ports: int) -> None:
        self.names.records[NAME, "SRV"] = [f"0 0 {port} localhost." for port in ports]

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.gateway}{path}", json=body, timeout=200, verify=NO_TLS)

    def read_figure(self, start: str) -> float:
        text = httpx.get(f"{self.gateway}/metrics", verify=NO_TLS).text
        found = [line for line in text.splitlines() if line.startswith(start)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def is_ready(self, port: int) -> bool:
        return self.read_figure(f'gateway_engine_ready{{engine="http://localhost:{port}"}}') == 1


def make_other_model(folder: Path) -> Path:
    """A Llama of two layers that nobody has trained, with the demo's tokenizer."""
    torch.manual_seed(1)
    vocabulary = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).get_vocab_size()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def fleet(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    model = make_other_model(folder / "other-model")
    more = {"LAUNCHER_SET": "max-num-seqs=64"}
    second = Launcher(folder / "second", settings=more, fake=None)
    other = Launcher(folder / "other", settings=more | {"LAUNCHER_MODEL": str(model)}, fake=None)
    demo = int(stack.engine.rpartition(":")[2])
    names = NameServer()
    with running(second), running(other):
        second.wait_state("ready", within_s=START_S)
        other.wait_state("ready", within_s=START_S)
        names.records[NAME, "SRV"] = [
            f"0 0 {port} localhost." for port in (demo, other.engine_port)
        ]
        with serve_in_thread(folder, names) as url:
            yield Fleet(url, names, demo, second, other)


@contextlib.contextmanager
def serve_in_thread(folder: Path, names: NameServer) -> Iterator[str]:
    """Name server and gateway need an event loop that outlives each test's."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(120)

    stack = contextlib.AsyncExitStack()

    async def start() -> str:
        await stack.enter_async_context(run_name_server(names))
        flags = ["--dns-server", names.address, "--discovery-interval-s", "1"]
        flags += ["--default-model", "demo", "--max-tokens", "32"]
        flags += ["--restart-hold-s", "120", "--dedup", "false"]
        served = serve_process(folder, f"srv+http://{NAME}", *flags)
        return (await stack.enter_async_context(served)).url

    try:
        yield run(start())
    finally:
        run(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_call_is_answered_by_its_model(fleet: Fleet, pairs: list[dict[str, str]]) -> None:
    listed = httpx.get(f"{fleet.gateway}/v1/models", verify=NO_TLS).json()["data"]
    question = pairs[0]["question"]
    messages = [{"role": "user", "content": question}]
    answers = {
        name: fleet.post(
            "/v1/completions",
            {"model": name, "prompt": question, "max_tokens": 8, "temperature": 0},
        ).json()
        for name in ("demo", "other-model")
    }
    none = fleet.post("/v1/chat/completions", {"model": "none", "messages": messages})
    predicted = fleet.post("/predict", {"prompt": question, "max_tokens": 256}).json()["response"]
    other = fleet.post("/predict", {"prompt": question, "model": "other-model"}).json()["response"]

    assert {card["id"]: card["max_model_len"] for card in listed} == {
        "demo": 2048,
        "other-model": 512,
    }
    assert {name: answer["model"] for name, answer in answers.items()} == {
        "demo": "demo",
        "other-model": "other-model",
    }
    assert none.status_code == 404
    assert "demo, other-model" in none.json()["error"]["message"]
    assert predicted == pairs[0]["answer"]
    assert other != predicted


def test_engine_joins_takes_work_and_leaves_without_a_lost_request(
    fleet: Fleet, record_property: Callable[[str, object], None]
) -> None:
    second = fleet.second.engine_port
    running_there = f'gateway_engine_running_sequences{{engine="http://localhost:{second}"}}'
    is_over = threading.Event()

    def ask() -> list[int]:
        statuses = []
        while not is_over.is_set():
            body = {"model": "demo", "prompt": "What is a warp?", "max_tokens": 16}
            statuses.append(fleet.post("/v1/completions", body).status_code)
        return statuses

    with ThreadPoolExecutor() as threads:
        callers = [threads.submit(ask) for _ in range(6)]
        try:
            began = time.monotonic()
            fleet.list_engines(fleet.demo, fleet.other.engine_port, second)
            wait_for(lambda: fleet.read_figure(running_there) > 0, "work for it", within_s=60)
            record_property("seconds_until_it_took_work", time.monotonic() - began)
            fleet.list_engines(fleet.demo, fleet.other.engine_port)
            wait_for(lambda: not fleet.is_ready(second), "its leaving", within_s=60)
        finally:
            is_over.set()
        statuses = [status for caller in callers for status in caller.result()]

    assert len(statuses) > len(callers)
    assert set(statuses) == {200}


def test_engine_that_dies_within_a_batch_costs_no_answer(
    fleet: Fleet, pairs: list[dict[str, str]]
) -> None:
    questions = [pairs[place % len(pairs)]["question"] for place in range(BATCH)]
    body = {"prompt": questions, "max_tokens": 256}
    expected = fleet.post("/predict", body).json()
    second = fleet.second.engine_port
    fleet.list_engines(fleet.demo, fleet.other.engine_port, second)
    wait_for(lambda: fleet.is_ready(second), "the second engine", within_s=60)
    running_there = f'gateway_engine_running_sequences{{engine="http://localhost:{second}"}}'

    with ThreadPoolExecutor() as threads:
        asked = threads.submit(fleet.post, "/predict", body)
        wait_for(lambda: fleet.read_figure(running_there) > 1, "its part of the batch")
        os.killpg(fleet.second.status()["engine"]["pid"], signal.SIGKILL)
        answer = asked.result()

    assert fleet.read_figure("gateway_retried_prompts_total") > 1
    assert answer.status_code == 200
    assert answer.json() == expected
    assert (
        sum(a == pairs[n % len(pairs)]["answer"] for n, a in enumerate(expected["response"])) > 300
    )
