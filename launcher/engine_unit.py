"""One engine of this launcher: its process, what supervises it, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import structlog

from launcher.engine.crash_card import CrashCards
from launcher.engine.probe import EngineProbe
from launcher.engine.status import SchedulerStatus, StatusSource
from launcher.engine.supervisor import Peers, ProgramStatus, RestartPolicy, Supervisor
from launcher.engine.terminal import Terminal, best_effort
from launcher.engine.vllm_log import SchedulerState
from launcher.engine.vllm_server import VllmServer
from launcher.plan.compile_cache import note_start
from launcher.plan.fingerprint import read_versions
from launcher.plan.prepare import Prepared
from launcher.plan.sharing import sleeps

log = structlog.get_logger("launcher")


class EngineUnit:
    """From its plan to its last breath."""

    def __init__(
        self,
        prepared: Prepared,
        terminal: Terminal,
        probe: EngineProbe,
        policy: RestartPolicy,
        *,
        users: int | None,
        label: str = "",
        peers: Peers | None = None,
    ) -> None:
        settings = prepared.settings
        folder = settings.state_path
        self.prepared = prepared
        self.label = label  # where there are several
        self._server = server = VllmServer(prepared.command, settings, probe, users=users)
        self._fingerprint = prepared.fingerprint.describe()
        versions = read_versions(prepared.vllm)
        self.cards = CrashCards(
            folder / "crashes", prepared.command, server, versions, self._fingerprint
        )
        self.supervisor = Supervisor(
            server,
            policy,
            terminal,
            folder,
            self.cards.add,
            label=label,
            peers=peers,
            sleeper=server if sleeps(settings, prepared.plan.device) else None,
        )
        server.lines = self.supervisor.lines
        self._facts = describe_launch(prepared, versions, self._fingerprint)

    @property
    def model(self) -> str:
        return self.prepared.plan.served_name

    @property
    def takes_turns(self) -> bool:
        return self.prepared.settings.takes_turns

    def log_start(self) -> None:
        plan = self.prepared.plan
        log.info(
            "launcher_started",
            profile=plan.profile,
            device=plan.device.title,
            **({"gpus": ",".join(gpus)} if (gpus := self.prepared.settings.gpus) else {}),
            model=plan.model.name,
            vllm=self.prepared.vllm.version,
            scheduler=plan.scheduler,
            log_file=str(self.supervisor.lines.path),
        )
        for note in plan.notes:
            log.info("tuned_profile", note=note)
        for warning in plan.warnings:
            log.warning("plan_compromised", why=warning)

    def note_start(self) -> None:
        """How long it took, for the next one."""
        seconds = self.supervisor.status.start_seconds or 0.0
        cache = self.prepared.settings.compiled_path
        with best_effort(cache):
            note_start(cache, self.prepared.fingerprint.name, seconds)

    def status_source(
        self,
        gateway: ProgramStatus | None,
        policy: RestartPolicy,
        dropped: Callable[[], dict[str, int]],
    ) -> StatusSource:
        programs = {"engine": self.supervisor.status}
        if gateway is not None:
            programs["gateway"] = gateway
        labels = {
            "vllm": self.prepared.vllm.version,
            "model": self._facts["model"],
            "profile": self._facts["profile"],
            "device": self._facts["device"],
            "fingerprint": self._fingerprint["name"],
        }
        return StatusSource(
            programs,
            self._facts,
            labels,
            self._read_progress,
            lambda: self.cards.last,
            policy,
            self._read_scheduler,
            dropped,
            has_gpu=self.prepared.plan.device.is_gpu,
            gpus=self.prepared.settings.gpus,
        )

    def _read_progress(self) -> dict[str, Any] | None:
        return asdict(self._server.progress) if self._server.progress else None

    def _read_scheduler(self) -> SchedulerStatus:
        said = self._server.scheduler or SchedulerState("")
        planned, fallbacks = self.prepared.plan.scheduler, self._server.scheduler_fallbacks
        return SchedulerStatus(planned, said.state, said.reason, fallbacks)


def describe_launch(
    prepared: Prepared, versions: Mapping[str, str], fingerprint: Mapping[str, str]
) -> dict[str, Any]:
    """What the status tells of it and no restart changes."""
    plan = prepared.plan
    return {
        "profile": plan.profile,
        "model": plan.model.served_name,
        "device": plan.device.title,
        # By these a gateway that was started elsewhere knows how much it may send where.
        "engine_port": prepared.settings.engine_port,
        "max_num_seqs": plan.sequences,
        "versions": versions,
        "fingerprint": fingerprint,
        "argv": prepared.command.argv,
    }
