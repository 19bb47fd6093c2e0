"""What makes two runs comparable: vLLM, model, device and flags, with one short name for all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import asdict, dataclass

from common.files import read_text
from launcher.models.model import Model
from launcher.plan.command import EngineCommand, InstalledVllm
from launcher.plan.hardware import GIB, Device

_OWN_PLACES = (
    "--host",
    "--port",
    "--served-model-name",
    "--master-addr",
    "--master-port",
    "--data-parallel-rpc-port",
)


@dataclass(frozen=True)
class Fingerprint:
    vllm: str
    torch: str
    model: str
    device: str
    driver: str
    flags: str
    scheduler: str  # "vllm", or what --scheduler-cls names; among the flags too

    @property
    def host_key(self) -> str:
        """Of everything but the flags: what a measurement on this host is valid for."""
        return _digest("|".join((self.vllm, self.torch, self.model, self.device, self.driver)))

    @property
    def name(self) -> str:
        return _digest(f"{self.host_key}|{self.flags}")

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "host_key": self.host_key, **asdict(self)}


def take_host_key(vllm: InstalledVllm, model: Model, device: Device) -> str:
    return _fingerprint(vllm, model, device, "", "").host_key


def take_fingerprint(
    vllm: InstalledVllm, model: Model, device: Device, command: EngineCommand
) -> Fingerprint:
    words = [*_portable(command.arguments), *sorted(command.environment.items())]
    return _fingerprint(vllm, model, device, _digest(repr(words)), _find_scheduler(command))


def _find_scheduler(command: EngineCommand) -> str:
    words = iter(command.arguments)
    return next(words, "vllm") if "--scheduler-cls" in words else "vllm"


def _fingerprint(
    vllm: InstalledVllm, model: Model, device: Device, flags: str, scheduler: str
) -> Fingerprint:
    return Fingerprint(
        vllm=vllm.title,
        torch=read_version("torch"),
        model=f"{model.served_name} {describe_model(model)}",
        device=f"{device.count}x {device.name} {device.memory_bytes / GIB:.0f} GiB",
        driver=device.driver,
        flags=flags,
        scheduler=scheduler,
    )


def read_versions(vllm: InstalledVllm) -> dict[str, str]:
    rows = {"vllm": vllm.title, "torch": read_version("torch"), "python": platform.python_version()}
    return {**rows, "launcher": read_version("vllm-gateway"), "system": platform.platform()}


def read_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _portable(arguments: tuple[str, ...]) -> list[str]:
    """Without where it listens and what it is called, which change no speed."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in _OWN_PLACES:
            next(words, "")
        else:
            kept.append(word)
    return kept


def describe_model(model: Model) -> str:
    """Config and file sizes: hashing gigabytes of weights would take longer than it tells."""
    sizes = sorted((f.name, f.stat().st_size) for f in model.path.glob("*.safetensors"))
    text = read_text(model.path / "config.json")
    return _digest(text + repr(sizes))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
