#!/usr/bin/env python3
"""What goes into the container images beside the two programs: missing packages, and a model.

`packages` needs nothing but Python and pip.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = "demo"
HUB_TOKEN = Path("/run/secrets/hf_token")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PIN = re.compile(r"^([\w.-]+)==([^\s\\;]+)")
_FLOOR = re.compile(r"^([\w.-]+)>=([\d.]+)")


class ImageError(Exception):
    """Something the user has to mend; its text says what and how."""


def main() -> int:
    args = parse_arguments()
    try:
        if args.command == "packages":
            add_packages(args.lock)
        else:
            provide_model(args.name, args.folder, args.hub)
    except ImageError as error:
        print(f"image: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packages = commands.add_parser(
        "packages", help="add what a lock file names and this Python lacks, and nothing else"
    )
    packages.add_argument("lock", type=Path)
    model = commands.add_parser(
        "model", help="see to it that FOLDER/NAME holds a model; 'demo' is the shipped one"
    )
    model.add_argument("name")
    model.add_argument("folder", type=Path)
    model.add_argument("--hub", choices=("huggingface", "modelscope"), default="huggingface")
    return parser.parse_args()


# --- packages: on top of an image that has its own, tested together ---


def add_packages(lock: Path) -> None:
    """Installs the pins that are lacking, by hash; what the image has stays as it is."""
    text = lock.read_text(encoding="utf-8")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    floors = read_floors(pyproject)
    installed = list_installed()
    lacking = find_lacking(text, floors, installed)
    if lacking:
        complaints = list_complaints()
        install(lacking)
        if worse := sorted(list_complaints() - complaints):
            raise ImageError(f"this image's packages no longer fit together: {'; '.join(worse)}")
    # Told from what is there now: an entry may be for another platform.
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
    lock: str, floors: Mapping[str, str], installed: Mapping[str, str]
) -> dict[str, str]:
    """The lock's entries, by name, that are not installed or older than what is asked for.

    A newer one is left alone: what came with vLLM was tested with vLLM.
    """
    lacking = {}
    for entry in re.split(r"\n(?=[\w])", lock):
        found = _PIN.match(entry)
        if not found:
            continue
        name = fold(found[1])
        has, least = installed.get(name), floors.get(name, "0")
        if has is None or release(has) < release(least):
            lacking[name] = entry.rstrip()
    return lacking


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


def install(lacking: Mapping[str, str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lacking.values()) + "\n")
        file.flush()
        options = ("--no-deps", "--require-hashes", "--no-cache-dir", "--quiet")
        result = run_pip("install", *options, "-r", file.name)
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


# --- a model ---


def provide_model(name: str, folder: Path, hub: str) -> None:
    """Fetched aside and moved into place when whole: a folder that is there can be used."""
    sys.path.insert(0, str(ROOT))
    weights = importlib.import_module("launcher.models.files")
    if not name:
        print("image: no model wanted")
        return
    if not _HUB_NAME.fullmatch(name) or ".." in name.split("/"):
        raise ImageError(f"{name!r} is neither a hub's name (Qwen/Qwen3-0.6B) nor a folder's")
    place = folder / name
    if weights.is_complete(place):
        print(f"image: {place} is there")
        return
    part = folder / ".part" / name
    try:
        part.mkdir(parents=True, exist_ok=True)
        if name == DEMO:
            shutil.copytree(ROOT / "demo" / "model", part, dirs_exist_ok=True)
        elif "/" in name:
            fetch(name, part, hub)
        else:
            raise ImageError(f"there is no model in {place}; put one there, or name one of a hub")
        if not weights.is_complete(part):
            raise ImageError(f"what the hub has as {name} is no model with weights")
        shutil.rmtree(part / ".cache", ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        part.rename(place)
    except OSError as error:
        raise ImageError(
            f"cannot put the model into {place} ({error.strerror}: {error.filename}); user "
            f"{os.getuid()} must be allowed to write there, or put it there yourself"
        ) from None
    print(f"image: {place} is ready")


def fetch(name: str, into: Path, hub: str) -> None:
    if not os.environ.get("HF_ENDPOINT"):  # empty from a compose file; the hub's client minds
        os.environ.pop("HF_ENDPOINT", None)
    weights = importlib.import_module("launcher.models.files")
    print(f"image: fetching {name} from {hub}", flush=True)
    try:
        if hub == "modelscope":
            importlib.import_module("modelscope").snapshot_download(name, local_dir=str(into))
        else:
            importlib.import_module("huggingface_hub").snapshot_download(
                name,
                local_dir=into,
                ignore_patterns=weights.NOT_WEIGHTS,
                token=read_token(),
            )
    except Exception as error:  # noqa: BLE001  (the hubs' trees of errors have no root in common)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImageError(f"cannot get {name} from {hub}: {reason}") from None


def read_token() -> str | None:
    """From a secret of the build or of compose; never from an argument, which an image keeps."""
    try:
        text = HUB_TOKEN.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ImageError(
            f"cannot read the file HF_TOKEN_FILE ({reason}); user {os.getuid()} must be allowed to"
        ) from None
    return text or os.environ.get("HF_TOKEN") or None


if __name__ == "__main__":
    sys.exit(main())
