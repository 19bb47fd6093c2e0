"""A gateway as a process of its own, as users run it, and what the kernel says of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson

from common.ports import find_free_ports
from lab.fuzz.loop_watch import describe_blocks
from tests.fake_engine import MODEL_FOLDER
from tests.gateway.conftest import until
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS


@dataclass(frozen=True)
class GatewayProcess:
    """A running `python -m gateway`; its log goes to a file."""

    process: asyncio.subprocess.Process
    url: str
    log: Path

    def read_log(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """What its threads have worked so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read_bytes(self) -> int:
        """What it has read so far, from sockets and files."""
        first = Path(f"/proc/{self.process.pid}/io").read_text().splitlines()[0]
        return int(first.removeprefix("rchar: "))

    def count_sockets(self) -> int:
        count = 0
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed in this very moment
                count += str(link.readlink()).startswith("socket:")
        return count


@contextlib.asynccontextmanager
async def serve_process(
    folder: Path,
    engine_url: str,
    *flags: str,
    wrapper: Sequence[str] = (),
    stderr: int | None = None,
    blocks: Path | None = None,
) -> AsyncIterator[GatewayProcess]:
    """`wrapper`: a program that becomes the gateway, such as a shell with other limits. `stderr`:
    where its log goes instead of to a file. `blocks`: the file in which `loop_watch` notes what
    kept its event loop busy.
    """
    program = ["gateway"] if blocks is None else ["lab.fuzz.loop_watch", str(blocks)]
    port = 0 if stderr is None else find_free_ports(1)[0]
    command = ["--port", str(port), "--engines", engine_url, "--tokenizer", str(MODEL_FOLDER)]
    command += ["--warmup-prompts", "2", "--log-format", "json"]
    path = folder / "gateway.log"
    with path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *wrapper,
            *(sys.executable, "-m", *program, *command, *flags),
            stderr=log if stderr is None else stderr,
        )
    try:
        await until(lambda: process.returncode is not None or port or _port(path), PROGRAM_S)
        served = GatewayProcess(process, f"http://127.0.0.1:{port or _port(path)}", path)
        async with httpx.AsyncClient(base_url=served.url, verify=NO_TLS) as client:
            await until(lambda: _is_ready(client), PROGRAM_S)
        if blocks is not None:
            os.truncate(blocks, 0)  # a start may take its time
        yield served
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), PROGRAM_S)


def check_blocks(path: Path) -> None:
    """Of a gateway that was served with `blocks`."""
    said = describe_blocks(path)
    assert not said, said


def _port(log: Path) -> int | None:
    for line in log.read_bytes().splitlines():
        if b'"gateway_listening"' in line:
            return int(orjson.loads(line)["port"])
    return None


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/readyz")).status_code == 200
    except httpx.ConnectError:
        return False
