"""What can end the launcher, each with its exit code; the text is the one line the user sees."""

from __future__ import annotations


class LauncherError(Exception):
    """Ends the launcher: `launcher: <text>`, then `exit_code`."""

    exit_code = 1


class SettingsError(LauncherError):
    """A setting, flag, model or port that cannot work; nothing was started."""

    exit_code = 2


class NeverReady(LauncherError):
    """A program that ended, or hung, before it had ever answered."""

    exit_code = 3


class CrashLoop(LauncherError):
    """A program that died more often than the restart budget allows."""

    exit_code = 4
