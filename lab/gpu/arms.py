"""What is compared: words of the command line -> engines with their flags, cards and memory.

An arm is a profile of the launcher, or one of those in arms.toml; `K*ARM` is K engines of it, each
on cards of its own, behind one gateway; `ARM KEY=VALUE …` changes options of it. `PROFILE-stock`
has vLLM's own scheduler. How they are started and stopped is in `engines.py`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.settings import suggest
from lab.failures import BadOptions
from lab.reports.console import count
from launcher.config import LauncherSettings, load_settings
from launcher.models.model import find_model
from launcher.plan.budget import Budget, Sizing, Workload, compute_budget
from launcher.plan.command import EngineCommand, build_arguments, find_vllm
from launcher.plan.engine_plan import NAMES, EngineOption, EnginePlan, parse_overrides
from launcher.plan.flags.known_flags import read_flags
from launcher.plan.hardware import GIB, Device, find_device
from launcher.plan.prepare import Prepared, prepare_with

STOCK = "-stock"
# Beside what the launcher estimates: fragments, what libraries keep for themselves.
_SLACK_BYTES = 2 * GIB
_BLOCK_TOKENS = {True: 16, False: 128}  # of a GPU, of a CPU
_KV_MARGIN = 1.05
_WORD = re.compile(r"(?:(\d+)\*)?([a-z]+)(-stock)?")
_OTHERS = tomllib.loads((Path(__file__).parent / "arms.toml").read_text(encoding="utf-8"))["arm"]
_ENVIRONMENT = {
    # /reset_prefix_cache: each measured call meets an empty cache, as a new question does.
    "VLLM_SERVER_DEV_MODE": "1",
    # NCCL's watchdog would end a worker that was stopped for long.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Arm:
    """As the command line names it."""

    word: str
    name: str
    copies: int
    changes: tuple[str, ...]
    options: dict[str, Any] | None  # None: a profile of the launcher

    def is_kin(self, other: Arm) -> bool:
        return self.word in other.list_relatives() or other.word in self.list_relatives()

    def list_relatives(self) -> Iterator[str]:
        """What differs from it in one thing: vLLM's own scheduler, one engine for several, the
        profile's own options.
        """
        head, *changes = self.word.split()
        if changes:
            yield head
        if self.options is None and not head.endswith(STOCK):
            yield " ".join([f"{head}{STOCK}", *changes])
        if self.copies > 1:
            yield " ".join([head.partition("*")[2], *changes])


@dataclass(frozen=True)
class AskedBatch:
    """What every engine must have room for at once."""

    sequences: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class PlannedArm:
    """An arm ready to start: the command of its engine, and what each engine of it takes."""

    arm: Arm
    command: EngineCommand
    need_bytes: int  # of each card
    cards_each: int
    plan: EnginePlan | None

    @property
    def cards(self) -> int:
        return self.cards_each * self.arm.copies

    @property
    def scheduler(self) -> str:
        words = self.command.arguments
        return words[words.index("--scheduler-cls") + 1] if "--scheduler-cls" in words else "vLLM's"

    def describe(self) -> str:
        words = self.command.arguments
        most = words[words.index("--max-num-seqs") + 1] if "--max-num-seqs" in words else "vLLM's"
        room = f"{self.need_bytes / GIB:.1f} GiB of {count(self.cards, 'card')}"
        return f"{room}, max-num-seqs {most}, scheduler {self.scheduler}"


class ArmPlanner:
    """What all arms share: the host, vLLM, the model."""

    def __init__(self, model: Path, load_format: str) -> None:
        self._model_path = model
        self._format = [f"load-format={load_format}"] if load_format else []
        settings = self._settings("auto", ())
        self.vllm = find_vllm()
        self._flags = read_flags(self.vllm.version, settings.cache_path)
        self.device = find_device(settings.gpu, engine_build=self.vllm.build)
        self.model = find_model(settings, config_only=True)

    def plan(self, arm: Arm, batch: AskedBatch) -> PlannedArm:
        if arm.options is None:
            return self._plan_profile(arm, batch)
        changes = parse_overrides((*arm.changes, *self._format), self._flags)
        rows = {name: EngineOption(name, value) for name, value in arm.options.items()}
        rows |= {change.name: change for change in changes}
        options = {row.name: row.value for row in rows.values() if not row.omit}
        sizing = Sizing(self.device, self.model, Workload(batch.sequences, 1, 1), options)
        share, need = self._share(arm, compute_budget(sizing), batch, batch.sequences)
        named = {"served-model-name": [self.model.served_name], **options, **share}
        flags = build_arguments([EngineOption(k, v) for k, v in named.items()], self._flags)
        model = str(self.model.path)
        head = ["serve", model] if self.vllm.takes_serve else ["--model", model]
        like = self._prepare("auto", self._format).command.environment
        kept = like if not self.device.is_gpu else {"VLLM_CACHE_ROOT": like["VLLM_CACHE_ROOT"]}
        command = EngineCommand(self.vllm.module, (*head, *flags), {**kept, **_ENVIRONMENT})
        return PlannedArm(arm, command, need, int(sizing.number("tensor-parallel-size", 1)), None)

    def _plan_profile(self, arm: Arm, batch: AskedBatch) -> PlannedArm:
        """Twice: on a card of its own, to see what the profile wants, and with its share of one,
        where the launcher would let fewer sequences in.
        """
        changes = (*arm.changes, *self._format)
        alone = self._prepare(arm.name, changes).plan
        most = int(alone.value("max-num-seqs", batch.sequences))
        share, need = self._share(arm, alone.budget, batch, most)
        wanted = {name: alone.value(name) for name in ("max-num-seqs", "max-model-len")}
        fixed = [f"{k}={v}" for k, v in {**wanted, **share}.items() if v is not None]
        prepared = self._prepare(arm.name, [*fixed, *changes])
        words = list(prepared.command.arguments)
        for name in ("--host", "--port"):  # each engine's own
            at = words.index(name)
            del words[at : at + 2]
        environment = {**prepared.command.environment, **_ENVIRONMENT}
        command = EngineCommand(prepared.command.module, tuple(words), environment)
        parallel = int(alone.value("tensor-parallel-size", 1))
        return PlannedArm(arm, command, need, parallel, prepared.plan)

    def _prepare(self, profile: str, changes: Sequence[str]) -> Prepared:
        settings = self._settings(profile, changes)
        return prepare_with(settings, self.vllm, self._flags, self.model)

    def _settings(self, profile: str, changes: Sequence[str]) -> LauncherSettings:
        words = ["--model", str(self._model_path), "--profile", profile, "--status-port", "0"]
        sets = [word for change in changes for word in ("--set", change)]
        return load_settings(LauncherSettings, [*words, *sets])

    def _share(
        self, arm: Arm, budget: Budget, batch: AskedBatch, most: int
    ) -> tuple[dict[str, Any], int]:
        """The options that give an engine its part of a card, and how much that is: a cache for
        what it takes of the batch at once, or for one sequence of the longest that it lets in.
        """
        block = _BLOCK_TOKENS[self.device.is_gpu]
        sequences = min(most, -(-batch.sequences // arm.copies))
        each = -(-(batch.prompt_tokens + batch.new_tokens) // block) * block
        tokens = max(int(sequences * each * _KV_MARGIN), budget.context_tokens + 2 * block)
        kv = -(-tokens * budget.kv_bytes_per_token // 2**20) * 2**20
        need = budget.weight_bytes + budget.working_bytes + kv + _SLACK_BYTES
        share: dict[str, Any] = {"kv-cache-memory-bytes": kv}
        if self.device.is_gpu:
            share["gpu-memory-utilization"] = round(need / self.device.memory_bytes, 3)
        return share, need


def parse_arm(text: str) -> Arm:
    word, *changes = text.split()
    others = {row["name"]: row.get("options", {}) for row in _OTHERS}
    known = [*others, *NAMES]
    match = _WORD.fullmatch(word)
    name = match[2] if match else word
    if match is None or name not in known:
        raise BadOptions(f"no arm {word!r}{suggest(name, known)} (there are {', '.join(known)})")
    if wrong := [change for change in changes if "=" not in change]:
        raise BadOptions(f"arm {text!r}: {wrong[0]!r} is not key=value")
    if match[3] and name in others:
        raise BadOptions(f"arm {word!r}: {name} has vLLM's own scheduler anyway")
    if match[3]:
        changes.insert(0, "scheduler-cls=")
    return Arm(text, name, int(match[1] or 1), tuple(changes), others.get(name))


def list_default_arms(device: Device) -> list[str]:
    profiles = [name for name in NAMES if name not in ("development", "cpu")]
    others = [row["name"] for row in _OTHERS]
    if not device.is_gpu:
        profiles, others = ["cpu"], []
    return [*others, *(f"{name}{tail}" for name in profiles for tail in ("", STOCK))]


def group_arms(planned: Sequence[PlannedArm], device: Device, cards: int) -> list[list[PlannedArm]]:
    """As many at a time as the cards hold; the first, which others are held against, is in each.

    What is held against each other has to be measured in the same rounds: kin stay together.
    """
    for one in planned:
        if one.cards > max(1, cards):
            raise BadOptions(f"arm {one.arm.word!r} takes {one.cards} cards, of {cards}")
    room = device.memory_bytes - device.used_bytes - GIB  # CUDA itself keeps some
    families: list[list[PlannedArm]] = []
    for one in planned[1:]:
        if families and any(one.arm.is_kin(other.arm) for other in families[-1]):
            families[-1].append(one)
        else:
            families.append([one])
    groups: list[list[PlannedArm]] = []
    for family in families:
        if groups and _fits([*groups[-1], *family], room, cards):
            groups[-1] += family
        else:
            groups.append([planned[0], *family])
    return groups or [[planned[0]]]


def _fits(group: Sequence[PlannedArm], room: int, cards: int) -> bool:
    used = [0] * max(1, cards)
    for one in group:
        for card in range(one.cards):
            used[card] += one.need_bytes
    return max(used) <= room
