"""/v1/files as OpenAI's SDK uses it, and what is refused of a file before it is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from gateway.admission.keys import make_key
from gateway.batches.access import BATCHES
from gateway.batches.uploads import Room, Upload
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import CHAT, Batches, ask, dump, open_batches, until
from tests.gateway.conftest import serve_gateway
from tests.gateway.process import serve_process
from tests.plain_http import NO_TLS


async def test_file_is_uploaded_read_back_and_deleted(storage: dict[str, Any]) -> None:
    data = dump([ask(number) for number in range(3)])
    async with serve_gateway(**storage) as served, open_batches(served) as batches:
        files = batches.sdk.files
        made = await files.create(file=("in.jsonl", data), purpose="batch")
        found = await files.retrieve(made.id)
        content = (await files.content(made.id)).content
        deleted = await files.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await files.retrieve(made.id)

    assert (made.filename, made.bytes, made.purpose) == ("in.jsonl", len(data), "batch")
    assert found == made
    assert content == data
    assert deleted.deleted
    assert list((storage["batch_folder"] / "files").iterdir()) == []


async def test_files_are_listed_by_pages_in_either_order(batches: Batches) -> None:
    ids = [await batches.upload([ask(number)]) for number in range(5)]

    newest = [file.id async for file in batches.sdk.files.list(limit=2)]
    oldest = [file.id async for file in batches.sdk.files.list(limit=2, order="asc")]
    first = await batches.sdk.files.list(limit=2)

    assert newest == ids[::-1]
    assert oldest == ids
    assert first.has_more


async def test_file_without_line_break_at_its_end_and_with_blank_lines_is_whole(
    batches: Batches,
) -> None:
    data = b"\n" + dump([ask(0)]) + b"\r\n" + dump([ask(1)]).rstrip()

    batch = await batches.sdk.batches.create(
        input_file_id=await batches.upload(data), endpoint=CHAT, completion_window="24h"
    )

    assert batch.request_counts is not None
    assert batch.request_counts.total == 2


def change(**fields: Any) -> bytes:
    return dump([ask(0), ask(1) | fields])


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", "empty_file", "no lines"),
        (b"\n \n", "empty_file", "no lines"),
        (dump([ask(0)]) + b"{broken\n", "invalid_json", "line 2"),
        (dump([ask(0)]) + b"[1]\n", "invalid_type", "line 2"),
        (dump([ask(0), ask(0)]), "duplicate_custom_id", "line 2"),
        (change(custom_id=""), "invalid_value", "line 2: custom_id"),
        (change(custom_id="a\0"), "invalid_value", "line 2: custom_id"),
        (dump([ask(0), ask(1, model="\0")]), "invalid_value", "line 2: body.model"),
        (change(custom_id=7), "invalid_type", "line 2: custom_id"),
        (change(method="GET"), "invalid_value", "line 2: method"),
        (change(url="/v1/models"), "invalid_value", "line 2: url"),
        (change(url="/v1/embeddings"), "mismatched_url", "line 2"),
        (change(body="text"), "invalid_type", "line 2: body"),
        (dump([ask(0), ask(1, stream=True)]), "invalid_value", "line 2: body.stream"),
        (dump([ask(0)]) + b'{"custom_id": "b", "method": "POST"}\n', "missing_field", "line 2"),
        (dump([ask(number) for number in range(6)]), "too_many_lines", "line 6"),
    ],
)
async def test_file_with_a_mistake_is_refused_with_its_line(
    tmp_path: Path, data: bytes, code: str, says: str
) -> None:
    folder = tmp_path / "batches"
    async with (
        serve_gateway(batch_folder=folder, batch_max_lines=5) as served,
        open_batches(served) as batches,
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await batches.upload(data)

    assert refused.value.code == code
    assert says in refused.value.message
    assert list((folder / "files").iterdir()) == []


async def test_file_and_line_that_are_too_large_are_refused(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"batch_max_file_bytes": 400_000, "max_body_bytes": 300_000}
    async with (
        serve_gateway(batch_folder=tmp_path / "batches", **limits) as served,
        open_batches(served) as batches,
    ):
        with pytest.raises(openai.APIStatusError) as too_long:
            await batches.upload([ask(0), ask(1, "x" * 310_000)])
        with pytest.raises(openai.APIStatusError) as too_large:
            await batches.upload([ask(number, "x" * 100_000) for number in range(5)])
        large = await batches.upload([ask(0, "x" * 290_000)])

    assert too_long.value.status_code == too_large.value.status_code == 413
    assert "line 2 is longer than 300000 bytes" in too_long.value.message
    assert "the file is larger" in too_large.value.message
    assert large


async def test_upload_of_no_form_or_another_purpose_is_refused(batches: Batches) -> None:
    client = batches.served.client
    form = {"file": ("in.jsonl", dump([ask(0)]))}

    as_json = await client.post("/v1/files", json={"purpose": "batch"})
    without = await client.post("/v1/files", files=form)
    tuning = await client.post("/v1/files", files=form, data={"purpose": "fine-tune"})
    empty = await client.post("/v1/files", files={"purpose": (None, "batch")})
    broken = await client.post(
        "/v1/files", content=b"junk", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )

    answers = (as_json, without, tuning, empty, broken)
    assert [answer.status_code for answer in answers] == [415, 400, 400, 400, 400]
    assert without.json()["error"]["param"] == tuning.json()["error"]["param"] == "purpose"


async def test_files_and_batches_that_are_off_say_which_setting_turns_them_on() -> None:
    async with serve_gateway() as served:
        answers = [
            await served.client.get("/v1/files"),
            await served.client.post("/v1/files", files={"file": b""}),
            await served.client.get("/v1/batches/batch_1"),
            await served.client.post("/v1/batches", json={}),
        ]

    for answer in answers:
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "batches_off"
        assert "GATEWAY_BATCH_FOLDER" in answer.json()["error"]["message"]


async def test_ids_that_no_database_takes_are_of_nothing(storage: dict[str, Any]) -> None:
    async with serve_gateway(**storage) as served:
        answers = [
            await served.client.get(path)
            for path in ("/v1/files/%00", "/v1/batches/a%00b", "/v1/files/%ED%A0%80/content")
        ]
        paging = [
            await served.client.get("/v1/files?" + query)
            for query in ("after=%00", "after=file-1", "limit=0", "limit=x", "order=up")
        ]

    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert [answer.status_code for answer in paging] == [400] * 5


async def test_key_sees_only_its_own_files_and_batches(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    (alice, entry), (bob, other) = make_key("alice"), make_key("bob")
    keys.write_text(entry + other)
    async with (
        serve_gateway(batch_folder=tmp_path / "batches", keys_file=keys) as served,
        open_batches(served, alice) as hers,
        open_batches(served, bob) as theirs,
    ):
        batch_id = await hers.create([ask(0)])
        ended = await hers.wait(batch_id)
        for file_id in (ended.input_file_id, ended.output_file_id):
            for call in (theirs.sdk.files.retrieve, theirs.sdk.files.content):
                with pytest.raises(openai.NotFoundError):
                    await call(file_id)
            with pytest.raises(openai.NotFoundError):
                await theirs.sdk.files.delete(file_id)
        for call in (theirs.sdk.batches.retrieve, theirs.sdk.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await call(batch_id)
        with pytest.raises(openai.NotFoundError):
            await theirs.sdk.batches.create(
                input_file_id=ended.input_file_id, endpoint=CHAT, completion_window="24h"
            )
        seen = [file async for file in theirs.sdk.files.list()]
        seen += [batch async for batch in theirs.sdk.batches.list()]
        own = [file.id async for file in hers.sdk.files.list()]

    assert seen == []
    assert len(own) == 2


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches", "/v1/files/file-1/content"])
async def test_page_under_a_rebound_name_reads_no_files(tmp_path: Path, path: str) -> None:
    """Also where programs may use any name: a plain GET of a page looks like theirs."""
    async with serve_gateway(batch_folder=tmp_path / "batches", allow_anonymous=True) as served:
        rebound = await served.client.get(path, headers={"Host": "evil.example"})
        link = await served.client.get(
            path, headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        )
        elsewhere = await served.client.get("/v1/models", headers={"Host": "gpu.example.com"})

    assert rebound.status_code == link.status_code == 403
    assert rebound.json()["error"]["code"] == "host_not_allowed"
    assert link.json()["error"]["code"] == "cross_site"
    assert elsewhere.status_code == 200


async def test_form_with_fields_without_end_is_refused(batches: Batches) -> None:
    read = 0

    async def send() -> AsyncIterator[bytes]:
        nonlocal read
        for number in range(1000):
            read = number
            head = f'--b\r\nContent-Disposition: form-data; name="field-{number}"\r\n\r\n'
            yield head.encode() + b"x" * 4000 + b"\r\n"
        yield b"--b--\r\n"

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = await batches.served.client.post("/v1/files", content=send(), headers=kind)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_form")
    assert answer.json()["error"]["message"] == "the form has more than 16 fields"


@pytest.mark.parametrize("head", [b"A\0: b", b"no colon", b"Content-Disposition:\0 form-data"])
async def test_form_whose_part_has_an_unreadable_head_is_refused(
    batches: Batches, head: bytes
) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"\r\n%s\r\n\r\nx\r\n--b--\r\n' % head
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = await batches.served.client.post("/v1/files", content=form, headers=kind)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_form")
    assert (await batches.sdk.files.list()).data == []


async def test_files_that_come_in_at_once_share_what_room_their_key_has(tmp_path: Path) -> None:
    may_end = asyncio.Event()
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    line = orjson.dumps(ask(0, "x" * 300_000)) + b"\n"

    async def send() -> AsyncIterator[bytes]:
        yield head + line
        await may_end.wait()
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'

    folder = tmp_path / "batches"
    async with (
        serve_gateway(batch_folder=folder, batch_max_stored_bytes=400_000) as served,
        open_batches(served) as batches,
    ):
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        sending = asyncio.create_task(served.client.post("/v1/files", content=send(), headers=kind))
        service = served.app[BATCHES]
        await until(lambda: any(one.incoming > 110_000 for one in service._rooms.values()))
        with pytest.raises(openai.PermissionDeniedError) as beside:
            await batches.upload(line)
        may_end.set()
        first = await sending
        await batches.sdk.files.delete(first.json()["id"])
        later = await batches.upload(line)

    assert beside.value.code == "batch_storage"
    assert first.status_code == 200
    assert later


async def test_file_of_line_breaks_keeps_nobody_waiting() -> None:
    class Nowhere:
        held_bytes = 0

        async def write(self, data: bytes) -> None: ...

    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    options = {"max_lines": 10, "max_line_bytes": 100, "most_items": 10}
    upload = Upload(Nowhere(), Room(bound=2**30), max_bytes=2**30, **options)
    counting = asyncio.create_task(count())
    await upload.add(b"\n" * 2**17)
    counting.cancel()

    assert turns > 1000


async def test_files_stay_with_their_key_of_the_environment_whatever_its_place(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "batches"
    async with (
        serve_gateway(batch_folder=folder, api_keys=("of-alice", "of-bob")) as served,
        open_batches(served, "of-alice") as alice,
        open_batches(served, "of-bob") as bob,
    ):
        await alice.upload([ask(0)])
        own = await bob.upload([ask(1)])
    async with (
        serve_gateway(batch_folder=folder, api_keys=("of-bob",)) as served,
        open_batches(served, "of-bob") as bob,
    ):
        seen = [file.id async for file in bob.sdk.files.list()]

    assert seen == [own]


async def test_upload_from_a_foreign_page_is_refused(batches: Batches) -> None:
    answer = await batches.served.client.post(
        "/v1/files",
        files={"file": dump([ask(0)])},
        data={"purpose": "batch"},
        headers={"Origin": "http://evil.example"},
    )

    assert answer.status_code == 403


async def test_key_has_its_own_limits_of_lines_bytes_and_batches(tmp_path: Path) -> None:
    key, entry = make_key("alice")
    keys = tmp_path / "keys.toml"
    own = "batch_max_lines = 3\nbatch_max_jobs = 1\nbatch_retention_days = 2\n"
    keys.write_text(f"{entry}{own}batch_max_stored_bytes = 2000\nmodels = ['fake', 'other']\n")
    async with (
        serve_gateway(batch_folder=tmp_path / "batches", keys_file=keys) as served,
        open_batches(served, key) as batches,
    ):
        with pytest.raises(openai.BadRequestError, match="3 requests"):
            await batches.upload([ask(number) for number in range(4)])
        with pytest.raises(openai.APIStatusError, match="larger than"):
            await batches.upload([ask(0, "x" * 2000)])
        made = await batches.sdk.files.create(file=dump([ask(0)]), purpose="batch")
        foreign = await batches.upload([ask(1, model="secret")])
        with pytest.raises(openai.PermissionDeniedError) as model:
            await batches.sdk.batches.create(
                input_file_id=foreign, endpoint=CHAT, completion_window="24h"
            )
        served.engine.delay_s = 60
        first = await batches.create([ask(2)])
        with pytest.raises(openai.RateLimitError) as further:
            await batches.create([ask(3)])
        await batches.sdk.batches.cancel(first)
        await batches.wait(first)

    assert made.expires_at == made.created_at + 2 * 86_400
    assert model.value.code == "model_not_allowed"
    assert further.value.code == "batch_jobs"


async def test_file_expires_when_its_caller_says(batches: Batches) -> None:
    made = await batches.sdk.files.create(
        file=("in.jsonl", dump([ask(0)])),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )

    assert made.expires_at == made.created_at + 3600


@pytest.mark.programs
async def test_disk_that_is_full_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """By the kernel's limit on the size of a file, which a process may set for itself."""
    folder = tmp_path / "batches"
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(
            tmp_path,
            engine_url,
            *("--batch-folder", str(folder)),
            wrapper=["sh", "-c", 'ulimit -f 4096; exec "$@"', "sh"],
        ) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30, verify=NO_TLS) as client,
    ):
        lines = dump([ask(number, "x" * 50_000) for number in range(100)])
        form = {"file": ("in.jsonl", lines)}
        answer = await client.post("/v1/files", files=form, data={"purpose": "batch"})
        listed = await client.get("/v1/files")

    assert answer.status_code == 507
    assert answer.json()["error"]["code"] == "storage_full"
    assert listed.json()["data"] == []
    assert list((folder / "files").iterdir()) == []


@pytest.mark.slow
async def test_large_upload_takes_little_memory(tmp_path: Path) -> None:
    """For 1 GB it was 23 MB, which took 48 s beside other work."""
    answer, grown = await upload_large(tmp_path, 128 * 2**20)

    assert answer.status_code == 200, answer.text
    assert answer.json()["bytes"] >= 128 * 2**20
    assert grown < 64 * 2**20


async def upload_large(folder: Path, size: int) -> tuple[httpx.Response, int]:
    """The answer, and by how much the gateway has grown for it at the most."""
    line = orjson.dumps(ask(0, "x" * 25_000))
    boundary = "b" * 40
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{{}}"{{}}\r\n\r\n'

    async def send() -> AsyncIterator[bytes]:
        yield (head.format("purpose", "") + "batch\r\n").encode()
        yield head.format("file", '; filename="in.jsonl"').encode()
        for number in range(size // len(line) + 1):
            yield line.replace(b"line-0", f"line-{number}".encode()) + b"\n"
        yield f"\r\n--{boundary}--\r\n".encode()

    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(folder, engine_url, "--batch-folder", str(folder / "batches")) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=300, verify=NO_TLS) as client,
    ):
        await client.get("/v1/files")  # the database is open
        before = _read_peak(gateway.process.pid)
        kind = f"multipart/form-data; boundary={boundary}"
        answer = await client.post("/v1/files", content=send(), headers={"Content-Type": kind})
        return answer, _read_peak(gateway.process.pid) - before


def _read_peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def test_what_is_in_a_forms_heads_is_in_no_log(tmp_path: Path) -> None:
    """aiohttp quotes those that it cannot read."""
    head = b'form-data; name="file"secret; filename="secret'
    form = b"--b\r\nContent-Disposition: %s\r\n\r\nx\r\n--b--\r\n" % head
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    folder = str(tmp_path / "batches")
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(tmp_path, engine_url, "--batch-folder", folder) as gateway,
        httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS) as client,
    ):
        for path in ("/v1/files", "/v1/audio/transcriptions"):
            answer = await client.post(path, content=form, headers=kind)
            assert answer.status_code == 400, answer.text
    log = gateway.read_log()

    assert "secret" not in log
    assert all(line.startswith("{") for line in log.splitlines())
