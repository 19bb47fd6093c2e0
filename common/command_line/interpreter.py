"""What a program says in a Python that cannot run it: one without the project's packages, or too
old a one; and how it imports the rest of itself. Imports nothing that such a Python has not.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OLDEST = (3, 11)
_OWN = ("common", "gateway", "lab", "launcher")
# What httpx and structlog import where it happens to be installed, as vLLM has it: httpx's own
# command line, and Rich with all that it draws. No program here shows any of it.
_OF_NO_USE = ("httpx._main", "rich")


@contextmanager
def quick_imports() -> Iterator[None]:
    """A sixth less work at each start: without what nobody uses, and without looking for garbage
    among modules, which are none.
    """
    left_out = [name for name in _OF_NO_USE if name not in sys.modules]
    sys.modules.update(dict.fromkeys(left_out))  # type: ignore[arg-type]  # None: not to be had
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in left_out:
            del sys.modules[name]
        if was_enabled:
            gc.enable()


def is_too_old(program: str) -> bool:
    """And says so."""
    if sys.version_info >= _OLDEST:
        return False
    _refuse(program, f"is Python {sys.version.split()[0]}; 3.11 is the oldest that does")
    return True


def refuse_interpreter(program: str, error: ModuleNotFoundError) -> int:
    """A shell without the project's environment is the commonest mistake of a first day. A module
    of ours that is missing is another one, and no user's.
    """
    if str(error.name).partition(".")[0] in _OWN:
        raise error
    return _refuse(program, f"has no {error.name}")


def _refuse(program: str, reason: str) -> int:
    folder = Path(__file__).resolve().parents[2]
    python = folder / ".venv" / "bin" / "python"
    is_checkout = (folder / "Makefile").is_file()
    advice = "install the package into it (`pip install vllm-gateway`), or use the one that has it"
    if python.is_file():
        advice = f"use the project's own: {python} -m {program}"
    elif is_checkout:
        advice = "`make setup` makes one that does, as .venv/bin/python"
    print(f"{program}: {sys.executable} {reason}; {advice}", file=sys.stderr)
    return 2
