"""The commands of every profile in the words of other vLLM versions, by their lists of flags."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Set
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.plan.command import InstalledVllm, build_command
from launcher.plan.engine_plan import NAMES, build_plan, parse_overrides
from launcher.plan.flags.known_flags import Flags, list_changes, read_flags, read_shipped_flags
from launcher.plan.hardware import parse_device
from tests.launcher.test_profiles import GPUS, MODELS, make_command, make_plan, read_model

DATA = Path(__file__).parent / "vllm_flags.toml"
SHIPPED = read_shipped_flags()
# Options of the profiles that a version has no word for, so that they are left out.
LEFT_OUT = {
    "0.13.0": {"custom-histogram-buckets", "performance-mode", "shutdown-timeout"},
    "0.16.0": {"custom-histogram-buckets", "performance-mode", "shutdown-timeout"},
    "0.20.2": {"custom-histogram-buckets"},
    "0.24.0": {"custom-histogram-buckets"},
    "0.28.0": {"custom-histogram-buckets"},
    "0.31.0": {"custom-histogram-buckets"},
    "0.33.0": set(),
}


@cache
def read_versions() -> dict[str, dict[str, frozenset[str]]]:
    """Version -> flags, fields of JSON values, parsers."""
    versions: dict[str, dict[str, frozenset[str]]] = {}
    known: dict[str, frozenset[str]] = {}
    for version, rows in tomllib.loads(DATA.read_text(encoding="utf-8")).items():
        known = dict(known)
        for key, names in sorted(rows.items()):
            old, change = known.get(key[1:], frozenset()), frozenset(names.split())
            known[key[1:]] = old | change if key[0] == "+" else old - change
        versions[version] = known
    return versions


def make_flags(version: str) -> Flags:
    known = read_versions()[version]
    kinds = {name: SHIPPED.kinds.get(name, "value") for name in known["flags"]}
    fields: dict[str, list[str]] = {}
    for name in sorted(known["fields"]):
        head, _, field = name.rpartition(".")
        fields.setdefault(head, []).append(field)
    parsers = ("tool-call-parser", "reasoning-parser")
    return Flags(version, kinds, fields, {name: sorted(known[name]) for name in parsers})


def read_arguments(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Flag -> what follows it."""
    found: dict[str, list[str]] = {}
    for word in arguments[2:]:  # after `serve MODEL`
        if word.startswith("--"):
            values = found.setdefault(word[2:], [])
        else:
            values.append(word)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def list_paths(name: str, value: dict[str, Any]) -> set[str]:
    """Every field inside a JSON value, dotted, as far as `Flags.fields` names them."""
    paths = {f"{name}.{key}" for key in value}
    inner = [(key, part) for key, part in value.items() if isinstance(part, dict)]
    return paths.union(*(list_paths(f"{name}.{key}", part) for key, part in inner))


def unknown_fields(said: dict[str, Any], flags: Flags) -> set[str]:
    texts = {name: said[name] for name in flags.fields if name in said}
    paths = {path for name in texts for path in list_paths(name, json.loads(texts[name]))}
    return {
        path
        for path in paths
        if (known := flags.fields.get(path.rpartition(".")[0])) and path.split(".")[-1] not in known
    }


@cache
def list_arguments_now(profile: str, gpu: str, model: str) -> Set[str]:
    """To each version the same."""
    return read_arguments(make_command(make_plan(profile, gpu, model)).arguments).keys()


@pytest.mark.parametrize("version", LEFT_OUT)
def test_every_command_is_in_the_words_of_the_version(version: str) -> None:
    flags, known = make_flags(version), read_versions()[version]
    vllm = InstalledVllm("vllm", version, "gpu", "vllm.entrypoints.cli.main", True)
    left_out = set()
    for gpu, profile, model in itertools.product(GPUS, NAMES, MODELS):
        plan = build_plan(profile, parse_device(gpu), read_model(model), flags)
        command = build_command(plan, LauncherSettings(cache_dir=Path("/cache")), vllm, flags)
        said = read_arguments(command.arguments)
        names = {name if name in known["flags"] else name.removeprefix("no-") for name in said}
        assert names <= known["flags"]
        assert unknown_fields(said, flags) == set()
        assert said["tool-call-parser"] in known["tool-call-parser"]
        assert said["reasoning-parser"] in known["reasoning-parser"]
        left_out |= list_arguments_now(profile, gpu, model) - said.keys()
    assert left_out == LEFT_OUT[version]


@pytest.mark.parametrize("change", list_changes(), ids=lambda change: change["flag"])
def test_change_names_what_some_version_lacks(change: dict[str, Any]) -> None:
    """A flag that all of them know would never be looked up here."""
    flag = change["flag"]
    kind = "fields" if "." in flag else "flags"
    is_lacking = any(flag not in known[kind] for known in read_versions().values())
    assert is_lacking or change["note"].startswith("before 0.13 ")
    if "instead" in change:
        head = change["instead"].partition(".")[0]
        assert all(head in known["flags"] for known in read_versions().values())


def test_every_flag_that_went_has_a_word_of_advice() -> None:
    versions = read_versions()
    ever = frozenset[str]().union(*(known["flags"] for known in versions.values()))
    gone = ever - SHIPPED.kinds.keys() - versions["0.33.0"]["flags"]
    assert gone <= {change["flag"] for change in list_changes()}


@pytest.mark.parametrize(
    ("pair", "advice"),
    [
        ("compilation-config.level=3", "write mode"),
        ("attention-config.use_cudnn_prefill=true", "mla_prefill_backend"),
        ("max-num-partial-prefills=2", "long-prefill-token-threshold"),
    ],
)
def test_word_of_an_older_version_is_refused_with_what_to_write(pair: str, advice: str) -> None:
    with pytest.raises(SettingsError, match=advice):
        parse_overrides([pair], SHIPPED)


@pytest.mark.engine
@pytest.mark.usefixtures("quick_parser")
def test_shipped_flags_are_those_of_the_installed_vllm(tmp_path: Path) -> None:
    asked = read_flags("0.32.0-asked", tmp_path)
    assert asked.kinds == SHIPPED.kinds
    assert {k: sorted(v) for k, v in asked.fields.items()} == SHIPPED.fields
    assert asked.choices == SHIPPED.choices
    assert read_flags("0.32.0-asked", tmp_path) == asked  # from the file now


def test_flags_file_of_an_earlier_launcher_is_asked_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flags-0.20.2.json").write_text('{"flags": {}, "fields": {}}')
    answer = json.dumps({"flags": {"model": "value"}, "fields": {}, "choices": {}})
    monkeypatch.setattr("launcher.plan.flags.known_flags._ask_parser", lambda *_: [answer])
    assert read_flags("0.20.2", tmp_path) == Flags("0.20.2", {"model": "value"}, {}, {})


def test_flags_of_the_shipped_version_need_no_parser(tmp_path: Path) -> None:
    assert read_flags(SHIPPED.version, tmp_path) == SHIPPED
    assert list(tmp_path.iterdir()) == []
