"""What is worth trying on a device (`candidates.toml`), and which of those measured is kept.

How one is measured is in `measuring.py`.
"""

from __future__ import annotations

import itertools
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from common.settings import suggest
from launcher.plan.engine_plan import EnginePlan
from launcher.plan.hardware import Device, count_cores

SHIPPED = "as shipped"
_FILE = Path(__file__).parent / "candidates.toml"
_COMBINED = "together"
# Less than this is noise between two starts of the same engine.
_WORTH_IT = 1.02


@dataclass(frozen=True)
class Candidate:
    name: str
    axis: str
    why: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def changes(self) -> dict[str, Any]:
        return {**self.options, **self.environment}


@dataclass
class CandidateResult:
    """What one candidate did, over all rounds."""

    candidate: Candidate
    speeds: list[float] = field(default_factory=list)  # output tokens a second, one a batch
    start_seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    failure: str = ""

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds) if self.speeds else 0.0


def list_candidates(device: Device, plan: EnginePlan) -> list[Candidate]:
    """The profile as shipped, and every change that applies here and changes anything."""
    kinds = {"gpu", device.generation} if device.is_gpu else {"cpu"}
    if device.is_gpu and device.count > 1 and plan.model.shape.heads % device.count == 0:
        kinds.add("gpus")
    present = {choice.name: choice.value for choice in (*plan.options, *plan.environment)}
    found = [Candidate(SHIPPED, "", f"the profile {plan.profile}, unchanged")]
    for row in tomllib.loads(_FILE.read_text(encoding="utf-8"))["candidate"]:
        options = {k: _fill_in(v, device) for k, v in row.get("options", {}).items()}
        environment = {
            name: value.format(cores=count_cores())
            for name, value in row.get("environment", {}).items()
        }
        candidate = Candidate(row["name"], row["axis"], row["why"], options, environment)
        is_new = any(
            str(present.get(name, "auto" if value else "")) != str(value)
            for name, value in candidate.changes.items()
        )
        is_double = any(candidate.changes == other.changes for other in found)
        if kinds & set(row["on"]) and is_new and not is_double:
            found.append(candidate)
    return found


def _fill_in(value: Any, device: Device) -> Any:
    return device.count if value == "{gpus}" else value


def pick(candidates: list[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The profile as shipped and those asked for; all of them when none is."""
    known = [candidate.name for candidate in candidates[1:]]
    for name in names:
        if name not in known:
            raise SettingsError(
                f"tune_only: {name} is no candidate here{suggest(name, known)} "
                f"(there are: {', '.join(known)})"
            )
    return [one for one in candidates if not names or one.name in (SHIPPED, *names)]


def combine(results: list[CandidateResult], max_loss: float) -> Candidate | None:
    """The best honest change of every axis, together; None when fewer than two axes gained."""
    shipped = results[0].speed
    best: dict[str, CandidateResult] = {}
    for result in results[1:]:
        is_honest = result.loss <= max_loss and not result.failure
        is_gain = result.speed > shipped * _WORTH_IT and is_honest
        axis = result.candidate.axis
        if is_gain and (axis not in best or best[axis].speed < result.speed):
            best[axis] = result
    if len(best) < 2:
        return None
    winners = [result.candidate for result in best.values()]
    return Candidate(
        _COMBINED,
        "all",
        " + ".join(winner.name for winner in winners),
        dict(itertools.chain.from_iterable(w.options.items() for w in winners)),
        dict(itertools.chain.from_iterable(w.environment.items() for w in winners)),
    )


def choose(results: list[CandidateResult], max_loss: float) -> CandidateResult:
    """The fastest honest one; what was shipped stays unless it is beaten by more than noise."""
    shipped = results[0]
    honest = [r for r in results[1:] if r.speeds and r.loss <= max_loss and not r.failure]
    best = max(honest, key=lambda r: r.speed, default=shipped)
    return best if best.speed > shipped.speed * _WORTH_IT else shipped
