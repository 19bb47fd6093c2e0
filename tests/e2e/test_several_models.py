"""Real engines of two models behind one gateway, found by DNS: each call gets its model's answer,
an engine joins, takes work and leaves, and one that dies within a batch costs no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from common.project import DEMO_MODEL
from gateway.admission.keys import make_key
from lab.faults.servers.name_server import NameServer, run_name_server
from launcher.engine.process import list_group
from launcher.engine.temporary_folder import find_temporary_folder
from tests.e2e.conftest import Stack
from tests.gateway.process import serve_process
from tests.launcher.programs import Launcher, ask_in_background, running, wait_for
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
NAME = "_http._tcp.vllm.test"
START_S = 200.0
BATCH = 358


@dataclass
class Fleet:
    """A gateway, the name server that tells it of engines, and these."""

    gateway: str
    headers: dict[str, str]
    folder: Path
    names: NameServer
    demo: int  # the port of the one in the stack that all tests share
    second: Launcher  # of the demo model once more
    other: Launcher  # of another one

    def list_engines(self, *ports: int) -> None:
        self.names.records[NAME, "SRV"] = [f"0 0 {port} localhost." for port in ports]

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        url = f"{self.gateway}{path}"
        return httpx.post(url, json=body, headers=self.headers, timeout=200, verify=NO_TLS)

    def list_models(self) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.gateway}/v1/models", headers=self.headers, verify=NO_TLS)
        return list(answer.json()["data"])

    def read_figure(self, start: str) -> float:
        text = httpx.get(f"{self.gateway}/metrics", verify=NO_TLS).text
        found = [line for line in text.splitlines() if line.startswith(start)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def is_ready(self, port: int) -> bool:
        return self.read_figure(f'gateway_engine_ready{{engine="http://localhost:{port}"}}') == 1


def make_other_model(folder: Path) -> Path:
    """A Qwen3 of two layers that nobody has trained, with the demo's tokenizer."""
    torch, transformers = import_module("torch"), import_module("transformers")
    torch.manual_seed(1)
    vocabulary = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).get_vocab_size()
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    return folder


def make_adapter(folder: Path) -> Path:
    """For that model; strong enough to change what it says."""
    torch, safetensors = import_module("torch"), import_module("safetensors.torch")
    torch.manual_seed(2)
    folder.mkdir()
    weights = {}
    for layer in range(2):
        for name, width in (("q_proj", 256), ("v_proj", 128)):
            head = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{head}.lora_A.weight"] = torch.randn(8, 256)
            weights[f"{head}.lora_B.weight"] = torch.randn(width, 8)
    safetensors.save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return folder


@pytest.fixture(scope="module")
def fleet(
    stack: Stack, stock: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    model = make_other_model(folder / "other-model")
    own = {
        "LAUNCHER_MODEL": str(model),
        "LAUNCHER_SET": "max-num-seqs=64 enable-lora=true max-lora-rank=8",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "LAUNCHER_DRAIN_TIMEOUT_S": "60",
        "LAUNCHER_KILL_TIMEOUT_S": "15",
    }
    other = Launcher(folder / "other", settings=own, fake=None)
    demo = int(stack.engine.rpartition(":")[2])
    names = NameServer()
    with running(other):
        other.wait_state("ready", within_s=START_S)
        names.records[NAME, "SRV"] = [
            f"0 0 {port} localhost." for port in (demo, other.engine_port)
        ]
        key, entry = make_key("admin")
        (folder / "keys.toml").write_text(f"{entry}admin = true\n")
        headers = {"Authorization": f"Bearer {key}"}
        with serve_in_thread(folder, names) as url:
            yield Fleet(url, headers, folder, names, demo, stock, other)


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
        flags += ["--keys-file", str(folder / "keys.toml")]
        flags += ["--default-model", "demo", "--max-tokens", "32"]
        flags += ["--restart-hold-s", "120", "--no-dedup"]
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
    listed = fleet.list_models()
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
    assert predicted[:8] == pairs[0]["answer"][:8]
    assert other != predicted


def test_adapter_is_loaded_served_by_its_name_and_dropped(fleet: Fleet) -> None:
    def ask(model: str) -> httpx.Response:
        body = {"model": model, "prompt": "What is a warp?", "max_tokens": 16, "temperature": 0}
        return fleet.post("/v1/completions", body)

    order = {"lora_name": "odd", "lora_path": str(make_adapter(fleet.folder / "odd"))}
    loaded = fleet.post("/v1/load_lora_adapter", {**order, "model": "other-model"})
    listed = [card["id"] for card in fleet.list_models()]
    plain, odd = ask("other-model").json(), ask("odd").json()
    predicted = fleet.post("/predict", {"prompt": "What is a warp?", "model": "odd"})
    dropped = fleet.post("/v1/unload_lora_adapter", {"lora_name": "odd"})
    refused = fleet.post("/v1/load_lora_adapter", order)  # the default model's engines cannot

    assert loaded.status_code == 200, loaded.text
    assert listed == ["demo", "other-model", "odd"]
    assert (plain["model"], odd["model"]) == ("other-model", "odd")
    assert plain["choices"][0]["text"] != odd["choices"][0]["text"]
    assert predicted.status_code == 200
    assert (dropped.status_code, ask("odd").status_code) == (200, 404)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapters_not_changed")


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
            # Before it is ready, its warm-up is what runs there.
            wait_for(lambda: fleet.is_ready(second), "the third engine", within_s=60)
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


def test_engine_told_to_stop_within_a_batch_finishes_it(fleet: Fleet) -> None:
    """The last test: it ends the engine of the other model."""
    other = fleet.other
    group = other.status()["engine"]["pid"]

    async def scenario() -> httpx.Response:
        task = ask_in_background(other.engine_url, 64, max_tokens=250, model="other-model")
        async with asyncio.timeout(60):
            while not await is_busy(other.engine_url):  # noqa: ASYNC110 — it has no event for this
                await asyncio.sleep(0.01)
        assert not task.done()
        other.send(signal.SIGTERM)
        return await task

    response = asyncio.run(scenario())

    assert response.status_code == 200
    choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 64
    assert other.wait(within_s=60) == 0
    assert list_group(group) == []
    assert not find_temporary_folder(other.state).exists()


async def is_busy(engine: str) -> bool:
    async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as client:
        lines = (await client.get(f"{engine}/metrics")).text.splitlines()
    running_there = (one for one in lines if one.startswith("vllm:num_requests_running{"))
    return any(float(line.rpartition(" ")[2]) for line in running_there)
