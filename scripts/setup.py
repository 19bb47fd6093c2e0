"""Makes the virtual environment that everything else runs in, from the lock.

Called by `make`; needs nothing but a Python with `venv`. It picks the engine for this machine (the
CUDA build of vLLM where an NVIDIA GPU answers, the CPU build elsewhere) and does nothing at all
when the environment is already what the lock says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "uv.lock"
PROJECT = ROOT / "pyproject.toml"
# The CPU build of torch, which is on another index than everything else.
CPU_TORCH = ROOT / "requirements" / "torch-cpu.txt"
SUPPORTED = ("3.11", "3.12", "3.13")
TORCH_INDEX_URL = "https://download.pytorch.org/whl/cpu"
_COMMAND = """\
#!{python}
import sys

sys.path.append({root!r})  # last, so that nothing of a checkout hides a package
from {module} import {function}

sys.exit({function}())
"""


class SetupError(Exception):
    """Something the user has to mend; its text says what and how."""

    code = 2


class NoPython(SetupError):
    code = 77  # as scripts/system.sh ends for what cannot be had here


def main() -> int:
    args = parse_arguments()
    try:
        python = find_python(args.python)
        engine = args.engine if args.engine != "auto" else ("cuda" if has_gpu() else "cpu")
        build_environment(Path(args.venv), python, engine, dev=args.dev)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return error.code
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="where the environment goes")
    parser.add_argument("--python", help="a version (3.12) or an interpreter")
    parser.add_argument(
        "--engine",
        choices=("auto", "cpu", "cuda", "none"),
        default="auto",
        help="which vLLM; none: gateway and launcher only",
    )
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    return parser.parse_args()


def find_python(wanted: str | None) -> str:
    """The first interpreter that really runs: a version manager's shim may exist and refuse."""
    if wanted and wanted not in SUPPORTED:
        candidates = [wanted]
    elif wanted:
        candidates = [f"python{wanted}"]
    else:
        candidates = [*(f"python{version}" for version in SUPPORTED), "python3"]
    found = []
    for candidate in candidates:
        for path in installed(candidate):
            version = version_of(path)
            if version in SUPPORTED:
                return path
            if version:
                found.append(f"{path} is {version}")
    seen = f" ({', '.join(found)})" if found else ""
    raise NoPython(
        f"no Python {' or '.join([wanted] if wanted else list(SUPPORTED))} found{seen}. "
        "Install one, or name it: make PYTHON=/path/to/python …"
    )


def installed(name: str) -> list[str]:
    """Where `name` may be: on the PATH, and where pyenv keeps versions it does not put there."""
    paths = [found] if (found := shutil.which(name)) else []
    if re.fullmatch(r"python3\.\d+", name):
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        paths += sorted(map(str, pyenv.glob(f"{name.removeprefix('python')}.*/bin/{name}")))
    return paths


def version_of(python: str) -> str | None:
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def has_gpu() -> bool:
    try:
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)  # noqa: S607
    except OSError:
        return False
    return result.returncode == 0 and "GPU 0" in result.stdout


@dataclass
class Record:
    """What an environment holds: its pins, and the states that it is complete for."""

    pins: list[str] = field(default_factory=list)
    complete: list[str] = field(default_factory=list)

    @staticmethod
    def read(venv: Path) -> Record:
        try:
            return Record(**json.loads((venv / "setup.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Record()

    def write(self, venv: Path) -> None:
        (venv / "setup.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


def build_environment(venv: Path, python: str, engine: str, *, dev: bool) -> None:
    state = fingerprint(python, engine, dev=dev)
    record = Record.read(venv)
    if state in record.complete and (venv / "bin" / "python").exists():
        return
    started = time.monotonic()
    say(f"{venv.name}: {engine} engine, {python}" + (", with test tools" if dev else ""))
    extras = [] if engine == "none" else [engine]
    if not (venv / "bin" / "python").exists() or not is_kept(venv, python, extras, record):
        # Nothing is mended in place: leftovers of another engine or Python break imports.
        shutil.rmtree(venv, ignore_errors=True)
        run([python, "-m", "venv", str(venv)], "could not make a virtual environment")
        record = Record()
    pins = select(venv, [*extras, *["dev"] * dev])
    for title, missing in (
        ("torch", [pin for pin in pins if is_torch(pin) and pin not in record.pins]),
        ("packages", [pin for pin in pins if not is_torch(pin) and pin not in record.pins]),
    ):
        if missing:
            install(venv, missing, title)
            record.pins += missing
            record.write(venv)
    write_commands(venv)
    record.complete.append(state)
    record.write(venv)
    say(f"{venv.name}: done in {time.monotonic() - started:.0f} s")


def fingerprint(python: str, engine: str, *, dev: bool) -> str:
    wanted = f"{version_of(python)} {engine} {dev} {ROOT}".encode()
    files = (LOCK, CPU_TORCH, PROJECT)
    return hashlib.sha256(b"\0".join([wanted, *(file.read_bytes() for file in files)])).hexdigest()


def is_kept(venv: Path, python: str, extras: Sequence[str], record: Record) -> bool:
    """What is there was made by this Python and is still wanted, with the test tools or without."""
    if version_of(str(venv / "bin" / "python")) != version_of(python) or not record.pins:
        return False
    return set(record.pins) <= set(select(venv, [*extras, "dev"]))


def select(venv: Path, extras: Sequence[str]) -> list[str]:
    """One requirement a line, as the environment's own Python needs them."""
    command = [str(venv / "bin" / "python"), "-m", "scripts.locked", *extras]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SetupError(f"cannot read {LOCK.name}: {result.stderr.strip()[-600:]}")
    pins = result.stdout.splitlines()
    return [*read_cpu_torch(), *pins] if "cpu" in extras else pins


def read_cpu_torch() -> list[str]:
    text = CPU_TORCH.read_text(encoding="utf-8").replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if not line.startswith("#")]


def is_torch(pin: str) -> bool:
    return pin.startswith("torch==") and "+cpu" in pin


def install(venv: Path, pins: Sequence[str], title: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
        pip += ["--no-deps", "--require-hashes", "-r", file.name]
        if title != "torch":
            run_counted(pip, title, len(pins))
            return
        # A wheel in pip's find-links first: it answers at once and works without PyTorch's index.
        offline = subprocess.run([*pip, "--no-index", "--quiet"], capture_output=True, check=False)
        if offline.returncode != 0:
            run_counted(
                [*pip, "--index-url", os.environ.get("TORCH_INDEX_URL", TORCH_INDEX_URL)],
                title,
                len(pins),
                "no CPU build of torch 2.13.0 for this Python within reach: neither in "
                "pip's find-links nor on PyTorch's index. TORCH_INDEX_URL names a mirror of that; "
                "PYTHON=3.11 another Python",
            )


def write_commands(venv: Path) -> None:
    """`.venv/bin/vllm-gateway` and the others start this checkout, from any folder."""
    commands: dict[str, str] = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"][
        "scripts"
    ]
    for name, target in commands.items():
        module, _, function = target.partition(":")
        python = venv.resolve() / "bin" / "python"
        file = venv / "bin" / name
        text = _COMMAND.format(python=python, root=str(ROOT), module=module, function=function)
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)


def run(command: list[str], problem: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SetupError(f"{problem}: {(result.stderr or result.stdout).strip()[-600:]}")


def run_counted(command: list[str], name: str, total: int, problem: str | None = None) -> None:
    """Runs pip and shows how far it is: a first set-up takes minutes."""
    count = 0
    tail: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            tail = [*tail[-12:], line.rstrip()]
            if line.startswith(("Collecting ", "Processing ")):  # from an index, from a folder
                count += 1
                show(f"{name}: {count}/{total} {line.split()[1]}", last=False)
            elif line.startswith("Installing collected packages"):
                show(f"{name}: {count}/{total} fetched, installing", last=True)
    if process.returncode != 0:
        errors = [line for line in tail if line.startswith("ERROR")] or tail[-3:]
        raise SetupError(f"{problem or f'could not install {name}'}: {' '.join(errors)}")


def show(text: str, *, last: bool) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Ksetup: {text}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        say(text)


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
