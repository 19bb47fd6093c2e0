"""Where a model is found, and what its shape costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.config import Settings
from launcher.errors import SettingsError
from launcher.models import Model, Shape, find_model, read_shape
from tests.launcher.programs import MODEL, Launcher
from tests.launcher.test_explain import call

MODELS = Path(__file__).parent / "models"


def put_into_cache(home: Path, name: str, *, is_whole: bool) -> Path:
    """As huggingface_hub lays it out."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    (snapshot / "config.json").write_text((MODEL / "config.json").read_text())
    if is_whole:
        (snapshot / "model.safetensors").write_bytes(b"weights")
    return snapshot


def test_folder_is_used_as_it_is_and_served_by_its_name() -> None:
    model = find_model(Settings(model=str(MODELS / "qwen3-8b")), config_only=True)
    assert (model.path, model.served_name) == (MODELS / "qwen3-8b", "qwen3-8b")


def test_folder_without_weights_is_refused_unless_they_are_random() -> None:
    shape_only = str(MODELS / "qwen3-8b")
    with pytest.raises(SettingsError, match="has no weights"):
        find_model(Settings(model=shape_only))
    model = find_model(Settings(model=shape_only, set=("load-format=dummy",)))
    assert model.weight_bytes("") > 10 * 2**30


def test_demo_model_is_served_as_demo() -> None:
    model = find_model(Settings())
    assert model.served_name == "demo"
    assert model.file_bytes > 2**20


@pytest.mark.parametrize(
    "offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_hub_model_once_cached_needs_no_network(tmp_path: Path, offline: dict[str, str]) -> None:
    snapshot = put_into_cache(tmp_path / "hf", "some/model", is_whole=True)
    settings = {"HF_HOME": str(tmp_path / "hf"), "LAUNCHER_MODEL": "some/model", **offline}
    launcher = Launcher(tmp_path, settings=settings)
    code, out, err = call(launcher, "explain", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert str(snapshot) in facts["argv"]
    assert facts["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "some/model" in facts["argv"]


def test_hub_model_cut_off_while_loading_is_fetched_again(tmp_path: Path) -> None:
    put_into_cache(tmp_path / "hf", "some/model", is_whole=False)
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    launcher = Launcher(tmp_path, settings={**settings, "LAUNCHER_MODEL": "some/model"})
    code, _, err = call(launcher, "serve")
    assert code == 2
    assert "the copy of some/model here is incomplete" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere", "there is no folder"),
        ("./nowhere/model", "there is no folder"),
        ("just-a-word", "there is no folder"),
    ],
)
def test_model_that_is_nowhere_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        find_model(Settings(model=name))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "cannot be read"), ("{}", "does not say")],
)
def test_folder_without_a_usable_config_is_one_clear_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SettingsError, match=message):
        read_shape(tmp_path)


def test_shape_kv_bytes_of_known_models() -> None:
    small, large = (read_shape(MODELS / name) for name in ("qwen3-0.6b", "qwen3-8b"))
    assert small.kv_bytes_per_token(2.0) == 112 * 1024  # 28 layers x 8 heads x 128 x 2 x 2 bytes
    assert large.kv_bytes_per_token(1.0) == 72 * 1024
    parameters = large.linear_parameters + large.embedding_parameters
    assert parameters == pytest.approx(8.19e9, rel=0.01)
    parameters = small.linear_parameters + small.embedding_parameters
    assert parameters == pytest.approx(0.596e9, rel=0.01)


def test_weights_quantised_checkpoint_counts_its_own_bytes() -> None:
    row = json.loads((MODELS / "qwen3-8b" / "config.json").read_text())
    shape = read_shape(MODELS / "qwen3-8b")
    awq = Shape(**{**shape.__dict__, "quantization": "awq"})
    assert row["hidden_size"] == shape.hidden
    plain = Model("m", "m", Path(), shape, 0).weight_bytes("")
    assert Model("m", "m", Path(), awq, 0).weight_bytes("") < plain / 2
