"""The eight checks of the course text's engine test, over HTTP."""

from __future__ import annotations

import statistics
import time
from typing import Any

from common import processes
from lab.records.record import run_quietly
from lab.selftest.checked_gateway import QUESTION, CheckedGateway, Observation, expect, read_object

_TEXTS = (
    QUESTION,
    "What is a CUDA warp, and why does divergence cost time?",
    "naïve café 😀 — ∑ 𝛼·x² «ok»\n\ttab",
)
_TOPICS = ("warp", "SM", "共享内存", "全局内存", "线程块", "网格", "寄存器", "合并访问")
_MIB = 2**20


def check_tokenisation(gateway: CheckedGateway) -> Observation:
    """The same text gives the same ids, other texts give others."""
    encoded = [_tokenize(gateway, text) for text in _TEXTS]
    expect(all(encoded), "a text gave no tokens")
    expect(_tokenize(gateway, _TEXTS[0]) == encoded[0], "the same text gave other tokens")
    expect(len({tuple(ids) for ids in encoded}) == len(encoded), "other texts gave the same tokens")
    longer = _tokenize(gateway, _TEXTS[0] * 8)
    expect(len(longer) > len(encoded[0]), "a longer text gave no more tokens")
    sizes = [len(ids) for ids in encoded]
    per_token = len(_TEXTS[0]) / sizes[0]
    shown = " + ".join(map(str, sizes))
    return Observation(f"{shown} tokens, {per_token:.1f} Chinese characters a token")


def check_model_loading(gateway: CheckedGateway) -> Observation:
    models = [card.id for card in gateway.sdk.models.list().data]
    expect(models, "GET /v1/models lists no model")
    names = ", ".join(models)
    status = gateway.read_launcher().status
    if not status:
        return Observation(
            f"{names}; load time unknown: no launcher answers at {gateway.status_url}"
        )
    engine = status.get("engine") or {}
    expect(engine.get("state") == "ready", f"the launcher says the engine is {engine.get('state')}")
    seconds = float(engine["start_seconds"])
    return Observation(f"{names}, loaded in {seconds:.1f} s", {"load_s": seconds})


def check_simple_inference(gateway: CheckedGateway) -> Observation:
    answer = gateway.chat()
    choice = answer.choices[0]
    text = choice.message.content or ""
    expect(text.strip(), "the answer is empty")
    expect(choice.finish_reason in ("stop", "length"), f"it ended with {choice.finish_reason}")
    expect(answer.usage, "the answer has no usage")
    tokens = answer.usage.completion_tokens if answer.usage else 0
    expect(1 <= tokens <= 64, f"{tokens} tokens were asked to be at most 64")
    return Observation(f"{tokens} tokens: {text[:24]}…")


def check_detokenisation(gateway: CheckedGateway) -> Observation:
    """There and back again gives the text."""
    for text in _TEXTS:
        ids = _tokenize(gateway, text)
        answer = gateway.http.post("/detokenize", json={"model": gateway.model, "tokens": ids})
        back = read_object(answer).get("prompt")
        expect(
            isinstance(back, str) and back.strip() == text.strip(),
            f"{text!r} came back as {back!r}",
        )
    return Observation(f"{len(_TEXTS)} texts came back unchanged")


def check_batch_inference(gateway: CheckedGateway) -> Observation:
    """A list in one call is answered by as many choices, each with what it gets alone."""
    prompts = [f"{topic} 是什么？" for topic in _TOPICS]
    fields: dict[str, Any] = {"model": gateway.model, "temperature": 0, "max_tokens": 24}
    batch = gateway.sdk.completions.create(prompt=prompts, **fields)
    texts = {choice.index: choice.text for choice in batch.choices}
    expect(sorted(texts) == [*range(len(prompts))], f"the choices have the indexes {sorted(texts)}")
    alone = [
        gateway.sdk.completions.create(prompt=prompt, **fields).choices[0].text
        for prompt in prompts
    ]
    same = sum(texts[place] == text for place, text in enumerate(alone))
    # In a batch the sums of floating-point numbers run in another order; half is generous.
    expect(same >= len(prompts) / 2, f"only {same} of {len(prompts)} answers are those given alone")
    expect(any(text.strip() for text in alone), "all answers are empty")
    return Observation(f"{len(prompts)} prompts, {same} answers as when asked alone")


def check_sampling(gateway: CheckedGateway) -> Observation:
    """Greedy repeats itself; heat makes answers differ; a seed makes heat repeatable."""
    greedy = {gateway.text() for _ in range(3)}
    expect(len(greedy) == 1, f"greedy gave {len(greedy)} different answers to one question")
    hot = {gateway.text(temperature=1.9, top_p=1.0, seed=seed) for seed in range(6)}
    expect(len(hot) > 1, "at temperature 1.9 six seeds gave one and the same answer")
    seeded = {gateway.text(temperature=1.0, seed=11) for _ in range(2)}
    expect(len(seeded) == 1, "at temperature 1 one seed gave two answers")
    narrow = {gateway.text(temperature=1.9, top_p=0.01, seed=seed) for seed in range(3)}
    expect(len(narrow) <= len(hot), "top_p 0.01 gave more answers than no limit")
    return Observation(f"greedy repeats, a seed repeats, {len(hot)} of 6 differ at temperature 1.9")


def check_streaming(gateway: CheckedGateway) -> Observation:
    """What is streamed is what is answered in one piece, and it comes in pieces."""
    whole = gateway.text()
    started = time.perf_counter()
    pieces, first_s, reason = [], 0.0, None
    stream = gateway.sdk.chat.completions.create(
        **gateway.build_chat(QUESTION), temperature=0, max_tokens=64, stream=True
    )
    for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content:
                first_s = first_s or time.perf_counter() - started
                pieces.append(choice.delta.content)
            reason = choice.finish_reason or reason
    total_s = time.perf_counter() - started
    expect(len(pieces) > 1, f"the stream came in {len(pieces)} piece")
    expect("".join(pieces) == whole, "the pieces are not the answer that is given in one piece")
    expect(reason in ("stop", "length"), f"the stream ended with {reason}")
    figures = {"first_token_s": first_s, "stream_s": total_s}
    text = f"{len(pieces)} pieces, the first after {first_s * 1e3:.0f} ms, the last after"
    return Observation(f"{text} {total_s * 1e3:.0f} ms", figures)


def check_performance(gateway: CheckedGateway) -> Observation:
    """Figures rather than a judgement: latency, throughput, memory."""
    latency_s = statistics.median(_time_call(gateway) for _ in range(5))
    prompts = [f"{number} {QUESTION}" for number in range(64)]
    started = time.perf_counter()
    batch = gateway.sdk.completions.create(
        model=gateway.model, prompt=prompts, temperature=0, max_tokens=64
    )
    elapsed_s = time.perf_counter() - started
    tokens = batch.usage.completion_tokens if batch.usage else 0
    expect(tokens > 0, "64 prompts gave no tokens")
    figures = {"latency_s": latency_s, "tokens_per_s": tokens / elapsed_s}
    text = (
        f"one token in {latency_s * 1e3:.1f} ms, {tokens / elapsed_s:,.0f} tokens/s for 64 prompts"
    )
    memory = _read_memory(gateway)
    figures |= memory
    if not memory:
        return Observation(f"{text}, memory unknown: the engine runs elsewhere", figures)
    shown = ", ".join(f"{name.split('_')[0]} {size:,.0f} MiB" for name, size in memory.items())
    return Observation(f"{text}, memory: {shown}", figures)


def _time_call(gateway: CheckedGateway) -> float:
    started = time.perf_counter()
    gateway.text(max_tokens=1)
    return time.perf_counter() - started


def _tokenize(gateway: CheckedGateway, text: str) -> list[int]:
    body = {"model": gateway.model, "prompt": text, "add_special_tokens": False}
    tokens = read_object(gateway.http.post("/tokenize", json=body)).get("tokens")
    expect(isinstance(tokens, list), "/tokenize answers without `tokens`")
    return list(tokens or [])


def _read_memory(gateway: CheckedGateway) -> dict[str, float]:
    """Of the engine's processes, where they can be looked at: main memory and the GPU's."""
    pid = gateway.read_launcher().pid("engine")
    members = processes.find_session(pid) if pid else []
    shared = sum(map(processes.read_shared_bytes, members)) / _MIB
    on_gpu = _read_gpu_memory([member.pid for member in members]) if members else 0.0
    figures = {"main_MiB": shared, "GPU_MiB": on_gpu}
    return {name: size for name, size in figures.items() if size}


def _read_gpu_memory(pids: list[int]) -> float:
    query = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    rows = [line.split(",") for line in run_quietly("nvidia-smi", *query).splitlines()]
    known = [(row[0].strip(), row[1].strip()) for row in rows if len(row) == 2]
    ours = set(map(str, pids))
    return sum(float(size) for pid, size in known if pid in ours and size.isdigit())


ENGINE_CHECKS = (
    ("tokenisation", check_tokenisation),
    ("model loading", check_model_loading),
    ("simple inference", check_simple_inference),
    ("detokenisation", check_detokenisation),
    ("batch inference", check_batch_inference),
    ("sampling strategies", check_sampling),
    ("streaming", check_streaming),
    ("performance metrics", check_performance),
)
