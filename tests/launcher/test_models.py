"""Where a model is found, and what its shape costs."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import httpx
import pytest

from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.models.model import Model, Shape, find_model, read_shape
from launcher.models.retrying import may_pass
from tests.launcher.fake_hub import FakeHub, serve_hub
from tests.launcher.programs import MODEL, Launcher, running
from tests.launcher.test_explain import call

pytestmark = pytest.mark.programs

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
    model = find_model(LauncherSettings(model=str(MODELS / "qwen3-8b")), config_only=True)
    assert (model.path, model.served_name) == (MODELS / "qwen3-8b", "qwen3-8b")


def test_folder_without_weights_is_refused_unless_they_are_random() -> None:
    shape_only = str(MODELS / "qwen3-8b")
    with pytest.raises(SettingsError, match="has no weights"):
        find_model(LauncherSettings(model=shape_only))
    model = find_model(LauncherSettings(model=shape_only, set=("load-format=dummy",)))
    assert model.weight_bytes("") > 10 * 2**30


def test_demo_model_is_served_as_demo() -> None:
    model = find_model(LauncherSettings())
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
    assert "the copy of some/model here is incomplete" in err.splitlines()[-1]


def hub_launcher(folder: Path, hub: FakeHub) -> Launcher:
    settings = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.url}
    return Launcher(folder, settings={**settings, "LAUNCHER_MODEL": "some/model"})


def read_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in MODEL.iterdir() if path.is_file()}


@pytest.mark.slow  # its pauses are real
def test_hub_that_fails_twice_is_asked_again_and_each_time_told(tmp_path: Path) -> None:
    with serve_hub(FakeHub(read_files(), failures=[502, 0])) as hub:
        launcher = hub_launcher(tmp_path, hub)
        with running(launcher):
            launcher.wait_state("ready")
            assert launcher.status()["model"] == "some/model"
    told = [line for line in launcher.err.splitlines() if "WARNING model_fetch_failed" in line]
    assert len(told) == 2
    assert "502" in told[0]
    pauses = [float(line.rpartition("retry_in_s=")[2]) for line in told]
    assert 1 <= pauses[0] <= 2 <= pauses[1] <= 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_hub_that_refuses_is_not_asked_again(tmp_path: Path, status: int) -> None:
    with serve_hub(FakeHub({}, failures=[status] * 9)) as hub:
        code, _, err = call(hub_launcher(tmp_path, hub), "serve")
        assert len(hub.asked) == 1
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith("launcher: model: cannot get some/model from Hugging Face: ")


@pytest.mark.slow  # its pauses are real
def test_hub_that_stays_away_is_given_up(tmp_path: Path) -> None:
    with serve_hub(FakeHub({}, failures=[503] * 99)) as hub:
        code, _, err = call(hub_launcher(tmp_path, hub), "serve")
    *told, last = err.splitlines()
    assert code == 2
    assert sum("WARNING model_fetch_failed" in line for line in told) == 3, err
    assert last.startswith("launcher: model: cannot get some/model from Hugging Face: ")


def test_hub_whose_model_has_no_weights_is_one_line(tmp_path: Path) -> None:
    files = {name: body for name, body in read_files().items() if "safetensors" not in name}
    with serve_hub(FakeHub(files)) as hub:
        code, _, err = call(hub_launcher(tmp_path, hub), "serve")
    assert code == 2
    assert err.splitlines()[-1].endswith("Hugging Face has as some/model is no model with weights")


def test_hub_told_to_be_left_alone_is_not_asked(tmp_path: Path) -> None:
    put_into_cache(tmp_path / "hf", "some/model", is_whole=False)
    with serve_hub(FakeHub({})) as hub:
        launcher = hub_launcher(tmp_path, hub)
        launcher.settings["HF_HUB_OFFLINE"] = "1"
        code, _, err = call(launcher, "serve")
        assert hub.asked == []
    (line,) = err.splitlines()
    assert code == 2
    assert "the copy of some/model here is incomplete" in line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (httpx.ReadTimeout("slow"), True),
        (OSError("[E1020] Connection failed"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (ValueError("no such file"), False),
    ],
)
def test_failures_that_may_pass_are_told_from_those_that_stay(
    error: Exception, expected: bool
) -> None:
    assert may_pass(error) is expected
    wrapped = FileNotFoundError("not here, and the hub is out of reach")
    wrapped.__cause__ = error
    assert may_pass(wrapped) is expected


# The part of modelscope's API that is used, as 1.40 has it: a folder for a name, or an exception.
FAKE_MODELSCOPE = """
import os, pathlib, shutil

def snapshot_download(model_id=None, revision=None, cache_dir=None, user_agent=None,
                      local_files_only=False, cookies=None, ignore_file_pattern=None,
                      allow_file_pattern=None, local_dir=None, allow_patterns=None,
                      ignore_patterns=None):
    root = pathlib.Path(os.environ["MODELSCOPE_CACHE"])
    folder = root / "models" / model_id.replace("/", "--") / "snapshots" / "master"
    if local_files_only:
        if not folder.is_dir():
            raise ValueError("Cannot find the requested files in the cached path")
        return str(folder)
    with (root / "fetched").open("a") as file:
        file.write(f"{model_id} {allow_patterns} {ignore_patterns}\\n")
    if not os.environ.get("FAKE_HUB"):
        raise OSError("[E1020] Connection failed: Pool(host='hub'): Max retries exceeded: x\\nmore")
    folder.mkdir(parents=True, exist_ok=True)
    for source in pathlib.Path(os.environ["FAKE_HUB"]).iterdir():
        if allow_patterns is None or source.name in allow_patterns:
            shutil.copy(source, folder)
    return str(folder)
"""


@pytest.fixture
def modelscope(tmp_path: Path) -> Launcher:
    """A launcher whose hub is ModelScope; the hub is reachable where FAKE_HUB names a folder."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "modelscope.py").write_text(FAKE_MODELSCOPE)
    (tmp_path / "cache").mkdir()
    settings = {
        "LAUNCHER_HUB": "modelscope",
        "LAUNCHER_MODEL": "some/model",
        "MODELSCOPE_CACHE": str(tmp_path / "cache"),
    }
    return Launcher(tmp_path, settings=settings, path=f"{tmp_path / 'lib'}:")


def put_modelscope(launcher: Launcher, *, is_whole: bool) -> Path:
    folder = launcher.folder / "cache" / "models" / "some--model" / "snapshots" / "master"
    folder.mkdir(parents=True)
    for file in MODEL.iterdir():
        if is_whole or file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def fetches(launcher: Launcher) -> list[str]:
    file = launcher.folder / "cache" / "fetched"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("command", ["explain", "serve"])
def test_modelscope_model_once_cached_needs_no_network(modelscope: Launcher, command: str) -> None:
    folder = put_modelscope(modelscope, is_whole=True)
    if command == "explain":
        code, out, err = call(modelscope, "explain", "--json")
        assert (code, err) == (0, "")
        argv = json.loads(out)["argv"]
    else:
        with running(modelscope):
            argv = modelscope.wait_state("ready")["argv"]
    assert str(folder) in argv
    assert "some/model" in argv
    assert fetches(modelscope) == []


def test_modelscope_explain_fetches_no_weights(modelscope: Launcher) -> None:
    modelscope.settings["FAKE_HUB"] = str(MODEL)
    code, out, _ = call(modelscope, "explain", "--all")
    assert code == 0
    assert "tool-call-parser = hermes" in out
    assert list((modelscope.folder / "cache").rglob("*.safetensors")) == []


def test_modelscope_cut_off_model_is_fetched_again(modelscope: Launcher) -> None:
    folder = put_modelscope(modelscope, is_whole=False)
    modelscope.settings["FAKE_HUB"] = str(MODEL)
    with running(modelscope):
        modelscope.wait_state("ready")
    assert (folder / "model.safetensors").is_file()
    assert len(fetches(modelscope)) == 1


@pytest.mark.slow  # its pauses are real
@pytest.mark.parametrize("is_begun", [False, True])
def test_modelscope_out_of_reach_is_told_and_given_up(modelscope: Launcher, is_begun: bool) -> None:
    if is_begun:
        put_modelscope(modelscope, is_whole=False)
    code, _, err = call(modelscope, "serve")
    *told, last = err.splitlines()
    why = "[E1020] Connection failed: Pool(host='hub')"
    assert code == 2
    assert last == f"launcher: model: cannot get some/model from ModelScope: {why}"
    assert len(told) == 3
    assert all(f"WARNING model_fetch_failed why={why} retry_in_s=" in line for line in told)


def test_modelscope_that_fetches_half_is_one_line(modelscope: Launcher, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((MODEL / "config.json").read_text())
    modelscope.settings["FAKE_HUB"] = str(half)
    code, _, err = call(modelscope, "serve")
    assert code == 2
    assert "is incomplete" in err
    assert len(err.splitlines()) == 1


def test_modelscope_not_installed_says_what_to_install(modelscope: Launcher) -> None:
    (modelscope.folder / "lib" / "modelscope.py").write_text("raise ImportError")
    code, _, err = call(modelscope, "serve")
    assert code == 2
    assert err.splitlines() == [
        "launcher: model: LAUNCHER_HUB=modelscope needs its package: pip install modelscope"
    ]


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
        find_model(LauncherSettings(model=name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("{}", "does not say 'num_attention_heads'"),
        ('{"num_attention_heads": 0}', "'num_attention_heads' is 0: it must be"),
        ('{"num_attention_heads": "8"}', "'num_attention_heads' is \"8\": it must be"),
        ('{"num_attention_heads": 8, "hidden_size": null}', "does not say 'hidden_size'"),
        ('{"text_config": [1]}', r"'text_config' is \[1\]: it must be an object"),
    ],
)
def test_folder_without_a_usable_config_is_one_clear_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SettingsError, match=message):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"n_head": 2, "n_embd": 128, "n_layer": 3, "n_positions": 512, "n_inner": None},  # GPT-2
        {"n_heads": 2, "d_model": 128, "n_layers": 3, "max_seq_len": 512},  # MPT
        {
            "num_attention_heads": 2,
            "hidden_size": 128,
            "num_layers": 3,
            "seq_length": 512,
            "padded_vocab_size": 700,
            "vocab_size": None,
            "ffn_hidden_size": 512,  # ChatGLM
        },
    ],
    ids=["gpt2", "mpt", "chatglm"],
)
def test_shape_is_read_by_the_names_of_older_families(
    tmp_path: Path, config: dict[str, object]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 700, **config}))
    shape = read_shape(tmp_path)

    assert (shape.heads, shape.hidden, shape.layers, shape.head_size) == (2, 128, 3, 64)
    assert (shape.max_positions, shape.intermediate, shape.vocabulary) == (512, 512, 700)


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
