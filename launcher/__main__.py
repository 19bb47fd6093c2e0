"""`python -m launcher COMMAND`: ready for a signal first, then everything else (`commands.py`)."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from common.command_line.interpreter import is_too_old, quick_imports, refuse_interpreter

_ASKED = ("up", "serve")  # to stop these is no failure


def main() -> int:
    words = sys.argv[1:]
    expect_signals(is_asked=bool(words) and words[0] in _ASKED)
    if is_too_old("launcher"):
        return 2
    try:
        # Half a second of imports: until they are done, a Ctrl-C would be a traceback.
        with quick_imports():
            from launcher.commands import run_command  # noqa: PLC0415
    except ModuleNotFoundError as error:
        return refuse_interpreter("launcher", error)

    return run_command(words)


def expect_signals(*, is_asked: bool) -> None:
    """Until the command has handlers of its own, if it has: what runs is undone, without a word."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(0 if is_asked else 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell without job control has its background ignore Ctrl-C: that stays.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


if __name__ == "__main__":
    sys.exit(main())
