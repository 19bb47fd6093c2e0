"""What an image with vLLM lacks for the project: listed from the lock, and added, nothing else.

`python3 -m scripts.image_packages list` prints the pins that are absent or too old, `add FILE`
installs them. Two steps, so that a build that finds the same pins lacking as the last one keeps
what stands on them. Needs nothing but Python and its pip.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from scripts.locked import ROOT, LockError, Pin, read_lock, select_pins

_EXTRAS = ("modelscope", "otel")
_FLOOR = re.compile(r"^([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)")


class ImageError(Exception):
    """Something the user has to mend; its text says what and how."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the pins that this Python lacks, one a line")
    add = commands.add_parser("add", help="install them, by hash; what is there stays as it is")
    add.add_argument("file", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "add":
            add_packages(args.file)
        else:
            print("\n".join(map(str, list_lacking())))
    except (ImageError, LockError) as error:
        print(f"image: {error}", file=sys.stderr)
        return 2
    return 0


def list_lacking() -> list[Pin]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return find_lacking(select_pins(read_lock(), _EXTRAS), read_floors(pyproject), list_installed())


def add_packages(file: Path) -> None:
    installed = list_installed()
    if file.read_text(encoding="ascii").strip():
        complaints = list_complaints()
        install(file)
        if worse := sorted(list_complaints() - complaints):
            raise ImageError(f"this image's packages no longer fit together: {'; '.join(worse)}")
    importlib.invalidate_caches()
    added = {name: now for name, now in list_installed().items() if installed.get(name) != now}
    for name, now in sorted(added.items()):
        print(
            f"image: {name} {installed[name]} -> {now}"
            if name in installed
            else f"image: {name} {now}"
        )
    print(f"image: {len(added)} packages added, {len(installed)} were there")


def find_lacking(
    pins: Iterable[Pin], floors: Mapping[str, str], installed: Mapping[str, str]
) -> list[Pin]:
    """The pins that are not installed or older than what is asked for.

    A newer one is left alone: what came with vLLM was tested with vLLM.
    """
    return [
        pin
        for pin in pins
        if pin.name not in installed
        or release(installed[pin.name]) < release(floors.get(pin.name, "0"))
    ]


def read_floors(pyproject: Mapping[str, dict[str, list[str]]]) -> dict[str, str]:
    rows = (_FLOOR.match(line) for line in pyproject["project"]["dependencies"])
    return {fold(found[1]): found[2] for found in rows if found}


def list_installed() -> dict[str, str]:
    return {
        fold(one.metadata["Name"]): one.version
        for one in importlib.metadata.distributions()
        if one.metadata["Name"]
    }


def list_complaints() -> set[str]:
    """What pip says does not fit; an image may come with some of its own."""
    result = run_pip("check")
    return set(result.stdout.splitlines()) if result.returncode else set()


def install(file: Path) -> None:
    options = (
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
        "--quiet",
    )
    result = run_pip("install", *options, "-r", str(file))
    if result.returncode:
        raise ImageError(f"pip could not install: {result.stderr.strip()[-800:]}")


def run_pip(*words: str) -> subprocess.CompletedProcess[str]:
    # A distribution's Python refuses pip for the host's sake; here the image is the environment.
    environment = os.environ | {
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "pip", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def fold(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    found = re.match(r"[\d.]*\d", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


if __name__ == "__main__":
    sys.exit(main())
