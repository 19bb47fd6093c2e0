"""As much of `docker` as the judge at home uses: a container is a judged server of the tests' own.

`FAKE_DOCKER` names a folder for its state; words in the file `behaves` there make it go wrong. The
real docker runs the same commands in tests/stack.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_DOCKER"])
# Each test's own: another checkout's tests may run beside these.
ADDRESS = "127.77.{}.{}".format(*hashlib.sha256(str(FOLDER).encode()).digest()[:2])


def main(words: list[str]) -> int:
    behaves = (FOLDER / "behaves").read_text().split()
    with (FOLDER / "calls").open("a") as calls:
        calls.write(" ".join(words) + "\n")
    match words:
        case ["build", *_]:
            sys.stdout.write("no such model\n" if "fails_to_build" in behaves else "built\n")
            return int("fails_to_build" in behaves)
        case ["run", *_]:
            if "ends" not in behaves:
                start(["--host", ADDRESS, "--port", "8000"])
            return 0
        case ["inspect", _]:
            sys.stdout.write(json.dumps([describe(behaves)]))
        case ["logs", _]:
            sys.stdout.write("what the container said\n")
        case ["rm", *_] if (FOLDER / "pid").exists():
            os.kill(int((FOLDER / "pid").read_text()), signal.SIGTERM)
            (FOLDER / "pid").unlink()
    return 0


def start(options: list[str]) -> None:
    command = [sys.executable, "-m", "tests.lab.judged", *options]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
    (FOLDER / "pid").write_text(str(process.pid))


def describe(behaves: list[str]) -> dict[str, object]:
    runs = (FOLDER / "pid").exists()
    health = "unhealthy" if "unhealthy" in behaves else "healthy"
    state = {"Running": runs, "ExitCode": 0 if runs else 3, "Health": {"Status": health}}
    networks = {"vllm-gateway-judged": {"IPAddress": ADDRESS}}
    return {"State": state, "NetworkSettings": {"Networks": networks}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
