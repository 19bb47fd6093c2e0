"""What holds for every test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.vllm_python import VllmPython

# Left to itself, structlog has Rich draw each variable of each frame of a logged error.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)

# How long an example takes says how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def vllm_python() -> Iterator[VllmPython]:
    """For programs that import vLLM."""
    with VllmPython() as python:
        yield python


@pytest.fixture
def quick_parser(vllm_python: VllmPython, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher asks vLLM's own parser, in a Python that has imported it already."""
    run = SimpleNamespace(run=vllm_python.run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr("launcher.plan.flags.known_flags.subprocess", run)
