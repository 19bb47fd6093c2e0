"""Engines by Kubernetes: a service's endpoints as its API tells them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.discovery import kubernetes
from tests.gateway.conftest import Serve, until
from tests.gateway.discovery.conftest import list_ready, run_pods
from tests.kubernetes_api import TOKEN, KubernetesApi, run_kubernetes_api

A, B, C = "127.0.0.11", "127.0.0.12", "127.0.0.13"


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "namespace").write_text("models")
    return tmp_path


@pytest.fixture(autouse=True)
def _ask_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "_LONGEST_PAUSE_S", 0.05)


def _settings(url: str, account: Path, entry: str = "kubernetes+http://vllm") -> dict[str, Any]:
    basic = {"engines": (entry,), "kubernetes_api": url, "kubernetes_account": account}
    return basic | {"wait_ready": False}


async def test_endpoints_join_and_leave_as_the_api_tells(serve: Serve, account: Path) -> None:
    api = KubernetesApi()
    async with run_pods(A, B, C) as pods, run_kubernetes_api(api) as url:
        api.put("vllm-1", pods.port, [B, A])
        async with serve(**_settings(url, account)) as served:
            await until(lambda: list_ready(served) == pods.list_urls(A, B))

            api.put("vllm-2", pods.port, [C])
            await until(lambda: list_ready(served) == pods.list_urls(A, B, C))

            third = pods.engines[C]
            third.slots = asyncio.Semaphore(0)
            asked = [asyncio.create_task(served.chat(f"q{i}")) for i in range(6)]
            await until(lambda: third.running > 0)
            api.put("vllm-2", pods.port, [], ending=[C])
            await until(lambda: list_ready(served) == pods.list_urls(A, B))
            for _ in range(third.running):
                third.slots.release()
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 6

            api.drop("vllm-2")
            api.put("vllm-1", pods.port, [A])
            await until(lambda: list_ready(served) == pods.list_urls(A))
    assert api.lists == 1


async def test_watch_that_ends_is_taken_up_where_it_was(serve: Serve, account: Path) -> None:
    api = KubernetesApi()
    entry = "kubernetes+http://vllm.models"
    async with run_pods(A, B) as pods, run_kubernetes_api(api) as url:
        api.put("vllm-1", 1, [A])
        async with serve(**_settings(url, account, f"{entry}:{pods.port}")) as served:
            await until(lambda: list_ready(served) == pods.list_urls(A))
            api.end_watches()
            await until(lambda: api.watches > 1)
            api.put("vllm-1", 1, [A, B])
            await until(lambda: list_ready(served) == pods.list_urls(A, B))
            assert api.lists == 1

            api.end_watches(forget=True)
            await until(lambda: api.lists > 1)
            assert list_ready(served) == pods.list_urls(A, B)


async def test_refusal_keeps_the_last_good_answer(serve: Serve, account: Path) -> None:
    api = KubernetesApi()
    async with run_pods(A, B) as pods, run_kubernetes_api(api) as url:
        api.put("vllm-1", pods.port, [A])
        async with serve(**_settings(url, account)) as served:
            await until(lambda: list_ready(served) == pods.list_urls(A))
            api.is_open = False
            api.put("vllm-1", pods.port, [A, B])  # the watch that runs still tells of it
            await until(lambda: list_ready(served) == pods.list_urls(A, B))
            api.end_watches()
            await until(lambda: api.refused > 2)
            assert list_ready(served) == pods.list_urls(A, B)

            api.put("vllm-1", pods.port, [B])
            api.is_open = True
            await until(lambda: list_ready(served) == pods.list_urls(B))


async def test_token_is_read_anew_when_it_has_been_replaced(serve: Serve, account: Path) -> None:
    api = KubernetesApi()
    (account / "token").write_text("old")
    async with run_pods(A) as pods, run_kubernetes_api(api) as url:
        api.put("vllm-1", pods.port, [A])
        async with serve(**_settings(url, account)) as served:
            assert list_ready(served) == []
            (account / "token").write_text(TOKEN)
            await until(lambda: list_ready(served) == pods.list_urls(A))
