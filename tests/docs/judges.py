"""Whether a command of a document would be taken by the program that it calls.

What is quick and harmless runs for real; of the rest the program's own parser reads the words, or
its own help says which flags it has. `curl` and `vllm bench` are test_commands.py's.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import yaml

from common.errors import ProgramError
from common.settings import ProgramSettings, list_flags, name_variable
from gateway.config import Settings
from gateway.config import load_settings as load_gateway
from gateway.discovery.roll import build_parser
from lab import options
from lab.__main__ import COMMANDS as LAB
from lab.gpu.arms import parse_arm
from launcher.config import COMMANDS as LAUNCHER
from launcher.config import load_settings as load_launcher
from launcher.plan.engine_plan import parse_overrides
from launcher.plan.flags.known_flags import read_shipped_flags
from tests.docs.documents import ROOT, Command, read_commands

# Commands that no test runs and no parser here reads, and why.
UNJUDGED = {
    "git": "fetches, or names a version that is yet to come",
    "tar": "packs what only a machine that serves has",
    "useradd": "makes a user of the host",
    "install": "writes into /etc of the host",
    "journalctl": "reads the log of a host's services",
    "ulimit": "a word of the shell's own",
    "uv": "resolves from the public index",
    "curl": "asked for real by test_curl_is_answered",
    "vllm": "vLLM's own parser reads it in test_vllm_takes_the_options_of_its_client",
}
# Variables that other programs read.
FOREIGN = frozenset(
    (
        "DECODE_HISTORIES",
        "DOCKER_BUILDKIT",
        "HF_ENDPOINT",
        "PIP_FIND_LINKS",
        "PIP_INDEX_URL",
        "TORCH_INDEX_URL",
        "UPDATE_GOLDEN",
        "VLLM_TARGET_DEVICE",
    )
)
_TIMEOUT_S = 250
# What `launcher up` tells its gateway, and who starts one alone has set.
_TOKENIZER = (("GATEWAY_TOKENIZER", str(ROOT / "demo/model")),)
_QUICK = ("--help", "--version", "check", "completion", "example", "new-key", "schema")
_COMPOSE_SERVICES = ("build", "cp", "exec", "logs", "restart", "run", "stop", "up")
Judge = Callable[[Command, Path], None]


class Unfit(Exception):
    """What the program would say."""


def judge(command: Command, folder: Path) -> None:
    """`folder` is where it would be typed: a checkout, with models that others would have."""
    words = command.words[1:] if command.words[:1] == ("exec",) else command.words
    program = Path(words[0]).name if words else ""
    own = replace(command, words=words)
    if words[0].startswith(("scripts/", ".ci/")):
        judge_script(own)
    elif program in JUDGES:
        JUDGES[program](own, folder)
    elif program not in UNJUDGED:
        raise Unfit(f"nobody here knows a program {program!r}")


def is_command(words: Sequence[str]) -> bool:
    program = words[0] if words else ""
    known = Path(program).name in {*JUDGES, *UNJUDGED}
    return known or program.startswith(("scripts/", ".ci/"))


def build_checkout(folder: Path) -> Path:
    """A folder that looks like the checkout, for files that commands write and read."""
    for path in ROOT.iterdir():
        if path.name not in ("models", "out", ".git"):
            (folder / path.name).symlink_to(path)
    small, large = (ROOT / "tests/launcher/models" / name for name in ("qwen3-0.6b", "qwen3-8b"))
    for name, model in {
        "FOLDER": ROOT / "demo/model",
        "models/my-ft": ROOT / "demo/model",
        "Qwen/Qwen3-0.6B": small,
        "Qwen/Qwen3-8B": large,
        "Qwen/Qwen3-32B": large,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(model)
    return folder


def run(command: Command, words: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run(
        words,
        cwd=folder,
        env=build_environment(command, folder),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise Unfit((done.stderr or done.stdout).strip() or f"exit code {done.returncode}")
    return done.stdout


def build_environment(command: Command, folder: Path) -> dict[str, str]:
    """Nothing of who runs the tests; `make` above them would otherwise hand its own words down."""
    own = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return own | dict(command.variables)


@contextlib.contextmanager
def typed_in(command: Command, folder: Path) -> Iterator[None]:
    """Here, as if it had been typed there; what a parser prints is its refusal."""
    said = io.StringIO()
    environment = build_environment(command, folder)
    try:
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            contextlib.chdir(folder),
            contextlib.redirect_stderr(said),
        ):
            yield
    except SystemExit as error:
        if error.code:
            raise Unfit(said.getvalue().strip().rpartition("\n")[2]) from None
    except (ProgramError, argparse.ArgumentTypeError) as error:
        raise Unfit(str(error)) from None


# --- the project's own programs ---


def judge_python(command: Command, folder: Path) -> None:
    match command.words[1:]:
        case ("-m", "gateway", *words):
            judge_gateway(replace(command, words=("gateway", *words)), folder)
        case ("-m", "launcher", *words):
            judge_launcher(replace(command, words=("launcher", *words)), folder)
        case ("-m", "lab", *words):
            judge_lab(replace(command, words=("lab", *words)), folder)
        case ("-m", "pytest", *words):
            judge_pytest(replace(command, words=("pytest", *words)), folder)
        case ("-m", "venv" | "ruff" | "mypy", *_):
            pass
        case ("-m", module, *words):
            judge_module(module, words)
        case ("-c", code, *_):
            check_python(code)
        case _:
            raise Unfit("neither -m MODULE nor -c CODE")


def judge_gateway(command: Command, folder: Path) -> None:
    check_variables(command)
    words = command.words[1:]
    if not command.variables and words in ((), ("check",)):  # the program's name, in a text
        command = replace(command, variables=_TOKENIZER)
    if words[:1] == ("roll",):
        try:
            build_parser().parse_args(words[1:])
        except SystemExit:
            raise Unfit(f"roll does not take {words[1:]}") from None
        return
    arguments = words if words[:1] and words[0] in _QUICK else ("check", *words)
    answer = run(command, [sys.executable, "-m", "gateway", *arguments], folder)
    if command.into and "/" not in command.into:
        with (folder / command.into).open("a", encoding="utf-8") as file:
            file.write(answer)


def judge_launcher(command: Command, folder: Path) -> None:
    check_variables(command)
    name, *arguments = command.words[1:] or ("--help",)
    if name not in LAUNCHER or name == "explain" or "--help" in arguments:
        run(command, [sys.executable, "-m", *command.words], folder)
        return
    with typed_in(replace(command, variables=(*_TOKENIZER, *command.variables)), folder):
        settings = load_launcher(LAUNCHER[name], arguments)
        parse_overrides(settings.set, read_shipped_flags())
        if name == "up":
            load_gateway()
    if name == "tune":
        words = [sys.executable, "-m", *command.words, "--gpu", "cpu", "--dry-run"]
        run(command, words, folder)


def judge_lab(command: Command, folder: Path) -> None:
    check_variables(command)
    name, *words = command.words[1:] or ("--help",)
    if name == "--help":
        return
    if name not in LAB:
        raise Unfit(f"lab has no command {name!r}")
    with typed_in(command, folder):
        arguments = find_lab_parser(name)(words)
        for arm in (name == "gpu" and arguments.arms) or ():
            parse_arm(arm)
    if arguments.launcher_options:
        rest = ("launcher", "up", *arguments.launcher_options)
        judge_launcher(replace(command, words=rest), folder)


def find_lab_parser(name: str) -> Callable[[Sequence[str]], argparse.Namespace]:
    """Where a command has its options: beside it, or in a module of their own."""
    module = importlib.import_module(LAB[name][0])
    parse = getattr(module, "parse_arguments", None)
    if parse is None and name in ("bench", "grade"):
        parse = importlib.import_module(f"lab.{name}.{name}_options").parse_arguments
    if parse is not None:
        found: Callable[[Sequence[str]], argparse.Namespace] = parse
        return found
    parser = options.build_parser(name, "") if name == "results" else module.build_parser()
    return lambda words: options.parse_options(parser, words)


def judge_module(module: str, words: Sequence[str]) -> None:
    """A module with a parser of its own: the flags that its source declares."""
    path = ROOT / module.replace(".", "/")
    files = [path.with_suffix(".py"), path / "__main__.py"]
    source = next((file for file in files if file.is_file()), None)
    if source is None:
        raise Unfit(f"there is no module {module}")
    declared = find_flags(source) | {"--help"}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in declared:
            raise Unfit(f"{module} has no {word}")


@cache
def find_flags(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {str(one.value) for one in ast.walk(tree) if isinstance(one, ast.Constant)}
    return frozenset(text for text in texts if re.fullmatch(r"--[a-z][\w-]*", text))


def judge_make(command: Command, folder: Path) -> None:
    """What make would do, and then whether those who are called would take it."""
    check_variables(command, *find_make_variables())
    given = [word for word in command.words[1:] if re.match(r"[A-Za-z_]+=", word)]
    unknown = {word.partition("=")[0] for word in given} - set(find_make_variables())
    if unknown:
        raise Unfit(f"the Makefile reads no {' and no '.join(sorted(unknown))}")
    quiet = ("--dry-run", "--no-print-directory", "-C", str(ROOT))
    words = ["make", *quiet, *command.words[1:]]
    for called in read_commands(ROOT / "Makefile", 0, run(command, words, folder)):
        if called.words[:1] in (("true",), ()):
            continue
        variables = [*command.variables, *called.variables]
        settings = tuple(one for one in variables if one[0].startswith(("GATEWAY_", "LAUNCHER_")))
        judge(replace(called, variables=settings, into=""), folder)


@cache
def find_make_variables() -> tuple[str, ...]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return tuple(sorted(set(re.findall(r"\$\((?:if \$\(|or \$\()?([A-Z_]+)\b", text))))


def judge_script(command: Command) -> None:
    path = ROOT / command.words[0]
    if not os.access(path, os.X_OK):
        raise Unfit(f"there is no program {command.words[0]}")
    if path.name == "system.sh":
        done = subprocess.run(
            [path, "--check", *command.words[1:]], capture_output=True, check=False
        )
        if done.returncode not in (0, 77):
            raise Unfit(done.stderr.decode())


def judge_pytest(command: Command, _: Path) -> None:
    for word in command.words[1:]:
        if "/" in word and not (ROOT / word.partition("::")[0]).exists():
            raise Unfit(f"there is no {word}")


def check_variables(command: Command, *more: str) -> None:
    known = {*list_variables(), *more, *FOREIGN}
    for key, _ in command.variables:
        if key not in known:
            raise Unfit(f"nobody reads {key}")


@cache
def list_variables() -> frozenset[str]:
    kinds: list[type[ProgramSettings]] = [Settings, *LAUNCHER.values()]
    return frozenset(name_variable(kind, name) for kind in kinds for name in kind.model_fields)


@cache
def list_own_flags() -> frozenset[str]:
    """Every flag that a program of the project takes."""
    kinds: list[type[ProgramSettings]] = [Settings, *LAUNCHER.values()]
    files = [path for name in ("demo", "lab", "scripts") for path in (ROOT / name).rglob("*.py")]
    files.append(ROOT / "gateway" / "discovery" / "roll.py")
    return frozenset(
        {flag for kind in kinds for flag in list_flags(kind)}
        | {flag for path in files for flag in find_flags(path)}
    )


def check_python(code: str) -> None:
    try:
        ast.parse(code)
    except SyntaxError as error:
        raise Unfit(f"no Python: {error}") from None


# --- other programs ---


def judge_pip(command: Command, _: Path) -> None:
    """Only this project with extras that it has, or what an extra names."""
    extras = _read_extras()
    names = {re.split(r"[<>=\[]", one)[0] for more in extras.values() for one in more}
    if command.words[1:2] != ("install",):
        raise Unfit("not `pip install`")
    for word in command.words[2:]:
        found = re.fullmatch(r"(\.|vllm-gateway)(?:\[([\w,]+)\])?", word)
        if found is None and word not in names:
            raise Unfit(f"{word} is not this project, nor named by it")
        wanted = set((found[2] or "").split(",")) - {""} if found else set[str]()
        if wanted - extras.keys():
            raise Unfit(f"there is no extra {wanted - extras.keys()}")


@cache
def _read_extras() -> dict[str, list[str]]:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = data["project"]["optional-dependencies"]
    return found


def judge_docker(command: Command, folder: Path) -> None:
    require("docker", "compose", "version")
    if command.words[1:2] == ("compose",):
        judge_compose(command, folder)
        return
    length = 3 if command.words[1] == "image" else 2
    read_flags(command, command.words[:length], command.words[length:])
    if command.words[1] == "build":
        file = re.search(r" -f (\S+)", command.text)
        text = (ROOT / (file[1] if file else "Dockerfile")).read_text(encoding="utf-8")
        for name in re.findall(r"--build-arg (\w+)=", command.text):
            if f"ARG {name}" not in text:
                raise Unfit(f"the Dockerfile has no ARG {name}")


def judge_compose(command: Command, folder: Path) -> None:
    files, rest = list[str](), list(command.words[2:])
    while rest[:1] == ["-f"]:
        files, rest = [*files, rest[1]], rest[2:]
    check_variables(command, *find_compose_variables())
    names = [part for file in files or ["compose.yaml"] for part in ("-f", file)]
    run(command, ["docker", "compose", *names, "config", "--quiet"], folder)
    plain = read_flags(command, ("docker", "compose", rest[0]), rest[1:])
    if rest[0] == "exec" and "-c" in rest:
        check_python(rest[rest.index("-c") + 1])
    if rest[0] not in _COMPOSE_SERVICES:
        return
    known = {name for file in files or [""] for name in list_services(file)}
    named = [word.partition(":")[0] for word in plain]
    for service in named[:1] if rest[0] in ("cp", "exec", "run") else named:
        if service not in known:
            raise Unfit(f"there is no service {service}")


@cache
def list_services(file: str) -> frozenset[str]:
    """Of one file; without a name of all, for a text that told before which ones are meant."""
    paths = [ROOT / file] if file else sorted(ROOT.glob("compose*.yaml"))
    texts = (path.read_text(encoding="utf-8") for path in paths)
    plain = (re.sub(r"!\w+", "", text) for text in texts)
    return frozenset(name for text in plain for name in yaml.safe_load(text)["services"])


@cache
def find_compose_variables() -> frozenset[str]:
    texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("compose*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"\$\{([A-Z_0-9]+)", text))


def judge_kubectl(command: Command, _: Path) -> None:
    require("kubectl", "version", "--client")
    words = [word for word in command.words[1:] if word not in {"-n", "vllm-gateway"}]
    verbs = {"create": 3 if "secret" in words else 2, "rollout": 2}.get(words[0], 1)
    read_flags(command, ("kubectl", *words[:verbs]), words[verbs:])
    for place in re.findall(r" -k (\S+)", command.text):
        if not (ROOT / place / "kustomization.yaml").is_file():
            raise Unfit(f"nothing for kustomize in {place}")


def judge_copy(command: Command, _: Path) -> None:
    plain = [word for word in command.words[1:] if not word.startswith("-")]
    for source in plain[:-1]:
        if not source.startswith("~") and not list(ROOT.glob(source)):
            raise Unfit(f"there is no {source}")


def judge_systemctl(command: Command, _: Path) -> None:
    for name in command.words[2:]:
        if not name.startswith("-") and not (ROOT / f"deploy/systemd/{name}.service").is_file():
            raise Unfit(f"there is no unit {name}")


def judge_quick(command: Command, folder: Path) -> None:
    """`echo`, `head` and `mkdir`, in the folder or into a file of it."""
    answer = run(command, command.words, folder)
    if command.into:
        (folder / command.into).write_text(answer, encoding="utf-8")


def read_flags(command: Command, program: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words that are no flags nor their values. A flag that the program's help lacks is
    refused; what stands behind the first plain word of `run` is another program's.
    """
    takes_value = read_help(tuple(program))
    plain, rest = list[str](), iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            plain.append(word)
            if program[1] == "run" or program[-1] in ("exec", "run"):
                return [*plain, *rest]
            continue
        flag, has_value, _ = word.partition("=")
        if flag not in takes_value:
            raise Unfit(f"{' '.join(program)} has no {flag}")
        if takes_value[flag] and not has_value:
            next(rest, None)
    return plain


@cache
def read_help(program: tuple[str, ...]) -> dict[str, bool]:
    """Each flag of a program made with cobra, and whether a value follows it."""
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, check=False)
    asked = " ".join(program)
    if done.returncode != 0 or asked not in done.stdout.replace(
        "docker buildx build", "docker build"
    ):
        raise Unfit(f"there is no {asked}")
    found: dict[str, bool] = {}
    docker = r"^ +(?:(-\w), )? *(--[\w-]+)(?: ([\w-]+(?: [\w-]+)*))?(?:  |$)"
    for short, flag, kind in re.findall(docker, done.stdout, re.MULTILINE):
        takes = bool(kind) and kind != asked  # a program's name in quotes is no value's
        found |= {flag: takes, short: takes}
    for short, flag, value in re.findall(
        r"^ +(?:(-\w), )?(--[\w-]+)=(.*):$", done.stdout, re.MULTILINE
    ):
        takes = value not in ("true", "false")
        found |= {flag: takes, short: takes}
    return found


@cache
def _answers(*words: str) -> bool:
    if not shutil.which(words[0]):
        return False
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def require(*words: str) -> None:
    if not _answers(*words):
        message = f"no `{words[0]}` here that could say which flags it has (scripts/system.sh)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


JUDGES: dict[str, Judge] = {
    "cp": judge_copy,
    "docker": judge_docker,
    "echo": judge_quick,
    "head": judge_quick,
    "kubectl": judge_kubectl,
    "launcher": judge_launcher,
    "make": judge_make,
    "mkdir": judge_quick,
    "pip": judge_pip,
    "pytest": judge_pytest,
    "python": judge_python,
    "python3": judge_python,
    "systemctl": judge_systemctl,
    "vllm-gateway": judge_gateway,
    "vllm-lab": judge_lab,
    "vllm-launcher": lambda command, folder: judge_launcher(
        replace(command, words=("launcher", *command.words[1:])), folder
    ),
}
