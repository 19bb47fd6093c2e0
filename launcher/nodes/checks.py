"""What `doctor` looks at where an engine runs on several hosts: "ok", "warn" or "fail", and why."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import httpx

from common.errors import SettingsError
from common.web.addresses import is_loopback
from launcher.config import PREFIX, LauncherSettings
from launcher.nodes.agreement import find_differences, look_at_host
from launcher.nodes.head_link import HeadAway, HeadClient
from launcher.nodes.messages import Answer
from launcher.plan.spreading import Layout, find_interface

Verdict = tuple[str, str]
_RAY_TIMEOUT_S = 60.0
_COUNT_RAY = (
    "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False); "
    "print(sum(one['Alive'] for one in ray.nodes()))"
)


def check_as_head(settings: LauncherSettings, layout: Layout) -> Iterator[Verdict]:
    """Before anybody joins; whether they fit is told where they join."""
    for rank in range(layout.nodes):
        yield "ok", f"{rank + 1} of {layout.nodes}: {layout.describe(rank)}"
    if settings.nodes_backend == "ray":
        yield from _check_ray(layout.nodes)
        return
    address = settings.node_address_used
    if is_loopback(address):
        yield "warn", f"only this machine can join at {address}: set {PREFIX}NODE_ADDRESS"
    elif interface := find_interface(address):
        yield "ok", f"they join at {address}:{settings.node_port} ({interface})"
    else:
        yield "fail", f"{address} is no address of this host: set {PREFIX}NODE_ADDRESS to one"


def _check_ray(nodes: int) -> Iterator[Verdict]:
    if not importlib.util.find_spec("ray"):
        yield "fail", "ray is not installed beside vLLM: `pip install ray`, on all hosts"
        return
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", _COUNT_RAY],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_RAY_TIMEOUT_S,
            check=False,
        )
        here = int(result.stdout.split()[-1]) if result.returncode == 0 else 0
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        here = 0
    if here >= nodes:
        yield "ok", f"the Ray cluster has {here} hosts"
    elif here:
        yield "fail", f"the Ray cluster has {here} of {nodes} hosts: `ray start` on the others"
    else:
        yield "fail", "no Ray cluster is there: `ray start --head`, and `ray start` on the others"


def check_as_joining(settings: LauncherSettings) -> Iterator[Verdict]:
    """Against the head that runs; it is not joined."""
    title = ":".join(str(part) for part in settings.head_address)
    try:
        address, answer, why = asyncio.run(_ask_head(settings))
    except HeadAway as error:
        yield "fail", f"no head answers at {title} ({error}): start `up --nodes` there first"
        return
    yield "ok", f"the head at {title} wants {answer.nodes} hosts; its engine is {answer.state}"
    if why:
        yield (
            "fail",
            f"the head cannot open a connection to {address} ({why}): vLLM's processes need every "
            f"port between the hosts; set {PREFIX}NODE_ADDRESS where this host has another address",
        )
    else:
        yield "ok", f"the head reaches this host as {address}"
    try:
        host = look_at_host(settings, answer.part, address)
        differences = list(find_differences(host, answer))
    except SettingsError as error:
        yield "fail", str(error)
        return
    for difference in differences:
        yield "fail", difference
    if not differences:
        yield "ok", f"vLLM {host.vllm.version}, the model and the flags are the head's"


async def _ask_head(settings: LauncherSettings) -> tuple[str, Answer, str]:
    """This host's address, what the head wants, and why it cannot call back."""
    async with httpx.AsyncClient(trust_env=False) as client:
        head = HeadClient(settings, client)
        answer = await head.look()
        try:
            server = await asyncio.start_server(lambda _, writer: writer.close(), head.address, 0)
        except OSError as error:
            why = error.strerror or str(error)
            raise SettingsError(
                f"{PREFIX}NODE_ADDRESS: {head.address} is no address of this host ({why})"
            ) from None
        async with server:
            port = server.sockets[0].getsockname()[1]
            return head.address, answer, await head.ask_to_dial(port)
