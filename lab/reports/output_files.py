"""Files that a run leaves: whole or not at all, and tried before the work rather than after it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lab.failures import Unwritable


def ensure_writable(path: Path) -> None:
    """Before an hour's work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(f"cannot write {path}: {path.parent}: {error.strerror}") from None
    if path.is_dir():
        raise Unwritable(f"cannot write {path}: it is a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Unwritable(f"cannot write {path}: permission denied; name another file")


def write_file(path: Path, text: str) -> None:
    """Half a file would be taken for a whole one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        if path.is_file():
            path.unlink(missing_ok=True)
        raise Unwritable(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, content: object) -> None:
    write_file(path, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
