"""What ends the launcher beside bad settings, each with its exit code."""

from __future__ import annotations

from common.errors import ProgramError


class NeverReady(ProgramError):
    """A program that ended, or hung, before it had ever answered."""

    exit_code = 3


class NoFreeGpu(ProgramError):
    """Other launchers have the GPUs of this host; that may change."""

    exit_code = 5


class CrashLoop(ProgramError):
    """A program that died more often than the restart budget allows."""

    exit_code = 4
