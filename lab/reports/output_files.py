"""What the programs here write: files whole or not at all, texts that every terminal takes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


class Unwritable(Exception):
    """A file, or standard output, that cannot be written; says which and why."""


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


def accept_every_text() -> None:
    """A terminal's encoding may lack Chinese: what it lacks is shown as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show(lines: Iterable[str]) -> None:
    """On standard output. A reader who has left (`| head`) is no fault, a full disk is one."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise Unwritable(f"cannot write the figures: {error.strerror}") from None


def tame(text: str) -> str:
    """Of a stranger's text: one line that moves no cursor and colours nothing."""
    return _CONTROL.sub(" ", text)
