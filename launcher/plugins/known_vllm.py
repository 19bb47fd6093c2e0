"""Whether the installed vLLM is one that the decode scheduler was written and tested against.

It rides on classes that vLLM calls non-public, so a name that still exists proves nothing: the very
files it stands in for or relies on are compared, by one digest a version (`known_vllm.toml`).
Asked twice, by the launcher before it plans and by the engine before it obeys, and free of vLLM:
importing that costs the launcher seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DATA = Path(__file__).with_suffix(".toml")


def find_difference(version: str, folder: Path | None = None) -> str:
    """Why this vLLM is none of those known, in words for a user; empty: it is one of them."""
    data = read_known()
    known = {row["version"]: row["digest"] for row in data["known"]}
    if version not in known:
        return f"vLLM {version} is not among the versions it was tried with ({', '.join(known)})"
    folder = folder or find_vllm_folder()
    if folder is None:
        return ""  # planned for only: the engine looks again where it runs
    if digest_files(folder, data["files"]) != known[version]:
        return f"this vLLM {version} has another scheduler than the one released"
    return ""


def read_known() -> dict[str, Any]:
    return tomllib.loads(_DATA.read_text(encoding="utf-8"))


def digest_files(folder: Path, files: Sequence[str]) -> str:
    """One name for all of them; a file that is missing changes it as another text does."""
    total = hashlib.sha256()
    for name in files:
        file = folder / name
        content = file.read_bytes() if file.is_file() else b"missing"
        total.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()[:32]


def find_vllm_folder() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    return next((Path(folder) for folder in folders or ()), None)
