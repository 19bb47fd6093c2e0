"""What ends a command of the lab with a line for the user and an exit code.

Faults that a command finds in a server are results, not failures, and are not here.
"""

from __future__ import annotations

from common.errors import ProgramError


class LabFailure(ProgramError):
    """A command cannot do what it was asked for."""

    exit_code = 2


class BadOptions(LabFailure):
    """Options that cannot work together."""


class BadFile(LabFailure, ValueError):
    """A file that holds something else than it should, or cannot be read."""


class Unwritable(LabFailure):
    """A file, or standard output, that cannot be written; says which and why."""


class NoService(LabFailure):
    """Nobody answers, or somebody who is no gateway."""
