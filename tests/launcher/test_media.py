"""Which models read media, and what their engine is told about where it may fetch them."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.config import LauncherSettings
from launcher.models.model import find_model
from launcher.models.multimodal import reads_media
from launcher.plan.command import EngineCommand, InstalledVllm, build_command
from launcher.plan.engine_plan import build_plan
from launcher.plan.flags.known_flags import read_shipped_flags
from launcher.plan.hardware import parse_device
from tests.vllm_python import VllmPython

FLAGS = read_shipped_flags()
VLLM = InstalledVllm("vllm", FLAGS.version, "gpu", "vllm.entrypoints.cli.main", True)
TEXT = {
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 100,
}
VISION = {"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": {}}


def build(tmp_path: Path, config: dict[str, Any], *domains: str) -> EngineCommand:
    (tmp_path / "config.json").write_text(json.dumps({**TEXT, **config}), encoding="utf-8")
    settings = LauncherSettings(model=str(tmp_path), media_domains=domains)
    model = find_model(settings, config_only=True)
    plan = build_plan("course", parse_device("H200"), model, FLAGS)
    return build_command(plan, settings, VLLM, FLAGS)


def read_flag(command: EngineCommand) -> list[str]:
    words = list(command.arguments)
    if "--allowed-media-domains" not in words:
        return []
    after = words[words.index("--allowed-media-domains") + 1 :]
    end = next((place for place, word in enumerate(after) if word.startswith("--")), len(after))
    return after[:end]


def test_multimodal_engine_fetches_from_nowhere_unless_told(tmp_path: Path) -> None:
    command = build(tmp_path, VISION)

    assert read_flag(command) == ["none/send-data-URLs"]
    assert command.environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert "--allowed-local-media-path" not in command.arguments


def test_multimodal_engine_fetches_from_listed_hosts_and_follows_nobody(tmp_path: Path) -> None:
    command = build(tmp_path, VISION, "A.example", "minio")

    assert read_flag(command) == ["a.example", "minio"]
    assert command.environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_multimodal_engine_fetches_from_anywhere_where_that_is_asked_for(tmp_path: Path) -> None:
    assert read_flag(build(tmp_path, VISION, "*")) == []


@pytest.mark.parametrize("entry", ["https://a.example", "a.example:443", ".example"])
def test_list_of_media_hosts_with_what_is_none_stops_the_start(entry: str) -> None:
    with pytest.raises(ValidationError, match="media_domains"):
        LauncherSettings(media_domains=(entry,))


def test_text_model_is_told_nothing_of_media(tmp_path: Path) -> None:
    command = build(tmp_path, {"architectures": ["Qwen3ForCausalLM"]})

    assert read_flag(command) == []
    assert "VLLM_MEDIA_URL_ALLOW_REDIRECTS" not in command.environment


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("Qwen3ForCausalLM", ["hidden_size"], False),
        ("DeepseekV3ForCausalLM", [], False),
        ("GPT2LMHeadModel", [], False),
        ("Gemma3ForConditionalGeneration", [], True),
        ("MolmoForCausalLM", [], True),
        ("Phi3VForCausalLM", [], True),
        ("SomethingNewForCausalLM", ["vision_config"], True),
        ("NobodyKnows", [], True),
    ],
)
def test_model_that_is_not_plainly_a_text_decoder_counts_as_multimodal(
    architecture: str, keys: list[str], expected: bool
) -> None:
    assert reads_media(architecture, keys) is expected


@pytest.mark.engine
def test_every_multimodal_model_of_the_installed_vllm_counts_as_one() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], "model_executor", "models", "registry.py")
    tables: dict[str, list[str]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            (target,) = node.targets
            names = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            tables[ast.unparse(target)] = [str(name) for name in names]

    multimodal, text = tables["_MULTIMODAL_MODELS"], tables["_TEXT_GENERATION_MODELS"]
    assert len(multimodal) > 50
    assert [name for name in multimodal if not reads_media(name, ())] == []
    assert sum(reads_media(name, ()) for name in text) < len(text) / 10


_CONNECTOR = """
import asyncio, http.server, sys, threading
from vllm.multimodal.media.connector import MediaConnector

asked = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(302)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
    def log_message(self, *_): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/a.png"
pixel = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBg"
    "AAAABQABpfZFQAAAAABJRU5ErkJggg=="
)
closed = MediaConnector(allowed_media_domains=[sys.argv[1]])
for tried in (url, "http://none/send-data-URLs", "http:///x", "http://none%2fsend-data-URLs/"):
    try:
        asyncio.run(closed.fetch_image_async(tried))
    except Exception as error:
        print(type(error).__name__)
print(asked)
print(asyncio.run(closed.fetch_image_async(pixel)).size)
opened = MediaConnector(allowed_media_domains=["127.0.0.1"])
try:
    opened.fetch_image(url)
except Exception as error:
    print("redirect", type(error).__name__)
print(asked)
"""


@pytest.mark.engine
def test_installed_vllm_fetches_nothing_with_the_word_for_nowhere(
    tmp_path: Path, vllm_python: VllmPython
) -> None:
    (word,) = read_flag(build(tmp_path, VISION))
    done = vllm_python.run(
        [sys.executable, "-c", _CONNECTOR, word],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
    )

    *refused, untouched, pixel, redirected, asked = done.stdout.splitlines()[-8:]
    assert len(refused) == 4, done.stdout + done.stderr
    assert untouched == "[]"
    assert pixel == "(1, 1)"
    assert redirected.startswith("redirect ")
    assert asked == "['/a.png']"
