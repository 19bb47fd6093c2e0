"""The model: where it lies on this machine, its shape, and what it costs in memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.chat_templates import read_chat_templates
from common.errors import SettingsError
from common.files import read_file
from common.project import DEMO_MODEL
from launcher.config import LauncherSettings
from launcher.models.hub import fetch_model
from launcher.models.multimodal import reads_media

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Weights per element, packed scales included, by the checkpoint's own quantisation.
_QUANT_BYTES = {"fp8": 1.0, "awq": 0.56, "gptq": 0.56, "bitsandbytes": 0.56}


# What older families call the same.
_OTHER_NAMES = {
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "multi_query_group_num"),
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "vocab_size": ("padded_vocab_size",),
    "head_dim": ("kv_channels",),
}


@dataclass(frozen=True)
class Shape:
    """What of a model's config.json decides sizes."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    max_positions: int
    is_tied: bool
    quantization: str
    latent: int  # MLA keeps one latent vector a layer instead of keys and values; 0: it does not

    def kv_bytes_per_token(self, element_bytes: float) -> int:
        per_layer = self.latent or 2 * self.kv_heads * self.head_size
        return int(self.layers * per_layer * element_bytes)

    @property
    def linear_parameters(self) -> int:
        """Those that weight quantisation shrinks: not the embeddings."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)


@dataclass(frozen=True)
class Model:
    """A model that the engine can be pointed at."""

    name: str  # as the user wrote it
    served_name: str
    path: Path
    shape: Shape
    file_bytes: int  # of the weights on disk; 0 where only the config is here
    model_type: str = ""
    chat_template: str = ""  # all of them, where it has several; empty: none
    reads_media: bool = False

    def weight_bytes(self, quantization: str) -> int:
        """In device memory, under the engine option `quantization` (empty: as the files are)."""
        if self.file_bytes and not quantization:
            return self.file_bytes
        element = 1.0 if quantization else _QUANT_BYTES.get(self.shape.quantization, 2.0)
        return int(self.shape.linear_parameters * element + self.shape.embedding_parameters * 2)


def find_model(settings: LauncherSettings, *, config_only: bool = False) -> Model:
    """The model on this machine, fetched from its hub when it is not there yet."""
    path = _find_folder(settings, config_only=config_only)
    shape = read_shape(path)
    weights = [*path.glob("*.safetensors")] or [*path.glob("*.bin")]
    size = sum(file.stat().st_size for file in weights)
    # With random weights there is nothing to read: a way to measure a shape without its download.
    needs_weights = not config_only and "load-format=dummy" not in settings.set
    if not size and needs_weights:
        raise SettingsError(f"model: {path} has no weights (*.safetensors, *.bin)")
    served_name = settings.served_model_name or _name(settings)
    config = _read_config(path)
    return Model(
        settings.model,
        served_name,
        path,
        shape,
        size,
        str(config.get("model_type", "")),
        "\n".join(read_chat_templates(path).values()),
        reads_media(shape.architecture, config),
    )


def read_shape(path: Path) -> Shape:
    whole = _read_config(path)
    try:
        return _build_shape(whole, {**whole, **_part(whole, "text_config")})
    except ValueError as error:
        raise SettingsError(f"model: {path / 'config.json'} {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        whole = json.loads(read_file(path / "config.json"))
    except FileNotFoundError:
        raise SettingsError(f"model: {path} has no config.json") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"model: {path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(whole, dict):
        raise SettingsError(f"model: {path / 'config.json'} holds no object")
    return whole


def _build_shape(whole: dict[str, Any], text: dict[str, Any]) -> Shape:
    heads = _number(text, "num_attention_heads")
    hidden = _number(text, "hidden_size")
    latent = text.get("kv_lora_rank")
    return Shape(
        architecture=str([*(whole.get("architectures") or []), "unknown"][0]),
        layers=_number(text, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_number(text, "intermediate_size", 4 * hidden),
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads", heads),
        head_size=_number(text, "head_dim", hidden // heads),
        vocabulary=_number(text, "vocab_size"),
        max_positions=_number(text, "max_position_embeddings", 2048),
        is_tied=bool(text.get("tie_word_embeddings", whole.get("tie_word_embeddings", False))),
        quantization=str(_part(whole, "quantization_config").get("quant_method", "")),
        latent=_number(text, "kv_lora_rank") + (text.get("qk_rope_head_dim") or 0) if latent else 0,
    )


def _number(text: dict[str, Any], name: str, default: int | None = None) -> int:
    """What may be absent may be null or 0 too."""
    told = [text.get(one) for one in (name, *_OTHER_NAMES.get(name, ()))]
    known = (one for one in told if (one is not None if default is None else one))
    value = next(known, default)
    if value is None:
        raise ValueError(f"does not say {name!r}")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"says {name!r} is {json.dumps(value)}: it must be a whole number above 0")
    return value


def _part(whole: dict[str, Any], name: str) -> dict[str, Any]:
    part = whole.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"says {name!r} is {json.dumps(part)}: it must be an object")  # noqa: TRY004
    return part


def _name(settings: LauncherSettings) -> str:
    """A folder is served by its own name, a hub's model by its full one."""
    if settings.model == str(DEMO_MODEL):
        return "demo"
    path = Path(settings.model).expanduser()
    return path.resolve().name if path.is_dir() else settings.model


def _find_folder(settings: LauncherSettings, *, config_only: bool) -> Path:
    path = Path(settings.model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or settings.model[:1] in ".~" or not _HUB_NAME.fullmatch(settings.model):
        raise SettingsError(
            f"model: there is no folder {settings.model!r}, and it is no hub's name"
        )
    return fetch_model(settings.model, settings.hub, config_only=config_only)
