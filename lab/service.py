"""What a service says of itself: the model it serves, its launcher's status, its settings.

None of it is needed to measure; what is not there, no JSON or too slow is simply not known.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from common import processes
from common.json_text import mend, parse_json
from common.prometheus_text import parse_samples

_QUICK_TIMEOUT_S = 2.0
_STATUS_KEYS = {"fingerprint", "profile", "device", "versions", "argv"}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@functools.cache
def load_authorities() -> ssl.SSLContext:
    """Once for all clients: reading them takes 30 ms of CPU."""
    return httpx.create_ssl_context(trust_env=False)


def open_http(**options: Any) -> httpx.AsyncClient:
    """No proxy is asked: what is measured is near."""
    return httpx.AsyncClient(trust_env=False, verify=load_authorities(), **options)


def is_anyone_there(url: str) -> bool:
    """Whether something answers HTTP at this address, ready or not."""
    try:
        with httpx.stream("GET", f"{url}/healthz", timeout=_QUICK_TIMEOUT_S, trust_env=False):
            return True
    except httpx.ReadTimeout:
        return True
    except httpx.HTTPError:
        return False


async def read_json(url: str, client: httpx.AsyncClient) -> Any:
    """None of what is not there, no JSON, or too slow."""
    with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
        async with asyncio.timeout(_QUICK_TIMEOUT_S):
            return parse_json((await client.get(url, timeout=_QUICK_TIMEOUT_S)).content)
    return None


async def read_model(url: str, client: httpx.AsyncClient) -> str:
    """The served model's name, if the server has /v1/models."""
    with contextlib.suppress(LookupError, TypeError):
        answer = await read_json(f"{url}/v1/models", client)
        return mend(str(answer["data"][0]["id"]))
    return ""


async def read_launcher(status_url: str, client: httpx.AsyncClient) -> LauncherStatus:
    status = await read_json(f"{status_url}/status", client)
    return LauncherStatus(status_url, status if isinstance(status, dict) else {})


async def read_settings(url: str, client: httpx.AsyncClient) -> dict[str, str]:
    """Those that a gateway tells at /metrics."""
    with contextlib.suppress(httpx.HTTPError, ValueError, LookupError):
        samples = parse_samples((await client.get(f"{url}/metrics")).text)
        return samples["gateway_config_info"][0][0]
    return {}


@dataclass(frozen=True)
class LauncherStatus:
    """A launcher's /status; empty if nobody, or something else, answered there."""

    url: str = ""
    status: dict[str, Any] = field(default_factory=dict)

    def pid(self, program: str) -> int | None:
        """Of `gateway` or `engine`."""
        pid = (self.status.get(program) or {}).get("pid")
        return pid if isinstance(pid, int) and pid else None

    def find_local_pid(self, program: str, word: str) -> int | None:
        """If it is a process of this machine, with the word in its command.

        A launcher in a container names its processes by numbers that mean others out here.
        """
        pid = self.pid(program) if urlsplit(self.url).hostname in _LOOPBACK else None
        return pid if pid and word in processes.read_command(pid) else None

    def describe_engine(self) -> dict[str, Any]:
        """What decides the engine's speed, and how long it took to start."""
        if not self.status.keys() >= _STATUS_KEYS:
            return {}
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
            fingerprint, versions = self.status["fingerprint"], self.status["versions"]
            seconds = self.status["engine"]["start_seconds"]
            facts = {
                "profile": self.status["profile"],
                "device": self.status["device"],
                "vllm": versions["vllm"],
                "fingerprint": fingerprint["name"],
                "model digest": fingerprint.get("model", ""),
                **{f"version of {name}": text for name, text in versions.items()},
                "command": " ".join(self.status["argv"][1:]),
            }
            known = {name: mend(str(value)) for name, value in facts.items()}
            return {**known, "start_seconds": None if seconds is None else float(seconds)}
        return {}

    @property
    def model_folder(self) -> Path | None:
        """As the engine was given it."""
        words = self.status.get("argv") or []
        for before in ("--model", "serve"):
            if before in words[:-1]:
                folder = Path(words[words.index(before) + 1])
                return folder if folder.is_dir() else None
        return None
