"""What a command has to say, on standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from common.errors import SettingsError


def show(lines: Iterable[str]) -> None:
    """A reader who has left (`| head`) is no fault, a full disk is one."""
    if sys.stdout is None:  # closed before the start (`>&-`)
        return
    try:
        for line in lines:
            print(line)  # noqa: T201 (that is what it is for)
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise SettingsError(f"cannot write standard output: {error.strerror}") from None
