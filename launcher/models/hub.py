"""A model from its hub: what is here already where that is whole, else fetched."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Literal

import structlog

from common.errors import SettingsError
from launcher.models.model_files import NOT_WEIGHTS, is_complete, is_described
from launcher.models.retrying import HubError, retry

log = structlog.get_logger("launcher")
# What `explain` needs of a model: its shape, and how it is told to write.
_DESCRIPTION = [
    "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template*",
    "additional_chat_templates/*",
]  # fmt: skip


def fetch_model(name: str, hub: Literal["huggingface", "modelscope"], *, config_only: bool) -> Path:
    fetch = _fetch_modelscope if hub == "modelscope" else _fetch_huggingface
    return fetch(name, config_only=config_only)


def _fetch_huggingface(name: str, *, config_only: bool) -> Path:
    # Imported late: `--help` should not wait for it.
    from huggingface_hub import model_info, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    def fetch() -> Path:
        if config_only:
            return Path(snapshot_download(name, allow_patterns=_DESCRIPTION))
        here = Path(snapshot_download(name, ignore_patterns=NOT_WEIGHTS))
        if not is_complete(here):
            model_info(name)  # out of reach it falls back to what is here; this says why
        return here

    failure = f"cannot get {name} from Hugging Face"
    if not config_only:
        with contextlib.suppress(LocalEntryNotFoundError):
            here = Path(snapshot_download(name, local_files_only=True))
            if is_complete(here):
                return here
            failure = f"the copy of {name} here is incomplete, and Hugging Face gives no more"
    try:
        here = retry(fetch, _tell)
    except HubError as error:
        raise SettingsError(f"model: {failure}: {error}") from None
    if not config_only and not is_complete(here):
        raise SettingsError(f"model: what Hugging Face has as {name} is no model with weights")
    return here


def _fetch_modelscope(name: str, *, config_only: bool) -> Path:
    try:
        modelscope = importlib.import_module("modelscope")
    except ImportError:
        raise SettingsError(
            "model: LAUNCHER_HUB=modelscope needs its package: pip install modelscope"
        ) from None
    wanted = {"allow_patterns": _DESCRIPTION} if config_only else {"ignore_patterns": NOT_WEIGHTS}
    is_enough = is_described if config_only else is_complete
    with contextlib.suppress(Exception):  # plain ValueErrors for "not here yet"
        here = Path(modelscope.snapshot_download(name, local_files_only=True))
        if is_enough(here):
            return here
    try:
        here = retry(lambda: Path(modelscope.snapshot_download(name, **wanted)), _tell)
    except HubError as error:
        raise SettingsError(f"model: cannot get {name} from ModelScope: {error}") from None
    if not is_enough(here):
        raise SettingsError(f"model: ModelScope's copy of {name} in {here} is incomplete")
    return here


def _tell(what: str, pause_s: float) -> None:
    log.warning("model_fetch_failed", why=what, retry_in_s=round(pause_s, 1))
