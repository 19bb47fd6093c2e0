"""An engine for vectors behind the gateway: it becomes ready, and each of its routes is answered as
the engine itself answers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Stack, start_stack
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

TEXTS = ["CUDA", "warp"]
CALLS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": TEXTS, "n": 5000, "dimensions": None},
    "/v2/embed": {"texts": TEXTS, "embedding_types": ["float"]},
    "/pooling": {"input": TEXTS},
    "/score": {"text_1": "CUDA", "text_2": TEXTS},
    "/v1/score": {"queries": TEXTS, "documents": TEXTS},
    "/rerank": {"query": "CUDA", "documents": TEXTS},
    "/v1/rerank": {"query": "CUDA", "documents": TEXTS, "top_n": 1},
    "/v2/rerank": {"query": "CUDA", "documents": TEXTS},
    "/tokenize": {"prompt": "CUDA"},
}
_VOLATILE = frozenset(("id", "created"))


@pytest.fixture(scope="module")
def pooling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("pooling")
    with start_stack(folder, "--set", "runner=pooling", GATEWAY_WARMUP_PROMPTS="4") as running:
        yield running


@pytest.mark.parametrize("path", CALLS)
def test_pooling_route_is_answered_as_the_engine_does(pooling: Stack, path: str) -> None:
    body = {"model": "demo", **CALLS[path]}

    direct = httpx.post(f"{pooling.engine}{path}", json=body, timeout=60, verify=NO_TLS)
    through = httpx.post(f"{pooling.gateway}{path}", json=body, timeout=60, verify=NO_TLS)

    assert (through.status_code, direct.status_code) == (200, 200), direct.text
    assert _read(through) == _read(direct)


@pytest.mark.parametrize("path", ["/classify", "/v1/chat/completions", "/v1/completions"])
def test_route_that_such_an_engine_lacks_is_no_failure(pooling: Stack, path: str) -> None:
    body = {"model": "demo", "input": "a", "prompt": "a", "messages": []}

    answer = httpx.post(f"{pooling.gateway}{path}", json=body, timeout=60, verify=NO_TLS)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_served")
    assert httpx.get(f"{pooling.gateway}/readyz", verify=NO_TLS).status_code == 200


def test_sdk_embeds(pooling: Stack) -> None:
    with openai.OpenAI(base_url=f"{pooling.gateway}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="demo", input=TEXTS)

    assert [len(one.embedding) for one in answer.data] == [256, 256]
    assert answer.usage.prompt_tokens > 0


def test_warmup_was_at_the_route_that_the_engine_has(pooling: Stack) -> None:
    log = pooling.log.read_text(encoding="utf-8")

    assert "engine_makes_no_text" in log
    assert "pools_at=/v1/embeddings" in log or '"pools_at": "/v1/embeddings"' in log


def _read(answer: httpx.Response) -> dict[str, Any]:
    return {name: value for name, value in answer.json().items() if name not in _VOLATILE}
