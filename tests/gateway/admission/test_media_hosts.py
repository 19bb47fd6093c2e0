"""Media that a call names by URL: what an engine may be told to fetch."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import Serve, Served

DATA = "data:image/png;base64,iVBORw0KGgo="
PUBLIC = "93.184.215.14"


async def ask(served: Served, part: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    name = "input" if path == "/v1/responses" else "messages"
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}]
    return await served.client.post(path, json={"model": "fake", name: messages})


def reached_engine(served: Served, answer: httpx.Response) -> bool:
    """The stand-in reads text alone; that it refuses the rest says that it was asked."""
    return bool(served.engine.headers) and "media_refused" not in answer.text


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8001/metrics",
        "HTTP://localhost/x",
        "http://LocalHost./x",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://017700000001/",
        "http://0/",
        "http://[::1]:8001/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1]/",
        "http://169.254.169.254/latest/meta-data",
        "https://10.0.0.7/",
        "http://172.16.0.1/",
        "http://192.168.0.1/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://name.invalid/",
        "file:///etc/passwd",
        "ftp://93.184.215.14/x",
        "//127.0.0.1/x",
        "/etc/passwd",
        " http://93.184.215.14/",
        "http:127.0.0.1",
        "http://93.184.215.14\\@127.0.0.1/",
        "http://user@127.0.0.1/",
        "http://[fe80::1%25lo]/",
        "http://①②⑦.⓪.⓪.①/",
        "httpx://93.184.215.14/",
    ],
)
async def test_media_that_only_the_engine_could_reach_are_refused(served: Served, url: str) -> None:
    answer = await ask(served, picture(url))
    error = answer.json()["error"]

    assert (answer.status_code, error["code"]) == (400, "media_refused")
    assert served.engine.calls == []


LOCAL = "http://127.0.0.1:8001/metrics"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/v1/chat/completions", {"type": "image_url", "image_url": LOCAL, "uuid": "x"}),
        ("/v1/chat/completions", {"image_url": LOCAL}),
        ("/v1/chat/completions", {"type": "audio_url", "audio_url": {"url": LOCAL}}),
        ("/v1/chat/completions", {"type": "video_url", "video_url": {"url": LOCAL}}),
        ("/v1/chat/completions", {"type": "tool_use", "uuid": "x", "video_url": LOCAL}),
        ("/tokenize", picture(LOCAL)),
        ("/v1/embeddings", picture(LOCAL)),
        ("/v1/responses", {"type": "input_image", "image_url": LOCAL}),
        ("/v1/messages", {"type": "image", "source": {"type": "url", "url": LOCAL}}),
        (
            "/v1/messages",
            {
                "type": "tool_result",
                "content": [{"type": "image", "source": {"type": "url", "url": LOCAL}}],
            },
        ),
    ],
)
async def test_media_are_found_wherever_an_engine_looks_for_them(
    served: Served, path: str, part: dict[str, Any]
) -> None:
    answer = await ask(served, part, path)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "media_refused")
    assert served.engine.calls == []


async def test_media_behind_escapes_are_found(served: Served) -> None:
    body = (
        rb'{"model": "fake", "messages": [{"role": "user", "content": [{"type": "image_\u0075rl", '
        rb'"image_\u0075\u0072l": {"\u0075rl": "http://127.0.0.1/"}}]}]}'
    )
    answer = await served.client.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )

    assert answer.json()["error"]["code"] == "media_refused"


@pytest.mark.parametrize("url", [DATA, "DATA:,x", f"https://{PUBLIC}/a.png?x=%20#y", ""])
async def test_media_inside_the_request_or_from_a_public_host_pass(
    served: Served, url: str
) -> None:
    assert reached_engine(served, await ask(served, picture(url)))


async def test_url_that_nobody_fetches_is_no_medium(served: Served) -> None:
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": f"what is at {LOCAL}?"},
        {"type": "tool_use", "name": "get", "input": {"image_url": LOCAL}},
        {"type": "output_text", "annotations": [{"type": "url_citation", "url": LOCAL}]},
    ]
    for part in parts:
        assert reached_engine(served, await ask(served, part))


async def test_listed_host_may_be_private(serve: Serve) -> None:
    async with serve(media_hosts=("127.0.0.1", "minio")) as served:
        for url in ("http://127.0.0.1:9000/a.png", "http://minio:9000/a.png"):
            assert reached_engine(served, await ask(served, picture(url)))
        for url in ("http://127.0.0.2/", "file:///etc/passwd"):
            assert not reached_engine(served, await ask(served, picture(url)))


async def test_name_that_leads_here_is_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stranger's DNS; a test has none."""

    def look_up(host: str, *_: object) -> list[Any]:
        found = {"public.example": [PUBLIC], "mixed.example": [PUBLIC, "10.0.0.1"]}
        rows = found.get(host, ["127.0.0.1"])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in rows]

    monkeypatch.setattr("gateway.admission.media_hosts.socket.getaddrinfo", look_up)
    for host, is_public in (("public", True), ("mixed", False), ("rebound", False)):
        answer = await ask(served, picture(f"http://{host}.example/"))
        assert reached_engine(served, answer) == is_public


async def test_media_of_many_hosts_are_too_many(served: Served) -> None:
    part = [picture(f"http://h{number}.example/") for number in range(40)]
    body = {"model": "fake", "messages": [{"role": "user", "content": part}]}
    answer = await served.client.post("/v1/chat/completions", json=body)

    assert "at most 16" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
@pytest.mark.parametrize("name", ["media_io_kwargs", "mm_processor_kwargs"])
async def test_callers_do_not_say_what_is_made_of_media(serve: Serve, name: str, path: str) -> None:
    field = "input" if path == "/v1/responses" else "messages"
    body = {"model": "fake", "prompt": "a", field: [{"role": "user", "content": "a"}]}
    async with serve() as served, serve(media_options=True) as open_one:
        for value in ({"video": {"num_frames": 10**6}}, {"max_pixels": 2**40}, [1], "x"):
            refused = await served.client.post(path, json=body | {name: value})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (400, "media_refused")
            assert error["param"] == name
            open_one.engine.headers.clear()
            passed = await open_one.client.post(path, json=body | {name: value})
            assert reached_engine(open_one, passed)
        served.engine.headers.clear()
        nothing: tuple[dict[str, int] | None, ...] = (None, {})
        for none in nothing:
            passed = await served.client.post(path, json=body | {name: none})
            assert reached_engine(served, passed)
