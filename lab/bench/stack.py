"""The doors' addresses: a stack that runs already, or one of our own."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from common.ports import find_free_row
from lab.bench.bench_figures import BenchFailed
from lab.grade.judge import Judge
from lab.launched_server import Order, Started, ended_by_sigterm, start_server
from lab.reports.progress import Progress

_HOST = "127.0.0.1"
_READY_TIMEOUT_S = 600.0
_LOOK_TIMEOUT_S = 5.0
_CONFIG_INFO = re.compile(r"^gateway_config_info\{(.+)\} 1", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Addresses:
    """Where the gateway, its engine and their launcher answer."""

    gateway: str
    engine: str
    status: str


@dataclass(frozen=True)
class Standing:
    """What the two doors and the launcher say of themselves."""

    model: str
    status: dict[str, Any]
    settings: dict[str, str]

    def engine_facts(self) -> dict[str, Any]:
        """What decides the engine's speed; empty where no launcher answers."""
        if not self.status:
            return {}
        fingerprint = self.status["fingerprint"]
        return {
            "fingerprint": fingerprint["name"],
            "profile": self.status["profile"],
            "device": self.status["device"],
            **{f"version of {name}": text for name, text in self.status["versions"].items()},
            "model digest": fingerprint["model"],
            "command": " ".join(self.status["argv"][1:]),
        }

    @property
    def model_folder(self) -> Path | None:
        """As the engine was given it."""
        words = self.status.get("argv", [])
        for before in ("--model", "serve"):
            if before in words[:-1]:
                folder = Path(words[words.index(before) + 1])
                return folder if folder.is_dir() else None
        return None


@contextlib.contextmanager
def start_stack(
    model: str, options: Sequence[str], folder: Path, progress: Progress
) -> Iterator[tuple[Addresses, Started]]:
    """The launcher on free ports, while inside."""
    port = find_free_row(3)
    environment = {
        # The same prompts are asked again and again: sharing answers would be cheating.
        "GATEWAY_DEDUP": "false",
        # Not one folder for each of the ports that happened to be free.
        "LAUNCHER_STATE_DIR": os.environ.get("LAUNCHER_STATE_DIR", str(folder / "bench-state")),
        "LAUNCHER_ENGINE_PORT": str(port + 1),
        "LAUNCHER_STATUS_PORT": str(port + 2),
    }
    order = Order(_HOST, port, model, options, environment)
    log_path = folder / "bench-stack.log"
    progress.say(f"starting {' '.join(order.command()[1:])}; its log is {log_path}")
    with start_server(order, log_path) as started, ended_by_sigterm():
        urls = [f"http://{_HOST}:{number}" for number in (port, port + 1, port + 2)]
        yield Addresses(*urls), started


async def wait_ready(url: str, progress: Progress, started: Started | None) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        find_end = started.find_end if started else lambda: None
        await Judge(url, client, progress).wait_ready(_READY_TIMEOUT_S, find_end)


async def read_standing(addresses: Addresses, headers: dict[str, str]) -> Standing:
    async with httpx.AsyncClient(trust_env=False, timeout=_LOOK_TIMEOUT_S) as client:
        try:
            models = (await client.get(f"{addresses.engine}/v1/models")).json()
            model = str(models["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            said = f"no engine answers at {addresses.engine}/v1/models ({error!r})"
            raise BenchFailed(f"{said}; --direct-url says where it is") from None
        status, settings = {}, {}
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = await client.get(f"{addresses.status}/status")
            status = _read_status(answer.json())
        with contextlib.suppress(httpx.HTTPError):
            text = (await client.get(f"{addresses.gateway}/metrics", headers=headers)).text
            found = _CONFIG_INFO.search(text)
            settings = dict(_LABEL.findall(found[1])) if found else {}
    return Standing(model, status, settings)


def _read_status(data: Any) -> dict[str, Any]:
    """Empty if something else than a launcher answered."""
    keys = {"fingerprint", "profile", "device", "versions", "argv"}
    return data if isinstance(data, dict) and keys <= data.keys() else {}
