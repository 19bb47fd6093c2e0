"""Who calls: API keys, what each may do, how much of it a minute, and what it has used.

Keys are kept as SHA-256 only. They are long random strings, so a fast hash is enough, and finding
one by its hash tells a guesser nothing: to time the look-up he would have to choose the hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import time
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import structlog
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.admission.ledger import Ledger, Row
from gateway.config import SETTINGS, Settings, SettingsError
from gateway.errors import Forbidden, RateLimited, Unauthorized
from gateway.observability.metrics import Metrics

log = structlog.get_logger("gateway")

# Fields of a key's row in the ledger; an allowance takes two.
_REQUESTS_LEFT, _TOKENS_LEFT, _REQUESTS, _PROMPT_TOKENS, _COMPLETION_TOKENS = 1, 3, 5, 6, 7
_BEARER = "bearer "
_KEY_PREFIX = "vg-"
_OTHERS = "(others)"  # no key can be called so


class Caller(BaseModel):
    """One key's entry in the file; the anonymous caller where there are no keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")
    hash: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$")
    lane: Literal["interactive", "batch"] | None = None
    max_concurrency: int = Field(0, ge=0)
    requests_per_minute: int = Field(0, ge=0)
    tokens_per_minute: int = Field(0, ge=0)
    models: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    admin: bool = False

    def check_route(self, route: str) -> None:
        if self.routes and route not in self.routes:
            raise Forbidden(f"this key may not use {route}", code="route_not_allowed")

    def check_model(self, model: str | None) -> None:
        if self.models and model is None:
            raise Forbidden(
                f"this key must name a model ({', '.join(self.models)})",
                param="model",
                code="model_not_allowed",
            )
        if self.models and model not in self.models:
            raise Forbidden(
                f"this key may not use the model {model!r}", param="model", code="model_not_allowed"
            )


ANONYMOUS = Caller(name="anonymous")
CALLER = web.RequestKey("caller", Caller)


class Keyring:
    """The keys as they are in the file now, and what each has left this minute."""

    def __init__(self, settings: Settings, metrics: Metrics, ledger: Ledger | None = None) -> None:
        self._ledger = ledger or Ledger()
        self._path = settings.keys_file
        self._from_environment = {
            _hash(key): Caller(name=f"key-{number}")
            for number, key in enumerate(settings.api_keys, start=1)
        }
        self._metrics = metrics
        self._most_shown = settings.metrics_keys
        self._stamp: tuple[int, int] | None = None
        self._callers: dict[str, Caller] = dict(self._from_environment)
        if self._path is not None:
            self._stamp = _stamp(self._path)
            self._callers |= read_keys(self._path)
        self._check_exposure(settings)
        metrics.usage_requests.read = self._list_requests
        metrics.usage_tokens.read = self._list_tokens

    @property
    def is_open(self) -> bool:
        return self._path is None and not self._from_environment

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """The caller by his key; `Unauthorized` says how to send one."""
        if self.is_open:
            return ANONYMOUS
        given = headers.get("Authorization", "")
        key = (
            given[len(_BEARER) :]
            if given[: len(_BEARER)].lower() == _BEARER
            else headers.get("x-api-key", "")
        ).strip()
        if not key:
            raise Unauthorized("send an API key: 'Authorization: Bearer …'", code="missing_key")
        digest = _hash(key)
        caller = self._callers.get(digest)
        if caller is None or (caller.hash and not hmac.compare_digest(caller.hash, digest)):
            raise Unauthorized("this API key is not known here", code="invalid_api_key")
        return caller

    def take_request(self, caller: Caller) -> None:
        """Counts one request against the caller's minute, or refuses it."""
        row = self._ledger.row(_row_name(caller))
        with self._ledger.lock:
            row[_REQUESTS] += 1
            if caller.tokens_per_minute:
                tokens = _Bucket(row, _TOKENS_LEFT, caller.tokens_per_minute)
                if wait_s := tokens.wait_s(0):
                    raise self._refusal(wait_s, "tokens_per_minute", caller.tokens_per_minute)
            if caller.requests_per_minute:
                requests = _Bucket(row, _REQUESTS_LEFT, caller.requests_per_minute)
                if wait_s := requests.wait_s(1):
                    raise self._refusal(wait_s, "requests_per_minute", caller.requests_per_minute)
                requests.take(1)

    def count_tokens(self, caller: Caller, prompt_tokens: int, completion_tokens: int) -> None:
        """What a request used by the engine's own count; known only when it is over."""
        self._metrics.tokens_in.inc(prompt_tokens)
        self._metrics.tokens_out.inc(completion_tokens)
        self.charge_tokens(caller, prompt_tokens, completion_tokens)

    def charge_tokens(self, caller: Caller, prompt_tokens: int, completion_tokens: int) -> None:
        """To the caller's account alone: the engine has not told these figures."""
        row = self._ledger.row(_row_name(caller))
        with self._ledger.lock:
            row[_PROMPT_TOKENS] += prompt_tokens
            row[_COMPLETION_TOKENS] += completion_tokens
            if caller.tokens_per_minute:
                bucket = _Bucket(row, _TOKENS_LEFT, caller.tokens_per_minute)
                bucket.take(prompt_tokens + completion_tokens)

    def read_usage(self) -> dict[str, dict[str, int]]:
        """Requests and tokens by key, over all workers, since the gateway started."""
        callers = [ANONYMOUS] if self.is_open else list(self._callers.values())
        rows = {caller.name: self._ledger.row(_row_name(caller)) for caller in callers}
        return {
            name: {
                "requests": int(row[_REQUESTS]),
                "prompt_tokens": int(row[_PROMPT_TOKENS]),
                "completion_tokens": int(row[_COMPLETION_TOKENS]),
            }
            for name, row in rows.items()
        }

    def _list_requests(self) -> Iterator[tuple[Sequence[str], float]]:
        for name, used in self._read_bounded_usage().items():
            yield (name,), used["requests"]

    def _list_tokens(self) -> Iterator[tuple[Sequence[str], float]]:
        for name, used in self._read_bounded_usage().items():
            yield (name, "in"), used["prompt_tokens"]
            yield (name, "out"), used["completion_tokens"]

    def _read_bounded_usage(self) -> dict[str, dict[str, int]]:
        """Thousands of keys would be thousands of series: those far down the file are one."""
        rows = list(self.read_usage().items())
        shown, rest = dict(rows[: self._most_shown]), rows[self._most_shown :]
        if rest:
            shown[_OTHERS] = {field: sum(used[field] for _, used in rest) for field in rest[0][1]}
        return shown

    def reload(self) -> None:
        """Reads the file again if it has changed; a bad file leaves the keys as they were."""
        if self._path is None:
            return
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
        except SettingsError as error:
            if self._stamp is not None:  # gone: said once, and the keys stay as they were
                self._stamp = None
                log.error("keys_not_reloaded", reason=str(error))  # noqa: TRY400 — no traceback
            return
        try:
            self._callers = self._from_environment | read_keys(self._path)
        except SettingsError as error:
            log.error("keys_not_reloaded", reason=str(error))  # noqa: TRY400 — no traceback to see
        else:
            log.info("keys_reloaded", count=len(self._callers))

    @staticmethod
    def _refusal(wait_s: float, limit: str, value: int) -> RateLimited:
        return RateLimited(
            f"this key's {limit.replace('_', ' ')} ({value}) are used up",
            code=limit,
            retry_after_s=wait_s,
        )

    def _check_exposure(self, settings: Settings) -> None:
        if self.is_open and not settings.allow_anonymous and not is_loopback(settings.host):
            raise SettingsError(
                f"listening on {settings.host} without API keys would open the engine to everybody "
                "who can reach it: set GATEWAY_KEYS_FILE or GATEWAY_API_KEYS, or say "
                "GATEWAY_ALLOW_ANONYMOUS=true"
            )


KEYRING = web.AppKey("keyring", Keyring)


async def run_key_reload(app: web.Application) -> AsyncIterator[None]:
    """Looks at the keys file for as long as the app lives."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(app[SETTINGS].reload_interval_s)
            app[KEYRING].reload()

    task = asyncio.create_task(watch())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class _Bucket:
    """A minute's allowance that refills steadily; what is taken may overdraw it.

    It lives in two fields of a shared row: the level and the time of the last refill.
    """

    def __init__(self, row: Row, field: int, per_minute: int) -> None:
        self._row, self._field, self._per_minute = row, field, per_minute

    def wait_s(self, amount: float) -> float:
        """How long until `amount` is there; with nothing asked, until the overdraft is paid."""
        missing = max(amount, 1e-9) - self._refilled()
        return missing * 60 / self._per_minute if missing > 0 else 0.0

    def take(self, amount: float) -> None:
        self._row[self._field] = self._refilled() - amount
        self._row[self._field + 1] = time.monotonic()

    def _refilled(self) -> float:
        last = self._row[self._field + 1]
        if not last:
            return float(self._per_minute)
        gained = (time.monotonic() - last) * self._per_minute / 60
        return min(float(self._per_minute), self._row[self._field] + gained)


def read_keys(path: Path) -> dict[str, Caller]:
    """The entries of a keys file by hash; `SettingsError` names the bad one."""
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"GATEWAY_KEYS_FILE: cannot read {path}: {error}") from None
    entries = data.pop("keys", [])
    if data or not isinstance(entries, list):
        raise SettingsError(f"{path}: a keys file holds [[keys]] entries and nothing else")
    callers: dict[str, Caller] = {}
    names: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        try:
            caller = Caller.model_validate(entry)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise SettingsError(f"{path}: key {number}: {field}: {problem['msg']}") from None
        if not caller.hash:
            raise SettingsError(f"{path}: key {number} ({caller.name}) has no hash")
        if caller.hash in callers or caller.name in names:
            raise SettingsError(f"{path}: key {number} ({caller.name}) is there twice")
        callers[caller.hash] = caller
        names.add(caller.name)
    return callers


def make_key(name: str) -> tuple[str, str]:
    """A new key, to be given away once, and its entry for the file."""
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    return key, f'[[keys]]\nname = "{name}"\nhash = "{_hash(key)}"\n'


def _row_name(caller: Caller) -> str:
    return f"key:{caller.name}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hash(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise SettingsError(f"GATEWAY_KEYS_FILE: cannot read {path}: {error.strerror}") from None
    return status.st_mtime_ns, status.st_ino
