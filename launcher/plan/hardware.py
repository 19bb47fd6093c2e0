"""What the engine runs on: the GPU or CPU found here, or one named for planning."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from common.settings import suggest

GIB = 2**30
_GPUS = Path(__file__).parent / "gpus.toml"
_QUERY_S = 20.0  # it takes seconds where a GPU is ill
_END_S = 1.0
_COUNT = re.compile(r"^\s*\d+\s*x\s*", re.IGNORECASE)
_ANY_CARD = re.compile(r"(\d+(?:\.\d+)?)\s*GiB[\s,]+sm_?(\d{2,3})[a-z]?", re.IGNORECASE)
# What nvidia-smi puts around a name and tells no cards apart.
_ADORNMENT = re.compile(
    r"nvidia|geforce|tesla|sxm\d?|pcie|hbm\de?|blackwell|workstation|server|edition"
)
_SIZE = re.compile(r"(\d+)gi?b")
_NEAR = 0.1
_QUERY = "name,memory.total,memory.used,compute_cap,driver_version"


@dataclass(frozen=True)
class Device:
    """One kind of device and how many of it the engine may use."""

    name: str
    generation: str  # "sm_90", or "cpu": the section of a profile that applies
    memory_bytes: int  # of one device; for a CPU the host's memory
    count: int = 1
    driver: str = ""
    used_bytes: int = 0
    cores: int = 0  # of the host, those this process may use; 0: not known, a device only named
    shared_bytes: int = 0  # room for shared memory between processes; 0: not known

    @property
    def is_gpu(self) -> bool:
        return self.generation != "cpu"

    @property
    def title(self) -> str:
        many = f"{self.count}x " if self.count > 1 else ""
        return f"{many}{self.name} ({self.memory_bytes / GIB:.0f} GiB, {self.generation})"


def find_device(wanted: str, *, engine_build: str, gpus: Sequence[str] = ()) -> Device:
    """The device named by the setting `gpu`; else what this host and this vLLM can use, of its GPUs
    those that are named.
    """
    if wanted:
        return parse_device(wanted)
    if engine_build == "cpu":
        return read_cpu()
    return read_gpu(",".join(gpus) or os.environ.get("CUDA_VISIBLE_DEVICES")) or read_cpu()


def parse_device(text: str) -> Device:
    """`H200`, `4x RTX 4090`, a name as nvidia-smi prints it, `24GiB sm_89` or `cpu`."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(.+?)\s*", text, re.IGNORECASE)
    count, name = (int(match[1] or 1), match[2]) if match else (1, text)
    if count < 1:
        raise SettingsError(f"LAUNCHER_GPU: {text!r} is no GPU at all; name one or more")
    if name.lower() == "cpu":
        return read_cpu()
    if card := _ANY_CARD.fullmatch(name):
        capability = f"{card[2][:-1]}.{card[2][-1]}"
        size = float(card[1])
        title = f"GPU of {size:g} GiB"
        return Device(title, generation_of(capability), int(size * GIB), count)
    row = next((row for row in list_gpus() if _is_called(row, name)), None)
    if row is None:
        names = ", ".join(row["name"] for row in list_gpus())
        words = " ".join(word for word in _split_name(name) if not _ADORNMENT.fullmatch(word))
        near = suggest(words.upper(), [row["name"] for row in list_gpus()])
        raise SettingsError(
            f"LAUNCHER_GPU: no GPU {name!r} is known{near} (known: {names}; any other by "
            "its memory and compute capability, as `24GiB sm_89`)"
        )
    return Device(row["name"], row["generation"], int(row["memory_gib"] * GIB), count)


def change_count(text: str, count: int) -> str:
    """So many of the device that the user named, in their own words: `parse_device` reads them."""
    return f"{count}x {_COUNT.sub('', text)}"


def list_gpus() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tomllib.loads(_GPUS.read_text())["gpu"]
    return rows


def _is_called(row: Mapping[str, Any], name: str) -> bool:
    """Whether nvidia-smi may print that GPU's name so: with its maker, its bus, its memory. A word
    that is none of these makes it another one: an `RTX 4090 Laptop GPU` has 16 GiB.
    """
    own = _split_name(row["name"])
    if "".join(own) == "".join(_split_name(name)):
        return True
    words = _split_name(name)
    if not set(own) <= set(words):
        return False
    for word in set(words) - set(own):
        size = _SIZE.fullmatch(word)
        if size and abs(int(size[1]) - row["memory_gib"]) > _NEAR * row["memory_gib"]:
            return False
        if not size and not _ADORNMENT.fullmatch(word):
            return False
    return True


def _split_name(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def read_cpu() -> Device:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("CPU", "cpu", min(pages, _memory_limit() or pages), cores=count_cores())


def read_gpu(visible: str | None) -> Device | None:
    """The first GPU that the engine would see, by nvidia-smi; None without one."""
    rows = asyncio.run(query_gpus(_QUERY))
    if visible is not None:
        chosen = [part.strip() for part in visible.split(",") if part.strip()]
        rows = [rows[int(part)] for part in chosen if part.isdigit() and int(part) < len(rows)]
    if not rows:
        return None
    name, total, used, capability, driver = rows[0]
    return Device(
        name.removeprefix("NVIDIA ").strip(),
        generation_of(capability),
        int(total) * 2**20,
        len(rows),
        driver,
        int(used) * 2**20,
        count_cores(),
        _read_shared_bytes(),
    )


async def query_gpus(fields: str, *, timeout_s: float = _QUERY_S) -> list[list[str]]:
    """A row a GPU, by nvidia-smi; none without it. Given up, it leaves no process behind."""
    try:
        process = await asyncio.create_subprocess_exec(
            "nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits",
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return []
    try:
        async with asyncio.timeout(timeout_s):
            out, _ = await process.communicate()
    except TimeoutError:
        return []
    finally:
        if process.returncode is None:
            process.kill()
            with contextlib.suppress(TimeoutError):  # an ill GPU may keep it from ending
                await asyncio.wait_for(process.wait(), _END_S)
    rows = [[cell.strip() for cell in line.split(",")] for line in out.decode().splitlines()]
    # A line of another form is a remark of nvidia-smi's, not a GPU.
    return [row for row in rows if process.returncode == 0 and len(row) == fields.count(",") + 1]


def generation_of(capability: str) -> str:
    """A profile's sections are per generation: 8.6 is served by what is known of 8.0."""
    major, _, minor = capability.partition(".")
    if major == "8":
        return "sm_89" if minor == "9" else "sm_80"
    return {"9": "sm_90", "10": "sm_100", "11": "sm_100", "12": "sm_120"}.get(major, "sm_80")


def count_cores() -> int:
    """Affinity and the container's quota: a thread without a core stalls all the others."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _read_shared_bytes() -> int:
    """Containers have 64 MiB of it unless told otherwise."""
    try:
        room = os.statvfs("/dev/shm")  # noqa: S108 - no file is put there
    except OSError:
        return 0
    return room.f_blocks * room.f_frsize


def _memory_limit() -> int | None:
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
