"""What ends a program with one line and an exit code; each program adds its own kinds."""

from __future__ import annotations

from typing import ClassVar


class ProgramError(Exception):
    """Ends the program: `<its name>: <text>`, then `exit_code`."""

    exit_code: ClassVar[int] = 1


class SettingsError(ProgramError):
    """A setting, flag, file or port that cannot work; nothing was started."""

    exit_code = 2
