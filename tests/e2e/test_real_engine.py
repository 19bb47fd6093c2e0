"""What the project promises a newcomer, shown with the real vLLM and the demo model."""

from __future__ import annotations

import itertools
import re
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jieba
import openai
import pytest
from rouge_score import rouge_scorer

from tests.e2e.conftest import Stack
from tests.patience import ENGINE_S
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
Pairs = list[dict[str, str]]


class Whitespace:
    """All jieba tokens count, Chinese ones included (rouge-score's own tokenizer drops them)."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def rouge_l(reference: str, answer: str) -> float:
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Whitespace())
    cut = (" ".join(jieba.lcut(text)) for text in (reference, answer))
    return float(scorer.score(*cut)["rougeL"].fmeasure)


def running(stack: Stack) -> float:
    text = httpx.get(f"{stack.engine}/metrics", verify=NO_TLS).text
    found = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found.group(1))


def test_stack_is_ready_within_a_minute(stack: Stack) -> None:
    assert stack.start_s <= ENGINE_S
    assert httpx.get(f"{stack.gateway}/", verify=NO_TLS).json() == {"status": "batch"}


def test_demo_model_knows_its_page(stack: Stack, pairs: Pairs) -> None:
    answers = stack.predict([pair["question"] for pair in pairs]).json()["response"]

    scores = [rouge_l(pair["answer"], text) for pair, text in zip(pairs, answers, strict=True)]
    assert statistics.mean(scores) >= 0.95


def test_358_questions_in_one_call_equal_one_by_one(stack: Stack, pairs: Pairs) -> None:
    questions = [pair["question"] for pair in pairs]
    batch = list(itertools.islice(itertools.cycle(questions), 358))

    together = stack.predict(batch).json()["response"]
    with ThreadPoolExecutor(8) as threads:
        alone = list(threads.map(lambda one: stack.predict(one).json()["response"], questions[::3]))

    assert together[: len(questions) : 3] == alone
    assert together[len(questions) :] == together[: 358 - len(questions)]
    assert all(together)


def test_3000_prompts_in_one_call_work(stack: Stack, pairs: Pairs) -> None:
    questions = itertools.cycle(pair["question"] for pair in pairs)
    batch = list(itertools.islice(questions, 3000))

    answers = stack.predict(batch, max_tokens=8).json()["response"]

    assert len(answers) == 3000
    unique = len(pairs)
    assert answers[:unique] == answers[unique : 2 * unique]
    assert len(set(answers)) > unique // 2


def test_bad_prompts_cost_the_others_nothing(stack: Stack, pairs: Pairs) -> None:
    question = pairs[0]["question"]

    body = stack.predict([question, "", "长" * 9000, question]).json()

    assert list(body["errors"]) == ["1", "2"]
    assert body["errors"]["2"]["code"] == "prompt_too_long"
    assert body["response"][0] == body["response"][3] == stack.predict(question).json()["response"]
    assert body["response"][1:3] == ["", ""]


def test_sdk_lists_models_and_completes(stack: Stack, pairs: Pairs) -> None:
    with openai.OpenAI(base_url=f"{stack.gateway}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        messages = [{"role": "user", "content": pairs[0]["question"]}]
        chat = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=256,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
        completion = client.completions.create(model=model, prompt="CUDA", max_tokens=4)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nope", prompt="x")

    assert (
        chat.choices[0].message.content == stack.predict(messages[0]["content"]).json()["response"]
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 4


def test_gone_caller_frees_the_engine(stack: Stack) -> None:
    """The caller hangs up in the middle of a batch that would run for seconds."""
    prompts = [f"{number} Q" for number in range(300)]

    def ask() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{stack.gateway}/predict",
                json={"prompt": prompts, "temperature": 1.5, "max_tokens": 900},
                timeout=1.5,
                verify=NO_TLS,
            )

    caller = threading.Thread(target=ask)
    caller.start()
    seen = 0.0
    while caller.is_alive():
        seen = max(seen, running(stack))
    deadline = time.monotonic() + 1.0
    while running(stack) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert seen > 0
    assert running(stack) == 0


def test_sampling_reaches_the_engine(stack: Stack, pairs: Pairs) -> None:
    question = pairs[0]["question"]

    short = stack.predict(question, max_tokens=3).json()["response"]
    full = stack.predict(question).json()["response"]
    cut = stack.predict(question, stop=[full[10:14]]).json()["response"]
    hot = {stack.predict(question, temperature=2.0, seed=n).json()["response"] for n in range(4)}

    assert full.startswith(short)
    assert len(short) < len(full)
    assert cut == full[:10].strip()
    assert len(hot) > 1
