"""Sees to it that a folder holds a model: `python3 -m scripts.fetch_model NAME FOLDER`.

What the images' builds and compose.yaml call before an engine starts: a hub's model is fetched, a
model that is there is left alone, and `demo` is the shipped one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import sys
from pathlib import Path

from common.project import DEMO_MODEL
from launcher.models import model_files
from launcher.models.retrying import HubError, retry

DEMO = "demo"
HUB_TOKEN = Path("/run/secrets/hf_token")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelError(Exception):
    """Something the user has to mend; its text says what and how."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="a hub's name, a folder's below FOLDER, or `demo`")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only-from",
        type=Path,
        metavar="MODELS",
        help="copy it if MODELS has a folder of that name; ask no hub",
    )
    parser.add_argument("--hub", choices=("huggingface", "modelscope"), default="huggingface")
    args = parser.parse_args()
    try:
        if args.only_from:
            copy_model(args.name, args.folder, args.only_from)
        else:
            provide_model(args.name, args.folder, args.hub)
    except ModelError as error:
        print(f"model: {error}", file=sys.stderr)
        return 2
    return 0


def check_name(name: str) -> None:
    if not _HUB_NAME.fullmatch(name) or ".." in name.split("/"):
        raise ModelError(f"{name!r} is neither a hub's name (Qwen/Qwen3-0.6B) nor a folder's")


def copy_model(name: str, folder: Path, models: Path) -> None:
    """A folder of somebody's own, if there is one of that name; every user may read the copy."""
    if not name or not (models / name).is_dir():
        return
    check_name(name)
    own, place = models / name, folder / name
    if not model_files.is_complete(own):
        raise ModelError(f"models/{name} cannot be served: {model_files.find_lack(own)}")
    try:
        shutil.copytree(own, place, copy_function=shutil.copyfile)
        for path in (place, *place.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    except (OSError, shutil.Error) as error:
        raise ModelError(f"cannot copy models/{name} to {place}: {error}") from None
    print(f"model: {place} is ready, from models/{name}")


def provide_model(name: str, folder: Path, hub: str) -> None:
    """Fetched aside and moved into place when whole: a folder that is there can be used."""
    if not name:
        print("model: no model wanted")
        return
    check_name(name)
    place = folder / name
    if model_files.is_complete(place):
        print(f"model: {place} is there")
        return
    part = folder / ".part" / name
    try:
        part.mkdir(parents=True, exist_ok=True)
        if name == DEMO:
            shutil.copytree(DEMO_MODEL, part, dirs_exist_ok=True)
        elif "/" in name:
            fetch(name, part, hub)
        else:
            raise ModelError(
                f"there is no model in {place}; put one there (for an image: into models/{name} "
                "before it is built), or name one of a hub"
            )
        if not model_files.is_complete(part):
            raise ModelError(f"what the hub has as {name} is no model with weights")
        shutil.rmtree(part / ".cache", ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        part.rename(place)
    except OSError as error:
        raise ModelError(
            f"cannot put the model into {place} ({error.strerror}: {error.filename}); user "
            f"{os.getuid()} must be allowed to write there, or put it there yourself"
        ) from None
    print(f"model: {place} is ready")


def fetch(name: str, into: Path, hub: str) -> None:
    if not os.environ.get("HF_ENDPOINT"):  # empty from a compose file; the hub's client minds
        os.environ.pop("HF_ENDPOINT", None)

    def download() -> None:
        if hub == "modelscope":
            importlib.import_module("modelscope").snapshot_download(name, local_dir=str(into))
            return
        importlib.import_module("huggingface_hub").snapshot_download(
            name, local_dir=into, ignore_patterns=model_files.NOT_WEIGHTS, token=token
        )

    token = read_token() if hub == "huggingface" else None
    print(f"model: fetching {name} from {hub}", flush=True)
    try:
        retry(download, _tell)
    except HubError as error:
        raise ModelError(f"cannot get {name} from {hub}: {error}") from None


def _tell(what: str, pause_s: float) -> None:
    print(f"model: {what}; trying again in {pause_s:.0f} s", flush=True)


def read_token() -> str | None:
    """From a secret of the build or of compose; never from an argument, which an image keeps."""
    try:
        text = HUB_TOKEN.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ModelError(
            f"cannot read the file HF_TOKEN_FILE ({reason}); user {os.getuid()} must be allowed to"
        ) from None
    return text or os.environ.get("HF_TOKEN") or None


if __name__ == "__main__":
    sys.exit(main())
