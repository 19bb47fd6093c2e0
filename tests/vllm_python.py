"""A Python that has imported vLLM: a program that is run by it runs in a fork of it.

Importing vLLM takes ten seconds of a core, which ten tests need not spend each. A program prints,
ends and sees its environment as with an interpreter of its own, but for what vLLM reads of that
while it is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
_READY = "ready"
_MODULES = (
    "vllm.benchmarks.serve",
    "vllm.engine.arg_utils",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.multimodal.media.connector",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.executor",
)


class VllmPython:
    """`run` is called as `subprocess.run` is."""

    def __enter__(self) -> VllmPython:
        told = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            cwd=ROOT,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", **told},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read(_READY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(
        self,
        command: Sequence[str],
        *,
        input: str = "",  # noqa: A002
        env: Mapping[str, str] | None = None,
        **_: Any,
    ) -> subprocess.CompletedProcess[str]:
        """`command` begins with this interpreter."""
        assert command[0] == sys.executable
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "in").write_text(input, encoding="utf-8")
            order = {
                "words": list(command[1:]),
                "environment": dict(os.environ if env is None else env),
                "folder": name,
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            code = int(self._read())
            out, err = ((folder / one).read_text(encoding="utf-8") for one in ("out", "err"))
        return subprocess.CompletedProcess(list(command), code, out, err)

    def _read(self, expected: str = "") -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the Python that has imported vLLM ended"
        assert expected in ("", line)
        return line


def main() -> None:
    """An order a line; its exit code is the answer."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes there while it is imported
    for name in _MODULES:
        importlib.import_module(name)
    print(_READY, file=said, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(run_program(**order))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=said, flush=True)


def run_program(words: list[str], environment: dict[str, str], folder: str) -> int:
    """As the interpreter does it with these words: `-P FILE`, `-c CODE` or `-m MODULE`."""
    code: object = 1
    try:
        for number, name in enumerate(("in", "out", "err")):
            flags = os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(f"{folder}/{name}", flags), number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        kind, what, *sys.argv[1:] = words
        if kind == "-m":
            sys.path.insert(0, str(ROOT))
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(what, {"__name__": "__main__"})  # noqa: S102
        else:
            runpy.run_path(what, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)  # noqa: T201
    except BaseException:  # noqa: BLE001  (as an interpreter ends)
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    main()
