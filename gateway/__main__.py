"""`python -m gateway`: what it does is in `commands.py`."""

from __future__ import annotations

import sys

from common.command_line.interpreter import is_too_old, quick_imports, refuse_interpreter


def main() -> int:
    if is_too_old("gateway"):
        return 2
    try:
        with quick_imports():
            from gateway.commands import run_command  # noqa: PLC0415 — it needs packages
    except ModuleNotFoundError as error:
        return refuse_interpreter("gateway", error)
    return run_command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
