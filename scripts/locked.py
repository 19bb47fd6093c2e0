"""What uv.lock pins for one environment, as requirements that pip installs.

`python -m scripts.locked [EXTRA…]` prints them for the Python that runs it. pip installs them, not
uv: that fetches a lock's files from where they were when it was written, so that neither a mirror
nor a folder of wheels would do. Needs nothing but Python and its pip.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pip._vendor.packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "vllm-gateway"
_FORMAT = 1
# The CPU build of torch comes from another index (requirements/torch-cpu.txt). The plain build's
# libraries are gigabytes that it does not need, and the plain index's builds of the three others do
# not match it and break its imports; a text model needs none of them.
_TORCH = "torch"
_NOT_WITH_CPU_TORCH = ("torchaudio", "torchcodec", "torchvision")
_OF_CUDA_TORCH = ("cuda-", "nvidia-", "triton")

Table = Mapping[str, Any]


class LockError(Exception):
    """A lock that does not hold what is asked of it."""


@dataclass(frozen=True, order=True)
class Pin:
    """One package at one version, with the hash of each of its files."""

    name: str
    version: str
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([f"{self.name}=={self.version}", *(f"--hash={one}" for one in self.hashes)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="of the project's, in pyproject")
    parser.add_argument("--only", metavar="NAME", help="one package and what it needs, no project")
    args = parser.parse_args()
    packages = read_lock()
    try:
        pins = select_pins(packages, args.extras, root=args.only or PROJECT)
    except LockError as error:
        print(f"locked: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, pins)))
    return 0


def read_lock(path: Path = ROOT / "uv.lock") -> Sequence[Table]:
    lock = tomllib.loads(path.read_text(encoding="utf-8"))
    if lock["version"] != _FORMAT:
        raise LockError(f"{path.name} has format {lock['version']}; this reads {_FORMAT}")
    packages: Sequence[Table] = lock["package"]
    return packages


def select_pins(
    packages: Sequence[Table], extras: Iterable[str] = (), *, root: str = PROJECT
) -> list[Pin]:
    """What this Python on this machine needs for `root` with these extras of it."""
    by_name: dict[str, list[Table]] = {}
    for package in packages:
        by_name.setdefault(package["name"], []).append(package)
    waiting = [(root, extra) for extra in ("", *extras)]
    left_out = _NOT_WITH_CPU_TORCH if (PROJECT, "cpu") in waiting else ()
    seen: set[tuple[str, str]] = set()
    found: dict[str, Pin] = {}
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name in left_out:
            continue
        seen.add((name, extra))
        package = _choose(by_name.get(name, []), name)
        is_cpu_torch = bool(left_out) and name == _TORCH
        if name != PROJECT and not is_cpu_torch:
            found[name] = _read_pin(package)
        for edge in _list_edges(package, extra):
            if not (is_cpu_torch and edge["name"].startswith(_OF_CUDA_TORCH)):
                waiting += [(edge["name"], more) for more in ("", *edge.get("extra", ()))]
    return sorted(found.values())


def _list_edges(package: Table, extra: str) -> Iterator[Table]:
    edges = package.get("dependencies", ())
    if extra:
        # One that a package does not have is no mistake of its caller's: pip ignores it, too.
        edges = package.get("optional-dependencies", {}).get(extra, ())
        if package["name"] == PROJECT and not edges:
            raise LockError(f"{PROJECT} has no extra {extra}")
    for edge in edges:
        if "marker" not in edge or Marker(edge["marker"]).evaluate():
            yield edge


def _choose(candidates: Sequence[Table], name: str) -> Table:
    """A package may be locked at several versions, each for some Pythons or machines."""
    fitting = [
        one
        for one in candidates
        if not (markers := one.get("resolution-markers"))
        or any(Marker(marker).evaluate() for marker in markers)
    ]
    if len(fitting) != 1:
        raise LockError(f"uv.lock has {len(fitting)} versions of {name} for this Python")
    return fitting[0]


def _read_pin(package: Table) -> Pin:
    files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
    return Pin(package["name"], package["version"], tuple(sorted({file["hash"] for file in files})))


if __name__ == "__main__":
    sys.exit(main())
