#!/usr/bin/env python3
"""Makes the virtual environment that everything else runs in, from the pinned requirements.

Called by `make`; needs nothing but a Python with `venv`. It picks the engine for this machine (the
CUDA build of vLLM where an NVIDIA GPU answers, the CPU build elsewhere) and does nothing at all
when the environment is already what the requirement files say.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
SUPPORTED = ("3.11", "3.12", "3.13")
TORCH_INDEX_URL = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """Something the user has to mend; its text says what and how."""


def main() -> int:
    args = parse_arguments()
    try:
        python = find_python(args.python)
        engine = args.engine if args.engine != "auto" else ("cuda" if has_gpu() else "cpu")
        build_environment(Path(args.venv), python, engine, dev=args.dev)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
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
    raise SetupError(
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


def build_environment(venv: Path, python: str, engine: str, *, dev: bool) -> None:
    locks = {"cpu": ["torch-cpu.txt", "cpu.txt"], "cuda": ["cuda.txt"], "none": ["gateway.txt"]}
    version = version_of(python) or python
    stamps = {name: stamp(name, version) for name in locks[engine] + ["dev.txt"] * dev}
    record = venv / "setup.stamps"
    done = record.read_text().splitlines() if record.is_file() else []
    missing = [name for name, value in stamps.items() if value not in done]
    if not missing:
        return
    started = time.monotonic()
    say(f"{venv.name}: {engine} engine, {python}" + (", with test tools" if dev else ""))
    if (done and missing != ["dev.txt"]) or not (venv / "bin" / "python").exists():
        # Nothing is mended in place: leftovers of another engine or Python break imports.
        shutil.rmtree(venv, ignore_errors=True)
        run([python, "-m", "venv", str(venv)], "could not make a virtual environment")
        missing, done = list(stamps), []
    for name in missing:
        install(venv, name)
        done.append(stamps[name])
        record.write_text("\n".join(done) + "\n")
    say(f"{venv.name}: done in {time.monotonic() - started:.0f} s")


def stamp(name: str, version: str) -> str:
    content = (REQUIREMENTS / name).read_bytes() + version.encode()
    return f"{name} {hashlib.sha256(content).hexdigest()}"


def install(venv: Path, name: str) -> None:
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["--no-deps", "--require-hashes", "-r", str(REQUIREMENTS / name)]
    if name != "torch-cpu.txt":
        run_counted(pip, name)
        return
    # A wheel in pip's find-links first: it answers at once and works without PyTorch's index.
    offline = subprocess.run([*pip, "--no-index", "--quiet"], capture_output=True, check=False)
    if offline.returncode != 0:
        run_counted(
            [*pip, "--index-url", os.environ.get("TORCH_INDEX_URL", TORCH_INDEX_URL)],
            name,
            "no CPU build of torch 2.13.0 for this Python within reach: neither in "
            "pip's find-links nor on PyTorch's index. TORCH_INDEX_URL names a mirror of that; "
            "PYTHON=3.11 another Python",
        )


def run(command: list[str], problem: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SetupError(f"{problem}: {(result.stderr or result.stdout).strip()[-600:]}")


def run_counted(command: list[str], name: str, problem: str | None = None) -> None:
    """Runs pip and shows how far it is: a first set-up takes minutes."""
    total = len(re.findall(r"^[\w.-]+==", (REQUIREMENTS / name).read_text(), re.MULTILINE))
    count = 0
    tail: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            tail = [*tail[-12:], line.rstrip()]
            if line.startswith("Collecting "):
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
