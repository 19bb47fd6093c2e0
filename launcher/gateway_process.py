"""The gateway as a program to supervise: known by HTTP and names of variables, nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import httpx

from common.errors import SettingsError
from common.files import write_file
from launcher.config import LauncherSettings
from launcher.engine import vllm_log
from launcher.engine.hang_detector import SilenceDetector
from launcher.engine.polling import poll
from launcher.engine.process import ChildProcess, bind_to_parent
from launcher.plan.engine_plan import EnginePlan

_POLL_S = 0.2
_LISTEN_TIMEOUT_S = 60.0
_QUICK_TIMEOUT_S = 5.0
_CHECK_TIMEOUT_S = 30.0
# Where engines take turns: their list is looked at so often, and a start is waited for so long.
_RELOAD_S, _TURN_HOLD_S = "0.2", "300"


class Planned(Protocol):
    """An engine, as far as the gateway must know it."""

    @property
    def settings(self) -> LauncherSettings: ...
    @property
    def plan(self) -> EnginePlan: ...


class GatewayProcess:
    name = "gateway"

    def __init__(
        self,
        settings: LauncherSettings,
        plan: EnginePlan,
        client: httpx.AsyncClient,
        *,
        log_format: str,
        engine_ready: asyncio.Event,
        inherited: Sequence[int] = (),
        others: Sequence[Planned] = (),
    ) -> None:
        """`settings` and `plan` are the first engine's."""
        self._settings = settings
        self._plan = plan
        self._others = others
        self._client = client
        self._log_format = log_format
        self._engine_ready = engine_ready
        # It waits for the engine, so only its own listening has a limit of its own.
        limit_s = _LISTEN_TIMEOUT_S + settings.start_timeout_s * 2
        # The engine waits for its other hosts as long as it takes.
        self.start_timeout_s = sys.maxsize if settings.nodes > 1 else limit_s
        self.drain_timeout_s = float(settings.drain_timeout_s)
        self.kill_timeout_s = settings.kill_timeout_s
        self.inherited: Sequence[int] = inherited

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        environment = build_environment(self._settings, self._plan, self._log_format, self._others)
        kill_s = self.drain_timeout_s + self.kill_timeout_s  # it drains by itself
        return bind_to_parent("gateway", kill_s=kill_s), environment

    async def has_page(self) -> bool:
        """Its own settings say whether there is one."""
        return await self._answers("/ui")

    def read_line(self, line: str) -> None:
        """Its lines are shown as they are."""

    def find_cause(self, lines: Sequence[str]) -> str:
        return vllm_log.find_cause(lines)

    async def is_up(self) -> bool:
        return await self._answers("/healthz")

    async def warm(self) -> None:
        await self._engine_ready.wait()  # before that, asking would only fill its log
        await poll(partial(self._answers, "/readyz"), pause_s=_POLL_S)

    async def watch(self, child: ChildProcess) -> str:
        limit_s = self._settings.gateway_hang_timeout_s
        if not limit_s:
            await asyncio.Event().wait()
        ask = partial(self._answers, "/healthz", timeout_s=None)
        return await SilenceDetector(limit_s, child.pid, ask).run()

    async def dump(self, child: ChildProcess) -> list[str]:
        return [f"{member.pid} {member.name}: state {member.state}" for member in child.members()]

    async def drain(self, timeout_s: float) -> None:
        """At SIGTERM it lets running requests finish by itself."""

    def clean_up(self) -> None:
        """It leaves nothing."""

    async def _answers(self, path: str, *, timeout_s: float | None = _QUICK_TIMEOUT_S) -> bool:
        url = self._settings.gateway_url + path
        try:
            response = await self._client.get(url, timeout=timeout_s)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK


def check_gateway(
    settings: LauncherSettings, plan: EnginePlan, others: Sequence[Planned] = ()
) -> None:
    """Its settings are its own to judge; asked first, it costs half a second and no engine."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", "gateway", "check"],
            env=build_environment(settings, plan, "json", others),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SettingsError(
            f"the gateway cannot start: `python -m gateway check` took over {_CHECK_TIMEOUT_S:.0f} "
            "s; do its settings name files on a disk or share that does not answer?"
        ) from None
    if result.returncode:
        words = (result.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("gateway: ")
        raise SettingsError(f"the gateway cannot start: {words}")


def build_environment(
    settings: LauncherSettings,
    plan: EnginePlan,
    log_format: str,
    others: Sequence[Planned] = (),
) -> dict[str, str]:
    """Its settings, as variables: what the launcher knows, under what the user exported."""
    urls = [settings.engine_url, *(one.settings.engine_url for one in others)]
    ours = {
        "GATEWAY_HOST": settings.host,
        "GATEWAY_PORT": str(settings.port),
        "GATEWAY_ENGINES": ",".join(urls),
        "GATEWAY_TOKENIZER": str(plan.model.path),
        "GATEWAY_WARMUP_PROMPTS": str(plan.warmup_prompts),
        "GATEWAY_LOG_FORMAT": log_format,
        "GATEWAY_DRAIN_TIMEOUT_S": str(settings.drain_timeout_s),
    }
    turns = _build_turn_settings(settings, plan, others)
    ours |= turns
    if settings.otlp_endpoint:
        ours["GATEWAY_OTLP_ENDPOINT"] = settings.otlp_endpoint
    if settings.status_port_used:
        ours["GATEWAY_LAUNCHERS"] = settings.status_url
    if others:
        ours["GATEWAY_DEFAULT_MODEL"] = plan.served_name
        paths = {one.plan.served_name: one.plan.model.path for one in others}
        paths.pop(plan.served_name, None)
        ours["GATEWAY_TOKENIZERS"] = ",".join(f"{name}={path}" for name, path in paths.items())
    elif plan.sequences:
        ours["GATEWAY_ENGINE_SEQUENCES"] = str(plan.sequences)
    servers = int(plan.value("api-server-count", 1))
    if servers > 1:  # one call stays in one API server, so the batch is cut for all of them
        size = -(-plan.warmup_prompts // servers)
        ours["GATEWAY_MAX_PROMPTS_PER_CALL"] = str(size)
    exported = {k: value for k, value in os.environ.items() if not k.startswith("LAUNCHER_")}
    # Where it listens and whom it asks is the launcher's to say: it waits there for it.
    fixed = {name: ours[name] for name in ("GATEWAY_HOST", "GATEWAY_PORT", "GATEWAY_ENGINES")}
    if turns:  # a variable would win over the file
        fixed["GATEWAY_CONFIG"] = ours["GATEWAY_CONFIG"]
        for settled in (ours, exported, fixed):
            settled.pop("GATEWAY_ENGINES", None)
    return {**ours, **exported, **fixed}


def _build_turn_settings(
    settings: LauncherSettings, plan: EnginePlan, others: Sequence[Planned]
) -> dict[str, str]:
    """Where engines take turns their list is a file, which changes while the gateway runs."""
    pairs = [(settings, plan), *((one.settings, one.plan) for one in others)]
    models = [plan.served_name for own, plan in pairs if own.takes_turns]
    if not models:
        return {}
    if "GATEWAY_CONFIG" in os.environ:
        raise SettingsError(
            "where engines take turns GATEWAY_CONFIG is the launcher's; set what is in it by "
            "GATEWAY_… variables"
        )
    return {
        "GATEWAY_CONFIG": str(find_engines_file(settings)),
        "GATEWAY_EXPECTED_MODELS": ",".join(dict.fromkeys(models)),
        "GATEWAY_RELOAD_INTERVAL_S": _RELOAD_S,
        "GATEWAY_RESTART_HOLD_S": _TURN_HOLD_S,
    }


def find_engines_file(settings: LauncherSettings) -> Path:
    return settings.state_path / "gateway-engines.toml"


def write_engines_file(path: Path, engines: Sequence[LauncherSettings]) -> None:
    write_file(path, f"engines = {json.dumps([one.engine_url for one in engines])}\n")
