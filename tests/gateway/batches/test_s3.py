"""Bytes of files in a bucket, of a real storage that speaks S3: kept, read, thrown away, and what
is told when it is away, refuses, or has lost something.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import obstore
import openai
import orjson
import pytest
from obstore.exceptions import GenericError
from obstore.store import S3Store
from pydantic import ValidationError
from sqlalchemy import create_engine, text

from gateway.app import build_app
from gateway.batches import coordinator
from gateway.batches.s3_blobs import S3Blobs
from gateway.config import SettingsError
from gateway.errors import GatewayError, NotFound, StorageFull, StorageUnavailable
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import (
    Postgres,
    ask,
    dump,
    open_batches,
    open_sdk,
    until,
)
from tests.gateway.batches.test_clock import count_sweeps
from tests.gateway.batches.test_jobs import check_counts, read_answers
from tests.gateway.batches.test_takeover import check_answers, kill_after, start, wait_completed
from tests.gateway.conftest import make_settings, serve_gateway
from tests.gateway.process import GatewayProcess, serve_process
from tests.plain_http import NO_TLS
from tests.s3_server import SECRET, S3Server, s3

__all__ = ["s3"]  # the fixture is found here

# A storage of its own, and the same for every Python.
pytestmark = pytest.mark.slow
MIB = 2**20


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.make_bucket()


@pytest.fixture
def kept(s3: S3Server, bucket: str, tmp_path: Path) -> dict[str, Any]:
    """Settings of a gateway: the bytes in the bucket, the rest in SQLite."""
    return {"batch_folder": tmp_path / "batches", **s3.describe(bucket)}


def list_bucket(s3: S3Server, bucket: str) -> list[str]:
    return [name.removeprefix("files/") for name in s3.list_names(bucket)]


async def test_file_and_batch_lie_in_the_bucket_and_go_from_it(
    s3: S3Server, bucket: str, kept: dict[str, Any], tmp_path: Path
) -> None:
    data = dump([ask(number) for number in range(60)])
    async with serve_gateway(**kept) as served, open_batches(served) as batches:
        file_id = await batches.upload(data)
        content = (await batches.sdk.files.content(file_id)).content
        batch = await batches.wait(await batches.create([ask(n) for n in range(60)]))
        good = await batches.read(batch.output_file_id)
        there = list_bucket(s3, bucket)
        for file in (file_id, batch.input_file_id, batch.output_file_id):
            await batches.sdk.files.delete(file)

    assert content == data
    assert read_answers(good) == {f"line-{n}": f"answer:question {n}" for n in range(60)}
    check_counts(batch, good, [])
    assert len(there) == 3
    assert list_bucket(s3, bucket) == []
    assert not (tmp_path / "batches" / "files").exists()


async def test_refused_and_broken_upload_leaves_nothing_in_the_bucket(
    s3: S3Server, bucket: str, kept: dict[str, Any]
) -> None:
    """Parts of it were there already."""
    lines = [ask(number, "x" * MIB) for number in range(12)]

    async def send(data: bytes) -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + data
        await asyncio.Event().wait()

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    async with serve_gateway(**kept) as served, open_batches(served) as batches:
        with pytest.raises(openai.BadRequestError) as refused:
            await batches.upload(dump(lines) + b"{broken\n")
        left = list_bucket(s3, bucket), s3.count_unfinished(bucket)
        sending = asyncio.create_task(
            served.client.post("/v1/files", content=send(dump(lines)), headers=kind)
        )
        await until(lambda: s3.count_unfinished(bucket))
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await until(lambda: not s3.count_unfinished(bucket))

    assert "line 13" in refused.value.message
    assert left == ([], 0)
    assert list_bucket(s3, bucket) == []


async def test_large_file_takes_little_memory(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """200 MB in, and out again to a reader who takes their time."""
    line = orjson.dumps(ask(0, "x" * MIB))
    size = 200

    async def send() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for number in range(size):
            yield line.replace(b"line-0", b"line-%d" % number) + b"\n"
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(tmp_path, engine_url, *list_flags(s3, bucket, tmp_path)) as gateway,
        httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS, timeout=300) as client,
    ):
        await client.post("/v1/files", files={"file": dump([ask(0)])}, data={"purpose": "batch"})
        before = gateway.rss_bytes()
        most = asyncio.create_task(find_most(gateway))
        made = await client.post("/v1/files", content=send(), headers=kind)
        read = 0
        async with client.stream("GET", f"/v1/files/{made.json()['id']}/content") as answer:
            async for piece in answer.aiter_bytes():
                read += len(piece)
        most.cancel()
        [grown] = await asyncio.gather(most, return_exceptions=True)

    assert made.status_code == 200
    assert read == made.json()["bytes"] > size * MIB
    assert isinstance(grown, Grown)
    assert grown.most - before < 100 * MIB


class Grown(Exception):
    """The most that it had."""

    def __init__(self, most: int) -> None:
        super().__init__(str(most))
        self.most = most


async def find_most(gateway: GatewayProcess) -> None:
    most = 0
    try:
        while True:
            most = max(most, gateway.rss_bytes())
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        raise Grown(most) from None


def list_flags(s3: S3Server, bucket: str, folder: Path, **more: Any) -> list[str]:
    settings = {"batch_folder": folder, **s3.describe(bucket), **more}
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


async def test_batch_outlives_a_kill_and_another_replica_ends_it(
    s3: S3Server, bucket: str, tmp_path: Path, postgres: Postgres
) -> None:
    """Neither has a folder."""
    lines, engine = 400, Behaviour(delay_s=0.05)
    flags = list_flags(s3, bucket, tmp_path, batch_database=postgres.make_database())[1:]
    flags.append("--batch-lease-s=2")
    for name in "ab":
        (tmp_path / name).mkdir()
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path / "b", engine_url, *flags) as other,
        open_sdk(other.url) as sdk,
    ):
        async with (
            serve_process(tmp_path / "a", engine_url, *flags) as first,
            open_sdk(first.url) as own,
        ):
            batch_ids = [await start(own, lines), await start(sdk, lines)]
            await kill_after(100, engine, first)
        for batch_id in batch_ids:
            await check_answers(sdk, await wait_completed(sdk, batch_id), lines)

    assert len(list_bucket(s3, bucket)) == 4
    assert lines * 2 <= len(engine.calls) < lines * 2 * 1.5


async def test_gateway_killed_in_an_upload_leaves_parts_alone(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    """They are no file, and count for nobody; the bucket's own rule throws them away."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

    async def send() -> AsyncIterator[bytes]:
        yield head + dump([ask(number, "x" * MIB) for number in range(12)])
        await asyncio.Event().wait()

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    flags = list_flags(s3, bucket, tmp_path)
    async with serve_app(build_fake_engine(Behaviour())) as engine_url:
        async with (
            serve_process(tmp_path, engine_url, *flags) as gateway,
            httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS, timeout=60) as client,
        ):
            sending = asyncio.create_task(client.post("/v1/files", content=send(), headers=kind))
            await until(lambda: s3.count_unfinished(bucket))
            gateway.process.kill()
            await gateway.process.wait()
            sending.cancel()  # once all is sent that there is, nothing else ends it
            await asyncio.gather(sending, return_exceptions=True)
        async with (
            serve_process(tmp_path, engine_url, *flags) as gateway,
            open_sdk(gateway.url) as sdk,
        ):
            listed = [file.id async for file in sdk.files.list()]
            again = await sdk.files.create(file=dump([ask(0)]), purpose="batch")

    assert listed == []
    assert list_bucket(s3, bucket) == [again.id]


async def test_storage_that_is_away_is_told_and_waited_for(s3: S3Server, tmp_path: Path) -> None:
    """Uploads are refused, all else is served, a batch goes on where it was."""
    bucket = s3.make_bucket()
    kept = {"batch_folder": tmp_path / "batches", **s3.describe(bucket)}
    engine = Behaviour(delay_s=0.05)
    async with serve_gateway(engine, **kept) as served, open_batches(served) as batches:
        batch_id = await batches.create([ask(n) for n in range(300)])
        await until(lambda: len(engine.calls) > 30)
        s3.stop()
        try:
            with pytest.raises(openai.InternalServerError) as away:
                await batches.upload([ask(0)])
            chat = await served.chat("hello")
            await until(lambda: _count_failures(served.client))
            still = await batches.sdk.batches.retrieve(batch_id)
        finally:
            await asyncio.to_thread(s3.start)
        batch = await batches.wait(batch_id)
        good = await batches.read(batch.output_file_id)

    assert (away.value.status_code, away.value.code) == (503, "storage_unavailable")
    assert "the storage of files and batches does not answer" in away.value.message
    assert chat.status_code == 200
    assert still.status == "in_progress"
    assert read_answers(good) == {f"line-{n}": f"answer:question {n}" for n in range(300)}
    check_counts(batch, good, [])


async def _count_failures(client: httpx.AsyncClient, least: int = 1) -> bool:
    return await _read_figure(client, "gateway_batch_storage_failures_total") >= least


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_bucket": "s3://nobody-made-it/files"}, "its bucket is not there"),
        ({"batch_s3_key": "gateway:wrong-secret"}, "refuses the gateway's key"),
        ({"batch_s3_key": "nobody:wrong-secret"}, "does not know the gateway's key"),
    ],
)
async def test_bucket_that_is_not_ours_says_what_to_do_and_no_secret(
    kept: dict[str, Any], change: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve_gateway(**(kept | change)) as served, open_batches(served) as batches:
        with pytest.raises(openai.InternalServerError) as refused:
            await batches.upload([ask(0)])
    log = "".join(capsys.readouterr())

    assert refused.value.code == "storage_unavailable"
    assert says in refused.value.message
    assert "storage_failed" in log
    for secret in (SECRET, "wrong-secret"):
        assert secret not in log + refused.value.message


@pytest.mark.parametrize(
    ("status", "code", "kind", "says"),
    [
        ("507 Insufficient Storage", "XMinioStorageFull", StorageFull, "no room left"),
        ("403 Forbidden", "QuotaExceeded", StorageFull, "no room left"),
        ("403 Forbidden", "AccessDenied", StorageUnavailable, "has to allow it"),
        (
            "403 Forbidden",
            "RequestTimeTooSkewed",
            StorageUnavailable,
            "its clock and the gateway's",
        ),
        ("400 Bad Request", "ExpiredToken", StorageUnavailable, "has expired"),
        ("503 Service Unavailable", "SlowDown", StorageUnavailable, "try again"),
        ("416 Range Not Satisfiable", "InvalidRange", NotFound, "not there any more"),
    ],
)
def test_storages_own_codes_are_told_as_ours(
    status: str, code: str, kind: type[GatewayError], says: str
) -> None:
    page = f"<Error><Code>{code}</Code><StringToSign>hush-hush</StringToSign></Error>"
    error = GenericError(f"Generic S3 error: non-2xx status code: {status}: {page}")

    told = S3Blobs(cast("S3Store", None), "bucket", 0)._explain(error)

    assert type(told) is kind
    assert says in told.message
    assert "hush" not in told.message


async def test_batch_whose_bucket_is_gone_waits_and_is_not_failed(
    s3: S3Server, bucket: str, kept: dict[str, Any]
) -> None:
    """No file of it is lost: the bucket may be a wrong word of the operator's."""
    async with serve_gateway(**kept) as served, open_batches(served) as batches:
        file_id = await batches.upload([ask(n) for n in range(3)])
    wrong = kept | {"batch_bucket": "s3://nobody-made-it/files"}
    async with serve_gateway(**wrong) as served, open_batches(served) as batches:
        made = await batches.sdk.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        await batches.wait(made.id, "in_progress")
        await until(lambda: _count_failures(served.client, 3))
        waits = await batches.sdk.batches.retrieve(made.id)
    async with serve_gateway(**kept) as served, open_batches(served) as batches:
        batch = await batches.wait(made.id)

    assert waits.status == "in_progress"
    assert batch.request_counts.completed == 3


async def test_object_that_is_deleted_below_a_batch_fails_it_with_its_reason(
    s3: S3Server, bucket: str, kept: dict[str, Any]
) -> None:
    async with serve_gateway(**kept) as served, open_batches(served) as batches:
        engine = served.engine
        engine.delays = lambda question: 0 if question == "question 0" else 1
        batch_id = await batches.create([ask(n) for n in range(200)])
        await until(lambda: engine.calls)
        [name] = s3.list_names(bucket)
        await obstore.delete_async(s3.open(bucket), name)
        batch = await batches.wait(batch_id)
        with pytest.raises(openai.NotFoundError) as lost:
            await batches.sdk.files.content(batch.input_file_id)

    assert batch.status == "failed"
    assert batch.errors.data[0].code == "input_file_lost"
    assert lost.value.code == "file_lost"


async def test_what_is_expired_or_of_nobody_is_thrown_out_of_the_bucket(
    s3: S3Server, bucket: str, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "_SWEEP_S", 0.05)
    monkeypatch.setattr(coordinator, "_ORPHAN_AGE_S", -60)  # nobody can make an object older
    sweeps = count_sweeps(monkeypatch)

    async def until_swept_again() -> None:
        before = len(sweeps)
        await until(lambda: len(sweeps) > before + 2)

    async with serve_gateway(**kept) as served, open_batches(served) as batches:
        left, expired = await batches.upload([ask(0)]), await batches.upload([ask(1)])
        orphans = f"file-{'0' * 32}", f"batch_{'0' * 32}-1-00000000-output"
        others = {"files/report.csv", "files/2026/file-of-theirs", "of-somebody-else"}
        for name in (*(f"files/{one}" for one in orphans), *others):
            await obstore.put_async(s3.open(bucket), name, b"x")
        database = create_engine(f"sqlite:///{kept['batch_folder']}/batches.sqlite")
        with database.begin() as connection:
            values = {"at": int(time.time()) - 1, "id": expired}
            change = "UPDATE gateway_files SET expires_at = :at WHERE id = :id"
            connection.execute(text(change), values)
        database.dispose()
        await until(lambda: set(s3.list_names(bucket)) <= {f"files/{left}", *others})
        await until_swept_again()
        there = set(s3.list_names(bucket))

    assert there == {f"files/{left}", *others}


async def test_uploads_at_once_share_the_memory_of_bodies(kept: dict[str, Any]) -> None:
    """Each has two parts of 5 MiB in memory; where there is no room for another it is refused."""
    may_end = asyncio.Event()
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    tail = b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'

    async def send() -> AsyncIterator[bytes]:
        yield head + dump([ask(number, "x" * MIB) for number in range(11)])
        await may_end.wait()
        yield tail

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    async with (
        serve_gateway(max_held_bytes=16 * MIB, **kept) as served,
        open_batches(served) as batches,
    ):
        sending = asyncio.create_task(served.client.post("/v1/files", content=send(), headers=kind))

        async def has_two_parts() -> bool:
            return await _read_figure(served.client, "gateway_held_body_bytes") >= 10 * MIB

        await until(has_two_parts)
        with pytest.raises(openai.RateLimitError) as beside:
            await batches.upload([ask(number, "x" * MIB) for number in range(11)])
        may_end.set()
        first = await sending

    assert beside.value.code == "too_many_bodies"
    assert first.status_code == 200


async def _read_figure(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return float(value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batch_bucket": "bucket"}, "s3://bucket/prefix"),
        ({"batch_bucket": "s3://bucket"}, "batch_database too"),
        ({"batch_bucket": "s3://bucket", "batch_folder": "x", "batch_s3_key": "no"}, "key:secret"),
        ({"batch_folder": "x", "batch_s3_key": "a:b"}, "name it with batch_bucket"),
    ],
)
def test_settings_that_do_not_go_together_stop_the_start(fields: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make_settings(**fields)


def test_bucket_without_a_key_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)

    with pytest.raises(SettingsError, match="GATEWAY_BATCH_S3_KEY, or AWS_ACCESS_KEY_ID"):
        build_app(make_settings(batch_bucket="s3://bucket", batch_folder=tmp_path))


def test_key_of_the_bucket_is_not_shown(s3: S3Server, kept: dict[str, Any]) -> None:
    assert SECRET not in repr(make_settings(**kept))


async def test_keys_of_awss_own_variables_are_used(
    kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _, secret = kept.pop("batch_s3_key").partition(":")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    async with serve_gateway(**kept) as served, open_batches(served) as batches:
        assert await batches.upload([ask(0)])


async def test_frozen_storage_keeps_no_caller_for_ever(
    kept: dict[str, Any], s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and says nothing."""
    monkeypatch.setattr("gateway.batches.s3_blobs._REQUEST_TIMEOUT_S", 1)
    monkeypatch.setattr("gateway.batches.s3_blobs._RETRIED_S", 2)

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(2**16):
            pass
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    frozen = kept | {"batch_s3_endpoint": f"http://127.0.0.1:{port}"}
    async with server, serve_gateway(**frozen) as served, open_batches(served) as batches:
        with pytest.raises(openai.InternalServerError) as away:
            await batches.upload([ask(0)])

    assert away.value.code == "storage_unavailable"
