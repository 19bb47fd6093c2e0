"""A folder of one's own, of another shape than the demo's: a GPT-2 that nobody has trained, with a
tokenizer of its own and no chat template. One start of it, and all that is done with a model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from playwright.sync_api import expect
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.ports import find_free_ports
from tests.e2e.conftest import ROOT, Stack, start_stack
from tests.page.conftest import Visitor, open_chromium, shoot
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NAME = "my-gpt"
_MESSAGES = [{"role": "user", "content": "CUDA"}]
# What it serves, and what it does not, says the engine itself.
CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "CUDA", "max_tokens": 8, "temperature": 0},
    "/v1/chat/completions": {"messages": _MESSAGES, "max_tokens": 8},
    "/v1/messages": {"messages": _MESSAGES, "max_tokens": 8},
    "/v1/messages/count_tokens": {"messages": _MESSAGES},
    "/v1/responses": {"input": "CUDA", "max_output_tokens": 8, "store": False},
    "/tokenize": {"prompt": "CUDA"},
    "/detokenize": {"tokens": [5, 6, 7]},
}
# What of an engine the gateway does not pass on: its operator's, other programs' names for what
# there is, and halves of a call that only another engine could go on with.
LEFT_OUT = re.compile(
    r"/(ping|invocations|load|server_info|kv_event_sources|metrics|abort_requests"
    r"|scale_elastic_ep|is_scaling_elastic_ep|fault_tolerance/\w+|inference/v1/generate"
    r"|generative_scoring|v1/systemone|v1/realtime|cohere/.*|.*/(de)?render)"
)
_VOLATILE = frozenset(("id", "created", "system_fingerprint"))


def make_model(folder: Path, pairs: list[dict[str, str]]) -> Path:
    torch, transformers = import_module("torch"), import_module("transformers")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair.values()), trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_embd=128,
        n_head=2,
        n_layer=2,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    assert not (folder / "chat_template.jinja").exists()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pairs: list[dict[str, str]]) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / NAME, pairs)


@pytest.fixture(scope="module")
def second(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    place = tmp_path_factory.mktemp("second")
    variables = {
        "GATEWAY_PROMPT_STYLE": "qa",
        "GATEWAY_MAX_TOKENS": "16",
        "GATEWAY_WARMUP_PROMPTS": "8",
        "GATEWAY_RESPONSES_DATABASE": str(place / "responses.sqlite"),
        "GATEWAY_BATCH_FOLDER": str(place / "batches"),
    }
    with start_stack(place, "--model", str(folder), **variables) as running:
        yield running


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_start_without_a_chat_template_says_what_to_set(folder: Path) -> None:
    """Before an engine is started for nothing."""
    flags = ("--port", "--engine-port", "--status-port")
    ports = [f"{flag}={port}" for flag, port in zip(flags, find_free_ports(3), strict=True)]
    done = run("launcher", "up", "--model", str(folder), *ports)

    assert done.returncode == 2
    assert "GATEWAY_PROMPT_STYLE" in done.stderr.splitlines()[-1], done.stderr


def test_predict_answers_one_and_many(second: Stack) -> None:
    one, many = second.predict("CUDA"), second.predict(["CUDA", "warp", "CUDA"])

    assert one.status_code == many.status_code == 200
    assert isinstance(one.json()["response"], str)
    assert len(many.json()["response"]) == 3
    assert "errors" not in many.json()


@pytest.mark.parametrize("path", CALLS)
def test_route_answers_as_the_engine_does(second: Stack, path: str) -> None:
    body = {"model": NAME, **CALLS[path]}
    direct = httpx.post(f"{second.engine}{path}", json=body, timeout=60, verify=NO_TLS)
    through = httpx.post(f"{second.gateway}{path}", json=body, timeout=60, verify=NO_TLS)

    assert through.status_code == direct.status_code, (direct.text, through.text)
    if direct.status_code == 200 and path in {"/tokenize", "/detokenize", "/v1/completions"}:
        assert _strip(through) == _strip(direct)
    if direct.status_code >= 400:
        assert direct.json()["error"]["message"] == through.json()["error"]["message"]


def _strip(answer: httpx.Response) -> dict[str, Any]:
    return {name: value for name, value in answer.json().items() if name not in _VOLATILE}


def test_each_route_of_the_engine_is_passed_on_or_left_out_on_purpose(second: Stack) -> None:
    """Whatever a vLLM serves one day that this list does not know is a choice to be made."""
    paths = [
        set(httpx.get(f"{url}/openapi.json", timeout=60, verify=NO_TLS).json()["paths"])
        for url in (second.engine, second.gateway)
    ]

    missing = paths[0] - paths[1]
    assert {path for path in missing if not LEFT_OUT.fullmatch(path)} == set()
    assert set(CALLS) <= paths[1]


def test_route_that_its_engine_lacks_is_no_failure(second: Stack) -> None:
    body = {"model": NAME, "input": "CUDA"}
    answer = httpx.post(f"{second.gateway}/v1/embeddings", json=body, verify=NO_TLS)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_served")
    assert httpx.get(f"{second.gateway}/readyz", verify=NO_TLS).status_code == 200


async def test_sdk_lists_streams_and_runs_a_batch(second: Stack) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{second.gateway}/v1", api_key="none", max_retries=0
    ) as client:
        listed = [one.id async for one in client.models.list()]
        stream = await client.completions.create(
            model=NAME, prompt="CUDA", max_tokens=8, temperature=0, stream=True
        )
        text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
        whole = await client.completions.create(
            model=NAME, prompt="CUDA", max_tokens=8, temperature=0
        )
        body = {"model": NAME, "prompt": "CUDA", "max_tokens": 8}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
        uploaded = await client.files.create(
            file=("lines.jsonl", json.dumps(line).encode()), purpose="batch"
        )
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        while batch.status in {"validating", "in_progress", "finalizing"}:
            batch = await client.batches.retrieve(batch.id)

    assert listed == [NAME]
    assert text == whole.choices[0].text
    assert (batch.status, batch.request_counts.completed) == ("completed", 1)  # type: ignore[union-attr]


def test_judge_asks_it_and_grades_it(second: Stack, tmp_path: Path) -> None:
    """What it says is nonsense, which is what the grade finds, and nothing else."""
    details = tmp_path / "grade.json"
    done = run(
        *("lab", "grade", "--no_start_server", "--server_url", second.gateway),
        *("--status_url", second.status, "--count", "24", "--details_out", str(details)),
    )

    assert done.returncode == 1, done.stdout + done.stderr
    grade = json.loads(details.read_text(encoding="utf-8"))
    assert len(grade["answers"]) == 24
    assert grade["runs"][0]["answered"] > 12  # some it answers with nothing
    codes = {one["code"] for one in grade["findings"] if one["severity"] == "error"}
    assert codes <= {"unrelated_answers", "same_answer", "empty_answers"}
    assert grade["facts"]["engine"]["profile"] == "cpu"


def test_sweep_leaves_out_what_it_cannot_do(second: Stack, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    done = run(
        *("lab", "sweep", "--engine", second.engine, "--model", str(folder), "--count", "6"),
        *("--prompt-style", "chat", "qa", "raw", "--system-prompt", "none"),
        *("--max-tokens", "8", "--single-line", "no", "--out", str(out)),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    swept = {one["arm"]["style"]: one for one in json.loads(out.read_text())["swept"]}
    assert "chat template" in swept["chat"]["failure"]
    for style in ("qa", "raw"):
        assert (swept[style]["failure"], swept[style]["answered"]) == ("", 6)


def test_page_asks_it_and_runs_a_batch(second: Stack) -> None:
    """In a thread: the browser's driver would leave its event loop to the tests after this one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(visit, second.gateway).result()


def visit(url: str) -> None:
    with open_chromium() as browser:
        visitor = Visitor(browser)
        page = visitor.open(url)
        page.fill("#question", "What is CUDA?")
        page.click("#send")
        expect(page.locator(".turn > .answer")).not_to_be_empty()
        expect(page.locator("#context")).to_contain_text("no chat template")
        expect(page.locator("#engine .facts")).to_contain_text(NAME)
        expect(page.locator("#demo-note")).to_be_hidden()
        shoot(page, "second-model")
        page.click("#tab-batch")
        page.fill("#paste", "What is CUDA?\nWhat is a warp?")
        page.click("#run")
        expect(page.locator("#run-title")).to_have_text("2 questions answered")
        shoot(page, "second-model-batch", whole=True)
        visitor.leave()
