"""`python -m launcher COMMAND`: ready for a signal first, then everything else (`commands.py`)."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

_ASKED = ("up", "serve")  # to stop these is no failure
_OLDEST = (3, 11)
_OWN = ("common", "gateway", "launcher")


def main() -> int:
    words = sys.argv[1:]
    expect_signals(is_asked=bool(words) and words[0] in _ASKED)
    if sys.version_info < _OLDEST:
        return refuse_interpreter(
            f"is Python {sys.version.split()[0]}; 3.11 is the oldest that does"
        )
    try:
        # Half a second of imports: until they are done, a Ctrl-C would be a traceback.
        from launcher.commands import run_command  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in _OWN:
            raise
        return refuse_interpreter(f"has no {error.name}")

    return run_command(words)


def refuse_interpreter(reason: str) -> int:
    """A shell without the project's environment is the commonest mistake of a first day."""
    folder = Path(__file__).resolve().parent.parent
    python = folder / ".venv" / "bin" / "python"
    is_checkout = (folder / "Makefile").is_file()
    advice = "install the package into it (`pip install vllm-gateway`), or use the one that has it"
    if python.is_file():
        advice = f"use the project's own: {python} -m launcher"
    elif is_checkout:
        advice = "`make setup` makes one that does, as .venv/bin/python"
    print(f"launcher: {sys.executable} {reason}; {advice}", file=sys.stderr)
    return 2


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
