"""What turns batches on, and what they cost while they are off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.app import build_app
from gateway.config import SettingsError
from tests.gateway.conftest import make_settings

ADDRESS = "postgresql://somebody:hush-hush@127.0.0.1/batches"


def test_gateway_without_batches_loads_no_database() -> None:
    program = "import sys, gateway.app; print([m for m in sys.modules if 'sql' in m])"
    told = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )

    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batch_database": ADDRESS}, "batch_folder"),
        ({"batch_folder": "x", "batch_database": "mysql://a/b"}, "postgresql://"),
    ],
)
def test_settings_that_do_not_go_together_stop_the_start(fields: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make_settings(**fields)


async def test_folder_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(SettingsError, match="GATEWAY_BATCH_FOLDER: cannot make"):
        build_app(make_settings(batch_folder=tmp_path / "file" / "batches"))


async def test_folder_is_for_the_gateway_alone_and_password_is_not_shown(tmp_path: Path) -> None:
    settings = make_settings(batch_folder=tmp_path / "batches", batch_database=ADDRESS)
    build_app(settings)

    assert (tmp_path / "batches").stat().st_mode & 0o077 == 0
    assert "hush-hush" not in repr(settings)
