"""The crash card: everything worth knowing about one crash, in one JSON file."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.files import PART, write_file
from launcher.engine.supervisor import ExitReport, ProgramStatus
from launcher.engine.terminal import best_effort
from launcher.engine.vllm_log import Killed, find_lost_actor
from launcher.engine.vllm_server import VllmProcess
from launcher.plan.command import EngineCommand
from launcher.plan.hardware import query_gpus

_CARDS_KEPT = 20
_LINES = 60
_GPU_PATIENCE_S = 3.0  # the restart waits for it


@dataclass
class CrashCards:
    """Writes them into a folder and remembers the last one, for the status endpoint."""

    folder: Path
    command: EngineCommand
    engine: VllmProcess
    versions: dict[str, str]
    fingerprint: dict[str, str]
    last: dict[str, Any] | None = field(default=None)

    async def add(self, report: ExitReport, status: ProgramStatus) -> None:
        now = datetime.now(UTC)
        gpus = await query_gpus("name,memory.used,memory.total", timeout_s=_GPU_PATIENCE_S)
        actor = find_lost_actor(report.tail)
        lost_with_ray = actor.host if actor and actor.has_lost_host else ""
        self.last = {
            "time": now.isoformat(timespec="seconds"),
            **describe_end(report, self.engine.killed),
            "cause": report.cause,
            "lost_host": report.lost_host or lost_with_ray or None,
            "lost_actor": asdict(actor) if actor else None,
            "uptime_s": round(report.uptime_s, 1),
            "was_ready": report.was_ready,
            "restarts": sum(status.restarts.values()),
            "last_lines": report.tail[-_LINES:],
            "dump": report.dump,
            "processes": report.members,
            "argv": self.command.argv,
            "environment": self.command.environment,
            "versions": self.versions,
            "gpus": [
                dict(zip(("name", "memory_used_mib", "memory_total_mib"), row, strict=True))
                for row in gpus
            ],
            "fingerprint": self.fingerprint,
        }
        with best_effort(self.folder):
            stem = f"{now:%Y%m%dT%H%M%S}-{int(report.uptime_s)}"
            await asyncio.to_thread(self._write, stem)

    def _write(self, stem: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.last, indent=2, ensure_ascii=False)
        write_file(self.folder / f"{stem}.json", text + "\n")
        cut = self.folder.glob(f"*{PART}")
        for old in [*cut, *sorted(self.folder.glob("*.json"))[:-_CARDS_KEPT]]:
            old.unlink(missing_ok=True)


def describe_end(report: ExitReport, killed: Sequence[Killed]) -> dict[str, Any]:
    """Exit code or signal, of the server itself or of the worker whose death ended it. What was
    ended here because a host was lost tells nothing.
    """
    if report.lost_host:
        return {"reason": report.reason, "exit_code": None, "signal": None, "killed_children": []}
    code = report.returncode
    names = dict(line.split(" ", 1) for line in report.members)
    children = [
        {
            "pid": one.pid,
            "name": one.name or names.get(str(one.pid), "?"),
            "signal": one.signal or None,
        }
        for one in killed
    ]
    own = signal.Signals(-code).name if code is not None and code < 0 else None
    first = children[0]["signal"] if children else None
    return {
        "reason": report.reason,
        "exit_code": code if code is not None and code >= 0 else None,
        "signal": own or first,
        "killed_children": children,
    }
