"""Places that take nothing of what is written to them: for whoever must go on all the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def full_disk() -> Iterator[int]:
    with Path("/dev/full").open("wb") as full:
        yield full.fileno()


@contextlib.contextmanager
def full_pipe_nobody_reads() -> Iterator[int]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    yield writer
    os.close(writer)
    os.close(reader)


def require_mounts() -> None:
    """For a disk of a test's own. Root may mount in a mount namespace of its own; who may not and
    is root all the same, as in a container, is told by this probe and never by the test's outcome.
    """
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    if shutil.which("unshare") and subprocess.run(command, check=False).returncode == 0:
        return
    if os.environ.get("CI"):
        pytest.fail("where every test counts, mounting must be allowed: run as root, with unshare")
    pytest.skip("needs the right to mount")
