"""What goes into the images beside the programs: packages on top of others' ones, and a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.image_packages import find_lacking, list_installed, read_floors, release
from scripts.locked import Pin, read_lock, select_pins

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parent.parent.parent
PINS = [
    Pin("aiohttp", "3.14.5", ("sha256:aa",)),
    Pin("orjson", "3.13.0", ("sha256:bb", "sha256:cc")),
    Pin("typing-extensions", "4.16.0", ("sha256:dd",)),
]
FLOORS = {"aiohttp": "3.14.1", "orjson": "3.11"}


def call(*words: str | Path, **variables: str) -> tuple[int, str]:
    """A script as an image's build runs it; what it says on either stream."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "HF_TOKEN": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def call_fetch(*words: str | Path, **variables: str) -> tuple[int, str]:
    return call("scripts.fetch_model", *words, **variables)


# --- packages ---


@pytest.mark.parametrize(
    ("installed", "lacking"),
    [
        ({}, {"aiohttp", "orjson", "typing-extensions"}),
        # What vLLM's image has newer than the lock stays, what is older than needed does not.
        ({"aiohttp": "4.0.0", "orjson": "3.11"}, {"typing-extensions"}),
        ({"aiohttp": "3.9.9", "orjson": "3.12"}, {"aiohttp", "typing-extensions"}),
        ({"typing-extensions": "4.1.0"}, {"aiohttp", "orjson"}),
    ],
)
def test_packages_lacking_are_those_absent_or_too_old(
    installed: dict[str, str], lacking: set[str]
) -> None:
    assert {pin.name for pin in find_lacking(PINS, FLOORS, installed)} == lacking


def test_packages_lacking_keep_every_hash() -> None:
    lines = [str(pin) for pin in find_lacking(PINS, FLOORS, {})]
    assert "orjson==3.13.0 --hash=sha256:bb --hash=sha256:cc" in lines


def test_packages_of_this_environment_are_left_alone(tmp_path: Path) -> None:
    """Whatever a test's environment lacks is no dependency of the programs."""
    code, said = call("scripts.image_packages", "list")
    assert code == 0, said
    names = {line.partition("==")[0] for line in said.splitlines()}
    assert names & {pin.name for pin in select_pins(read_lock())} == set()

    before = list_installed()
    nothing = tmp_path / "lacking.txt"
    nothing.write_text("\n")
    code, said = call("scripts.image_packages", "add", nothing)
    assert (code, "image: 0 packages added" in said) == (0, True), said
    assert list_installed() == before


def test_packages_that_cannot_be_had_are_said_in_one_line(tmp_path: Path) -> None:
    lacking = tmp_path / "lacking.txt"
    lacking.write_text("no-such-thing==1.0 --hash=sha256:" + "0" * 64 + "\n")
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    code, said = call("scripts.image_packages", "add", lacking, **nowhere)
    assert (code, "pip could not install" in said) == (2, True), said
    assert "Traceback" not in said


def test_every_dependency_has_a_floor_that_the_lock_keeps() -> None:
    """A dependency written otherwise would never be checked against what an image has."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    floors = read_floors(pyproject)
    assert len(floors) == len(pyproject["project"]["dependencies"])
    pins = {pin.name: pin.version for pin in select_pins(read_lock())}
    assert [name for name, floor in floors.items() if release(pins[name]) < release(floor)] == []


# --- a model ---


def test_model_demo_is_copied_and_found_again(tmp_path: Path) -> None:
    code, said = call_fetch("demo", tmp_path)
    assert (code, "is ready" in said) == (0, True), said
    assert (tmp_path / "demo" / "model.safetensors").is_file()
    assert call_fetch("demo", tmp_path) == (0, f"model: {tmp_path / 'demo'} is there\n")


def test_model_of_ones_own_needs_no_hub(tmp_path: Path) -> None:
    own = tmp_path / "mine" / "model"
    own.mkdir(parents=True)
    (own / "config.json").write_text("{}")
    (own / "model.safetensors").write_bytes(b"weights")
    assert call_fetch("mine/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")[0] == 0


def test_model_not_wanted_is_none(tmp_path: Path) -> None:
    assert call_fetch("", tmp_path)[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing-here", "into models/nothing-here before it is built"),
        ("../etc", "neither a hub's name"),
        ("a/b/c", "neither a hub's name"),
        ("some/model", "cannot get some/model from huggingface"),
    ],
)
def test_model_that_cannot_be_had_is_said_in_one_line(tmp_path: Path, name: str, says: str) -> None:
    code, said = call_fetch(name, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2
    assert says in said
    assert "Traceback" not in said


def test_model_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, said = call_fetch("demo", tmp_path / "file")
    assert code == 2
    assert "must be allowed to write there" in said


def test_folder_of_ones_own_beats_a_hub_and_everybody_may_read_the_copy(tmp_path: Path) -> None:
    own = tmp_path / "mine" / "some" / "model"
    own.mkdir(parents=True)
    (own / "config.json").write_text("{}")
    (own / "model.safetensors").write_bytes(b"weights")
    (own / "model.safetensors").chmod(0o600)  # as `save_pretrained` leaves it

    code, said = call_fetch("some/model", tmp_path / "into", "--only-from", tmp_path / "mine")

    assert (code, "from models/some/model" in said) == (0, True), said
    copied = tmp_path / "into" / "some" / "model" / "model.safetensors"
    assert copied.read_bytes() == b"weights"
    assert copied.stat().st_mode & 0o777 == 0o644
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert call_fetch("some/model", tmp_path / "into", **nowhere)[0] == 0


def test_folder_that_is_not_there_is_left_to_the_hub(tmp_path: Path) -> None:
    into = tmp_path / "into"
    assert call_fetch("some/model", into, "--only-from", tmp_path) == (0, "")
    assert call_fetch("", into, "--only-from", tmp_path) == (0, "")
    assert not into.exists()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"adapter_config.json": ""}, "merge it into its base model"),
        ({"model.safetensors": "w"}, "has no config.json"),
        ({"config.json": "{}"}, "has no weights"),
        ({"config.json": "-> ../blobs/1"}, "cp -rL"),
    ],
)
def test_folder_that_is_no_model_is_said_and_no_hub_is_asked(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    own = tmp_path / "mine" / "my-ft"
    own.mkdir(parents=True)
    for name, text in files.items():
        if text.startswith("-> "):
            (own / name).symlink_to(text.removeprefix("-> "))
        else:
            (own / name).write_text(text)

    code, said = call_fetch("my-ft", tmp_path / "into", "--only-from", tmp_path / "mine")

    assert code == 2
    assert "models/my-ft cannot be served" in said
    assert says in said
    assert "Traceback" not in said


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face's interface as a download takes."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[tuple[str, str]] = []  # noqa: RUF012
    failures = 0  # how many of the next requests are answered with 503

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization", "")))
        if Hub.failures:
            Hub.failures -= 1
            self.send_error(503)
            return
        if self.path.startswith("/api/models/some/model"):
            if "/tree/" in self.path:
                rows = [
                    {"type": "file", "path": name, "size": len(content), "oid": name}
                    for name, content in self.files.items()
                ]
                self._answer(json.dumps(rows).encode(), {"Content-Type": "application/json"})
                return
            names = [{"rfilename": name} for name in self.files]
            about = {"id": "some/model", "sha": self.commit, "siblings": names}
            self._answer(json.dumps(about).encode(), {"Content-Type": "application/json"})
            return
        name = self.path.rpartition("/")[2]
        if name in self.files:
            etag = f'"{name}"'
            self._answer(self.files[name], {"ETag": etag, "X-Repo-Commit": self.commit})
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights",
        "model.gguf": b"the same once more",
    }
    Hub.asked = []
    Hub.failures = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_model_of_a_hub_is_fetched_whole_without_what_is_not_served(
    tmp_path: Path, hub: str
) -> None:
    code, said = call_fetch("some/model", tmp_path, HF_ENDPOINT=hub, HF_TOKEN="hf_secret")
    assert code == 0, said
    got = {path.name for path in (tmp_path / "some" / "model").iterdir()}
    assert got == {"config.json", "tokenizer.json", "model.safetensors"}
    assert "Bearer hf_secret" in {token for _, token in Hub.asked}
    assert "hf_secret" not in said


def test_model_of_a_hub_that_fails_for_a_moment_is_fetched(tmp_path: Path, hub: str) -> None:
    Hub.failures = 3
    code, said = call_fetch("some/model", tmp_path, HF_ENDPOINT=hub)
    assert (code, "trying again" in said) == (0, True), said


def test_model_that_a_hub_does_not_have_is_asked_for_once(tmp_path: Path, hub: str) -> None:
    code, said = call_fetch("no/such", tmp_path, HF_ENDPOINT=hub)
    assert (code, "trying again" in said) == (2, False), said


def test_token_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from scripts import fetch_model;"
        "fetch_model.HUB_TOKEN = pathlib.Path(sys.argv[1]); sys.argv[1:] = ['a/b', sys.argv[1]];"
        "sys.exit(fetch_model.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],  # not even root reads a folder
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot read the file HF_TOKEN_FILE (Is a directory)" in done.stderr
    assert "Traceback" not in done.stderr


def test_model_of_a_hub_is_asked_for_with_the_secret_of_the_build(tmp_path: Path, hub: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hf_mounted\n")
    code = (
        "import pathlib, sys; from scripts import fetch_model;"
        "fetch_model.HUB_TOKEN = pathlib.Path(sys.argv[1]);"
        "fetch_model.provide_model('some/model', pathlib.Path(sys.argv[2]), 'huggingface')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, secret, tmp_path],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_of_the_environment"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Bearer hf_mounted" in {token for _, token in Hub.asked}


def test_model_of_a_hub_without_weights_is_not_put_into_place(tmp_path: Path, hub: str) -> None:
    del Hub.files["model.safetensors"]
    code, said = call_fetch("some/model", tmp_path, HF_ENDPOINT=hub)
    assert (code, "no model with weights" in said) == (2, True)
    assert not (tmp_path / "some").exists()
