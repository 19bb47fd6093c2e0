"""`python -m gateway roll`: new engines in the place of those that serve, and no request lost.

It writes the settings file that a running gateway follows: first both, and when the new ones have
answered their warm-up, the new ones alone; the old ones finish what they have. What goes wrong
before that leaves the file as it was.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

from common.errors import SettingsError
from common.files import read_text
from common.prometheus_text import Samples, parse_samples
from common.settings import check_address
from common.toml_edit import set_values
from gateway.discovery.sources import is_source
from gateway.engines.engine import hide_password

_GATEWAY = "http://127.0.0.1:8000"
_LOOK_S = 0.5
_TOLD_EVERY_S = 10.0
_NOT_IN_TIME = 3


def roll(words: Sequence[str], say: Callable[[str], object]) -> int:
    """0: done; 2: nothing was begun; 3: not in time; 128 + a signal: broken off."""
    options = build_parser().parse_args(words)
    gateways = options.gateway or [_GATEWAY]
    rolling = Rolling(options.config, options.engine, gateways, options.timeout_s, say)
    with _signals_as_exceptions():
        try:
            return rolling.run()
        except _BrokenOff as error:
            rolling.take_back()
            return 128 + error.number


class Rolling:
    def __init__(
        self,
        config: Path,
        new: Sequence[str],
        gateways: Sequence[str],
        timeout_s: float,
        say: Callable[[str], object],
    ) -> None:
        self._tell = say
        self._config = config
        self._new = [_check(url) for url in new]
        self._gateways = [_check(url) for url in gateways]
        self._timeout_s = timeout_s
        self._old = _read_engines(config)
        self._is_between = False
        self._client = httpx.Client(timeout=10, trust_env=False)

    def run(self) -> int:
        self._check_before()
        self._is_between = True
        set_values(self._config, "", {"engines": [*self._old, *self._new]})
        self._say("written: the new beside the old; waiting until the new are warm")
        if not self._wait(self._list_cold) or not self._serves_the_same():
            self.take_back()
            return _NOT_IN_TIME
        set_values(self._config, "", {"engines": self._new})
        self._is_between = False
        self._say("written: the new alone; waiting until the old have finished")
        if not self._wait(self._list_busy):
            self._say(
                "they go on; gateway_engine_running_sequences has them until they have finished"
            )
            return _NOT_IN_TIME
        self._say(f"done; nothing runs any more at {', '.join(map(hide_password, self._old))}")
        return 0

    def take_back(self) -> None:
        """Only before the old ones have left."""
        if self._is_between:
            self._is_between = False
            set_values(self._config, "", {"engines": self._old})
            self._say("written: the old alone, as before")

    def _check_before(self) -> None:
        if both := set(self._new) & set(self._old):
            raise SettingsError(f"{hide_password(both.pop())} serves already ({self._config})")
        for url in self._new:
            try:
                self._client.get(f"{url}/health").raise_for_status()
            except httpx.HTTPError as error:
                raise SettingsError(
                    f"{hide_password(url)}/health does not answer ({_tell(error)}); start the new "
                    "engine first: python -m launcher serve"
                ) from None
        for gateway in self._gateways:
            known = {labels["engine"] for labels, _ in self._ask(gateway)["gateway_engine_ready"]}
            if known != set(map(hide_password, self._old)):
                raise SettingsError(
                    f"{gateway} has the engines {', '.join(sorted(known)) or 'of nobody'} and "
                    f"{self._config} has {', '.join(map(hide_password, self._old))}: start it with "
                    "GATEWAY_CONFIG at that file, and without GATEWAY_ENGINES, which would win"
                )

    def _serves_the_same(self) -> bool:
        """Whether what callers name is still there when the old ones are gone."""
        for gateway in self._gateways:
            models: dict[str, set[str]] = {}
            for labels, _ in self._ask(gateway).get("gateway_engine_info", ()):
                models.setdefault(labels["engine"], set()).add(labels["model"])
            served, kept = (
                set().union(*(models.get(hide_password(url), set()) for url in urls)) - {""}
                for urls in (self._old, self._new)
            )
            if lost := served - kept:
                self._say(
                    f"{', '.join(sorted(lost))} would be gone from {gateway}: the new engines "
                    f"serve {', '.join(sorted(kept)) or 'nothing'}; start them with "
                    "--served-model-name"
                )
                return False
        return True

    def _list_cold(self) -> list[str]:
        """New engines that a gateway does not call ready yet."""
        return [
            f"{hide_password(url)} is not ready at {gateway}"
            for gateway in self._gateways
            for url in self._new
            if not _read(self._ask(gateway), "gateway_engine_ready", url)
        ]

    def _list_busy(self) -> list[str]:
        """Old ones that a gateway still has; it has one until that has finished."""
        return [
            f"{hide_password(url)} runs {value:.0f} sequences of {gateway}"
            for gateway in self._gateways
            for samples in (self._ask(gateway),)
            for url in self._old
            if (value := _read(samples, "gateway_engine_running_sequences", url)) is not None
        ]

    def _wait(self, list_left: Callable[[], list[str]]) -> bool:
        """Until nothing is left; tells now and then what is."""
        deadline = time.monotonic() + self._timeout_s
        tell_at = time.monotonic() + _TOLD_EVERY_S
        while True:
            try:
                left = list_left()
            except SettingsError as error:  # a gateway that is restarted comes back
                left = [str(error)]
            if not left:
                return True
            now = time.monotonic()
            if now > deadline:
                self._say(f"not within {self._timeout_s:g} s: {'; '.join(left)}")
                return False
            if now > tell_at:
                tell_at = now + _TOLD_EVERY_S
                self._say("; ".join(left))
            time.sleep(_LOOK_S)

    def _ask(self, gateway: str) -> Samples:
        try:
            answer = self._client.get(f"{gateway}/metrics").raise_for_status()
            samples = parse_samples(answer.text)
        except (httpx.HTTPError, ValueError) as error:
            raise SettingsError(
                f"{gateway}/metrics is not what a gateway answers ({_tell(error)}); --gateway says "
                "where yours listens"
            ) from None
        return {"gateway_engine_ready": [], **samples}

    def _say(self, text: str) -> None:
        self._tell(f"roll: {text}")


def _tell(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return str(error) or type(error).__name__


def _read(samples: Samples, name: str, url: str) -> float | None:
    shown = hide_password(url)
    values = [value for labels, value in samples.get(name, ()) if labels["engine"] == shown]
    return values[0] if values else None


def _check(url: str) -> str:
    try:
        return check_address(url)
    except ValueError as error:
        raise SettingsError(f"{url}: {error}") from None


def _read_engines(path: Path) -> list[str]:
    try:
        engines = tomllib.loads(read_text(path)).get("engines", [])
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
    listed = engines.split(",") if isinstance(engines, str) else engines
    if not listed or any(is_source(one) for one in listed):
        raise SettingsError(
            f"{path} lists no engines by their addresses; where DNS or Kubernetes does, a new "
            "engine joins there"
        )
    return [_check(one.strip()) for one in listed]


class _BrokenOff(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise _BrokenOff(number)

    before = {one: signal.signal(one, leave) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.executable).name} -m gateway roll",
        description="New engines in the place of those that serve, and no request lost.",
        allow_abbrev=False,
    )
    parser.add_argument("engine", nargs="+", metavar="URL", help="a new engine that runs already")
    help_ = "settings file whose `engines` the gateway follows (GATEWAY_CONFIG)"
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help=help_)
    help_ = f"a gateway that follows it; may be repeated (default: {_GATEWAY})"
    parser.add_argument("--gateway", action="append", metavar="URL", help=help_)
    help_ = "for each of the two waits (default: 600)"
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="SECONDS", help=help_)
    return parser
