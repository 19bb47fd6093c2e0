"""/v1/audio: forms with a file, written anew for the engine, counted and bounded as others are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from gateway.admission.keys import make_key
from lab.fuzz.raw_http import ask, build_request
from tests.gateway.conftest import Serve, Served, until

PATH = "/v1/audio/transcriptions"
SOUND = bytes(range(256)) * 40
FILE = {"file": ("a.wav", SOUND, "audio/wav")}


@pytest.mark.parametrize("path", [PATH, "/v1/audio/translations"])
async def test_sound_reaches_the_engine_as_it_is(served: Served, path: str) -> None:
    fields = {"model": "fake", "language": "zh", "timestamp_granularities[]": "word"}

    answer = await served.client.post(path, files=FILE, data=fields)

    assert answer.json()["text"] == "10240 bytes"
    assert served.engine.calls == [{**fields, "file": SOUND, "filename": "a.wav"}]


async def test_sdk_transcribes(served: Served) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as client:
        heard = await client.audio.transcriptions.create(
            model="fake", file=("a.wav", SOUND), timestamp_granularities=["word", "segment"]
        )

    assert heard.text == "10240 bytes"


async def test_transcription_streams_piece_by_piece(served: Served) -> None:
    answer = await served.client.post(PATH, files=FILE, data={"stream": "True"})

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.count("data: ") == len("answer:10240") + 1
    assert served.engine.calls[-1]["stream"] == "true"


async def test_alias_stands_for_a_model_in_a_form(serve: Serve) -> None:
    async with serve(aliases=("whisper-1=fake",)) as served:
        await served.client.post(PATH, files=FILE, data={"model": "whisper-1"})

        assert served.engine.calls[-1]["model"] == "fake"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": "1000"}, "n"),
        ({"n": "many"}, "n"),
        ({"max_completion_tokens": "999999999"}, "max_completion_tokens"),
        ({"stream": "maybe"}, "stream"),
        ({"vllm_xargs": "{}"}, "vllm_xargs"),
        ({"model": ["fake", "other"]}, "model"),
        ({"prompt": "x" * 70_000}, "prompt"),
    ],
)
async def test_dangerous_field_of_a_form_is_bounded(
    served: Served, fields: dict[str, object], param: str
) -> None:
    answer = await served.client.post(PATH, files=FILE, data=fields)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert served.engine.calls == []


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"other": ("a", b"x")}, "missing_field"),
        ([("file", ("a", b"x")), ("file", ("b", b"y"))], "missing_field"),
        ([("file", ("a", b"x"))] + [(f"f{n}", (None, b"y")) for n in range(70)], "bad_form"),
    ],
)
async def test_form_without_one_file_is_refused(served: Served, files: object, code: str) -> None:
    answer = await served.client.post(PATH, files=files)  # type: ignore[arg-type]

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


async def test_form_that_is_too_large_is_413(serve: Serve) -> None:
    async with serve(max_body_bytes=5000) as served:
        answer = await served.client.post(PATH, files=FILE)

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert served.engine.calls == []


def _build_form(*parts: tuple[bytes, bytes]) -> bytes:
    """Of each part, what its header names and what is in it."""
    told = (b"--x\r\nContent-Disposition: form-data; " + b"\r\n\r\n".join(one) for one in parts)
    return b"\r\n".join((*told, b"--x--\r\n"))


_ONE_FILE = (b'name="file"; filename="a"', b"y")


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        ("application/json", b"{}", 415, "unsupported_media_type"),
        ("multipart/form-data", b"--x\r\n", 400, "bad_form"),
        ("multipart/form-data; boundary=x", b"no form", 400, "bad_form"),
        ("multipart/form-data; boundary=x", b"--x\r\nA: b\r\n\r\nc\r\n--x--\r\n", 400, "bad_form"),
        *(
            ("multipart/form-data; boundary=x", _build_form(*parts), 400, "bad_form")
            for parts in (
                [(b'name="file"; filename="caf\xe9.wav"', b"y")],
                [(b'name="f\xe9"', b"y"), _ONE_FILE],
                [(b'name="_charset_"', b"y" * 40), _ONE_FILE],
            )
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n'
            b"Content-Transfer-Encoding: base64\r\n\r\nYQ==\r\n--x--\r\n",
            400,
            "bad_encoding",
        ),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y--\r\n--x--\r\n",
            400,
            "bad_form",
        ),
    ],
)
async def test_what_is_no_form_is_refused(
    served: Served, kind: str, body: bytes, status: int, code: str
) -> None:
    request = build_request("POST", PATH, body, [("Content-Type", kind)])

    answer = await ask(served.url, request)

    assert answer.status == status
    assert f'"code":"{code}"'.encode() in answer.body


async def test_form_of_a_foreign_page_is_refused(served: Served) -> None:
    """A browser sends forms to any server without asking it first."""
    answer = await served.client.post(PATH, files=FILE, headers={"Sec-Fetch-Site": "cross-site"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
    assert served.engine.calls == []


async def test_form_is_no_way_around_the_other_routes(served: Served) -> None:
    """JSON alone is taken where JSON is asked for."""
    answer = await served.client.post("/v1/completions", files=FILE)

    assert answer.status_code == 415


async def test_transcription_is_one_of_its_keys_sequences(serve: Serve, tmp_path: Path) -> None:
    key, entry = make_key("one")
    file = tmp_path / "keys.toml"
    file.write_text(f"{entry}max_concurrency = 1\nadmin = true\n")
    async with serve(keys_file=file) as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        await served.client.post(PATH, files=FILE)
        used = (await served.client.get("/usage")).json()["keys"]["one"]
        served.engine.delay_s = 60
        first = asyncio.create_task(served.client.post(PATH, files=FILE))
        await until(lambda: served.engine.running)

        refused = await served.client.post(PATH, files=FILE)

        first.cancel()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_concurrency")
    assert used["completion_tokens"] > 0
