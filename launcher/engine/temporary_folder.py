"""The engine's temporary folder: made for each start, and gone when nothing of the engine is left.

vLLM's processes speak over sockets in the temporary folder, and one that is killed leaves them
there, for ever. By a state folder there is one engine, so its temporary folder needs no record: the
next launcher finds by the name what a killed one has left.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from pathlib import Path

_LONGEST_SOCKET = 107  # bytes of a path that the kernel takes
# What is made in it: a UUID, or a folder and a socket of Python's multiprocessing.
_ROOM = 48
_SHORT = Path("/tmp")  # noqa: S108 — where every engine's sockets fit


def find_temporary_folder(state: Path) -> Path:
    """Not in the state folder itself, whose path may be too long for a socket."""
    name = f"vllm-{hashlib.sha256(bytes(state.absolute())).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / name
    return folder if len(bytes(folder)) + _ROOM <= _LONGEST_SOCKET else _SHORT / name


def make_temporary_folder(folder: Path) -> None:
    """Anew and for this user alone; OSError where somebody else has made one of that name."""
    remove_temporary_folder(folder)
    folder.mkdir(mode=0o700)


def remove_temporary_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # gone already, or not ours
        shutil.rmtree(folder)
