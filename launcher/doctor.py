"""`launcher doctor`: everything that can be known to be wrong before a GPU minute is spent."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from common.errors import ProgramError, SettingsError
from launcher.config import LauncherSettings
from launcher.gateway_process import check_gateway, find_engines_file, write_engines_file
from launcher.host_resources import list_listeners
from launcher.models.model import Model, find_model
from launcher.nodes.checks import check_as_head, check_as_joining
from launcher.plan.command import InstalledVllm, adapt, build_arguments, build_command, find_vllm
from launcher.plan.engine_plan import EnginePlan
from launcher.plan.fingerprint import read_version
from launcher.plan.flags.known_flags import Flags, find_change, read_flags, try_commands
from launcher.plan.hardware import GIB, Device, find_device
from launcher.plan.prepare import decide
from launcher.plan.spreading import find_layout

_MIN_FILES = 4096  # a batch of 358 separate calls is 358 sockets, twice
_MIN_DISK_BYTES = 2 * GIB
_MIN_SHM_BYTES = GIB
# The oldest driver that runs programs built for this major version of CUDA.
_MIN_DRIVER = {"12": 525, "13": 580}
_AMX = Path(__file__).parent / "plugins" / "amx.py"
_AMX_TIMEOUT_S = 60
_ERASE = "\r\033[K"
_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True)
class Finding:
    level: str  # "ok", "warn": it will start, "fail": it will not
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{_MARKS[self.level]}  {self.subject:<8} {self.text}"


class Planned(NamedTuple):
    settings: LauncherSettings
    plan: EnginePlan


Check = tuple[str, Callable[[], Iterator[Finding]]]


class Doctor:
    """Of one engine. Each check is a method that yields findings; a later one needs what an earlier
    one found.
    """

    def __init__(self, settings: LauncherSettings) -> None:
        self._settings = settings
        self._vllm: InstalledVllm | None = None
        self._flags: Flags | None = None
        self._device: Device | None = None
        self._model: Model | None = None
        self._plan: EnginePlan | None = None

    @property
    def planned(self) -> Planned | None:
        return Planned(self._settings, self._plan) if self._plan else None

    def list_checks(self) -> list[Check]:
        return [
            ("vllm", self._check_vllm),
            ("torch", self._check_torch),
            ("device", self._check_device),
            ("model", self._check_model),
            ("plan", self._check_plan),
            ("flags", self._check_flags),
            *([("hosts", self._check_hosts)] if self._settings.nodes > 1 else []),
            ("disk", self._check_disk),
        ]

    def list_checks_of_joining(self) -> list[Check]:
        """The head plans; whether this host fits is what there is to know."""
        return [
            ("vllm", self._check_vllm),
            ("torch", self._check_torch),
            ("device", self._check_device),
            ("hosts", self._check_head),
            ("disk", self._check_disk),
        ]

    def _check_hosts(self) -> Iterator[Finding]:
        layout = find_layout(self._settings, self._plan) if self._plan else None
        if layout:
            for level, text in check_as_head(self._settings, layout):
                yield Finding(level, "hosts", text)

    def _check_head(self) -> Iterator[Finding]:
        for level, text in check_as_joining(self._settings):
            yield Finding(level, "hosts", text)

    def _check_vllm(self) -> Iterator[Finding]:
        self._vllm = find_vllm()
        self._flags = read_flags(self._vllm.version, self._settings.cache_path)
        yield Finding("ok", "vllm", f"{self._vllm.title}, started as {self._vllm.module}")

    def _check_torch(self) -> Iterator[Finding]:
        torch = read_version("torch")
        is_cpu_torch = "+cpu" in torch
        if torch == "not installed":
            yield Finding("fail", "torch", "not installed; `make setup` installs it")
        elif self._vllm and self._vllm.build == "gpu" and is_cpu_torch:
            yield Finding("fail", "torch", f"{torch} cannot use the GPU that vLLM is built for")
        else:
            yield Finding("ok", "torch", torch)
        for name in ("torchvision", "torchaudio"):
            version = read_version(name)
            if is_cpu_torch and version != "not installed" and "+cpu" not in version:
                text = f"{name} {version} does not match torch {torch}: imports break; remove it"
                yield Finding("fail", "torch", text)

    def _check_device(self) -> Iterator[Finding]:
        build = self._vllm.build if self._vllm else "gpu"
        self._device = find_device(self._settings.gpu, engine_build=build, gpus=self._settings.gpus)
        yield Finding("ok", "device", self._device.title)
        if not self._device.is_gpu:
            yield from describe_amx(ask_for_amx() if build == "cpu" else "")
            return
        free = self._device.memory_bytes - self._device.used_bytes
        if self._device.used_bytes > self._device.memory_bytes // 20:
            text = f"another program holds memory: {free / GIB:.1f} GiB are free"
            yield Finding("warn", "device", text)
        yield from self._check_driver(self._device.driver)

    def _check_driver(self, driver: str) -> Iterator[Finding]:
        if not driver:
            return
        cuda = re.search(r"\+cu(\d\d)", read_version("torch"))
        least = _MIN_DRIVER.get(cuda[1], 0) if cuda else 0
        major = int(driver.partition(".")[0])
        if major < least and cuda:
            text = f"{driver} is too old for CUDA {cuda[1]}; {least} or newer is needed"
            yield Finding("fail", "driver", text)
        else:
            yield Finding("ok", "driver", driver)

    def _check_model(self) -> Iterator[Finding]:
        self._model = find_model(self._settings)
        size = self._model.file_bytes / GIB
        shape = self._model.shape
        yield Finding(
            "ok", "model", f"{self._model.path} ({shape.architecture}, {size:.2f} GiB of weights)"
        )
        if not (self._model.path / "tokenizer.json").is_file():
            yield Finding("warn", "model", "no tokenizer.json: the gateway cannot count tokens")
        elif not self._model.chat_template:
            text = "no chat template: set GATEWAY_PROMPT_STYLE to chatml, qa or raw"
            yield Finding("warn", "model", text)

    def _check_plan(self) -> Iterator[Finding]:
        if not (self._vllm and self._flags and self._model):
            return
        self._plan = decide(self._settings, self._vllm, self._flags, self._model)
        budget = self._plan.budget
        if budget.kv_tokens < budget.context_tokens:
            text = f"the KV cache would hold {budget.kv_tokens:,} tokens, less than one context"
            yield Finding("fail", "memory", text)
            return
        memory = (
            f"weights {budget.weight_bytes / GIB:.2f}, KV cache {budget.kv_bytes / GIB:.2f} GiB"
        )
        holds = f"{budget.workload_sequences:,} sequences of {budget.workload.tokens} tokens"
        yield Finding("ok", "memory", f"{self._plan.profile}: {memory}, holds {holds}")
        yield Finding("ok", "schedule", self._plan.scheduler)
        for note in self._plan.notes:
            yield Finding("ok", "tuned", note)
        for warning in self._plan.warnings:
            yield Finding("warn", "memory", warning)

    def _check_flags(self) -> Iterator[Finding]:
        """The installed parser tries the whole command, and every option alone to find culprits."""
        if not (self._vllm and self._flags and self._plan):
            return
        command = build_command(self._plan, self._settings, self._vllm, self._flags)
        options, _ = adapt(self._plan, self._settings, self._flags)
        alone = [["m", *build_arguments([option], self._flags)] for option in options]
        whole = ["m", *build_arguments(options, self._flags)]
        verdict, *verdicts = try_commands([whole, *alone])
        for option, refusal in zip(options, verdicts, strict=True):
            if refusal:
                change = find_change(option.name.partition(".")[0])
                advice = f"; {change['note']}" if change else ""
                yield Finding("fail", "flags", f"{option.name}: {refusal}{advice}")
        if verdict and not any(verdicts):
            yield Finding("fail", "flags", verdict)
        if not verdict:
            count = sum(word.startswith("--") for word in command.arguments)
            yield Finding("ok", "flags", f"{count} accepted by the parser of {self._vllm.title}")
        for choice in self._plan.options:
            if choice.name not in {option.name for option in options}:
                text = f"{choice.name} is unknown to {self._vllm.title}: left out or renamed"
                yield Finding("warn", "flags", text)

    def _check_disk(self) -> Iterator[Finding]:
        settings = self._settings
        for path in filter(None, (settings.cache_path, settings.state_path, settings.gpu_locks)):
            try:
                path.mkdir(parents=True, exist_ok=True)
                (path / ".doctor").write_text("")
                (path / ".doctor").unlink()
            except OSError as error:
                yield Finding("fail", "disk", f"{path}: {error.strerror}")
                continue
            free = shutil.disk_usage(path).free
            level = "ok" if free > _MIN_DISK_BYTES else "warn"
            yield Finding(level, "disk", f"{path}: {free / GIB:.1f} GiB free")
        parallel = self._plan.value("tensor-parallel-size", 1) if self._plan else 1
        shared = Path("/dev/shm")  # noqa: S108
        if parallel > 1 and shared.is_dir() and shutil.disk_usage(shared).total < _MIN_SHM_BYTES:
            text = f"{shared} is smaller than 1 GiB: GPUs talk through it (docker: --shm-size)"
            yield Finding("fail", "disk", text)


def ask_for_amx() -> str:
    """In a process of its own, as the engine's are; empty where torch does not answer."""
    command = [sys.executable, "-P", str(_AMX)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_AMX_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip()


def describe_amx(answer: str) -> Iterator[Finding]:
    """Nothing of a CPU without it."""
    if answer == "allowed":
        yield Finding("ok", "device", "AMX: the kernel allows it")
    elif answer == "refused":
        text = (
            "AMX: this CPU has it and the kernel refuses it (an old kernel, a sandbox); the engine "
            "computes bfloat16 without it, and slower"
        )
        yield Finding("warn", "device", text)


def examine(
    engines: Sequence[LauncherSettings], announce: Callable[[str], None] = lambda _: None
) -> Iterator[Finding]:
    """Each engine, then what they have in common. `announce` is told what is looked at next: vLLM's
    parser alone takes seconds.
    """
    doctors = [Doctor(one) for one in engines]
    if engines[0].join:
        checks = doctors[0].list_checks_of_joining()
    else:
        checks = [check for doctor in doctors for check in doctor.list_checks()]
        checks += [
            ("gateway", partial(check_gateway_settings, doctors)),
            ("port", partial(check_ports, engines)),
        ]
    checks += [("limits", check_limits), ("clock", check_clock)]
    for number, (subject, check) in enumerate(checks, start=1):
        announce(f"{number} of {len(checks)}: {subject}")
        try:
            yield from check()
        except ProgramError as error:
            yield Finding("fail", subject, str(error))


def check_gateway_settings(doctors: Sequence[Doctor]) -> Iterator[Finding]:
    """One for all engines; where they take turns it is told of them by a file."""
    planned = [doctor.planned for doctor in doctors]
    engines = [one for one in planned if one]
    # The engine's image has no gateway.
    if len(engines) < len(planned) or not importlib.util.find_spec("gateway"):
        return
    first, *others = engines
    file = find_engines_file(first.settings)
    if any(one.settings.takes_turns for one in engines) and not file.is_file():
        with contextlib.suppress(OSError):  # the folder's finding tells it
            write_engines_file(file, [first.settings])
    check_gateway(first.settings, first.plan, others)
    yield Finding("ok", "gateway", "it has nothing against its settings")


def check_ports(engines: Sequence[LauncherSettings]) -> Iterator[Finding]:
    for listener in list_listeners(engines, with_gateway=True):
        try:
            listener.ensure_free()
            yield Finding("ok", "port", f"{listener.host}:{listener.port} is free")
        except SettingsError as error:
            yield Finding("fail", "port", str(error))


def check_limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = hard if hard != resource.RLIM_INFINITY else _MIN_FILES
    level = "ok" if max(soft, least) >= _MIN_FILES else "warn"
    yield Finding(level, "limits", f"{soft} open files, {hard} at most (vLLM raises its own)")


def check_clock() -> Iterator[Finding]:
    """Wrong clocks break TLS, caches and every log; files from the future give them away."""
    newest = max(file.stat().st_mtime for file in Path(__file__).parent.rglob("*.py"))
    now = time.time()
    if now < newest - 300:
        text = f"the clock is {(newest - now) / 3600:.1f} h behind this program's own files"
        yield Finding("fail", "clock", text)
    else:
        yield Finding("ok", "clock", time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def run_doctor(
    engines: Sequence[LauncherSettings], say: Callable[[str], None], progress: TextIO
) -> int:
    """On a terminal a line tells what is being looked at, and goes when that is known."""
    is_shown, n_failed = progress.isatty(), 0

    def announce(what: str) -> None:
        if is_shown:
            progress.write(f"{_ERASE}looking at {what} …")
            progress.flush()

    for finding in examine(engines, announce):
        if is_shown:
            progress.write(_ERASE)
            progress.flush()
        say(str(finding))
        n_failed += finding.level == "fail"
    if is_shown:
        progress.write(_ERASE)
    return 2 if n_failed else 0
