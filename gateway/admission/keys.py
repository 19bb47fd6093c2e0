"""Who calls: API keys and what each may do. What they have used is `accounts.py`'s matter.

Keys are kept as SHA-256 only. They are long random strings, so a fast hash is enough, and finding
one by its hash tells a guesser nothing: to time the look-up they would have to choose the hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import tomllib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import structlog
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.files import FileWatch, read_text
from common.web.addresses import is_loopback
from gateway.config import SETTINGS, Settings, SettingsError
from gateway.errors import Forbidden, Unauthorized
from gateway.request_context import RequestContext
from gateway.schemas.constraints.grammars import Constraint, Kind

log = structlog.get_logger("gateway")

_BEARER = "bearer "
_KEY_PREFIX = "vg-"
_NAME_DIGITS = 8


class Caller(BaseModel):
    """One key's entry in the file; the anonymous caller where there are no keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")
    hash: str = Field("", pattern=r"^(sha256:[0-9a-f]{64})?$")
    lane: Literal["interactive", "batch"] | None = None
    max_concurrency: int = Field(0, ge=0)
    requests_per_minute: int = Field(0, ge=0)
    tokens_per_minute: int = Field(0, ge=0)
    tokens_per_day: int = Field(0, ge=0)
    tokens_per_month: int = Field(0, ge=0)
    audit_text: bool = False
    audit_sample: float = Field(1.0, ge=0, le=1)  # of the requests whose texts are kept
    models: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    structured_outputs: tuple[Kind, ...] | None = None  # as the setting says
    batch_max_jobs: int = Field(0, ge=0)  # that have not ended
    batch_max_lines: int = Field(0, ge=0)
    batch_max_stored_bytes: int = Field(0, ge=0)
    batch_retention_days: float = Field(0, ge=0)
    admin: bool = False

    @cached_property
    def has_limits(self) -> bool:
        return bool(self.requests_per_minute or self.counts_tokens or self.max_concurrency)

    @cached_property
    def counts_tokens(self) -> bool:
        """So what a call may come to use is set aside."""
        return bool(self.tokens_per_minute or self.has_budgets)

    @cached_property
    def has_budgets(self) -> bool:
        return bool(self.tokens_per_day or self.tokens_per_month)

    @property
    def text_share(self) -> float:
        """Of how many of its requests prompt and answer are kept."""
        return self.audit_sample if self.audit_text else 0.0

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

    def check_constraints(self, constraints: Iterable[Constraint], usual: Sequence[str]) -> None:
        """`usual` is for keys that say nothing of their own."""
        allowed = usual if self.structured_outputs is None else self.structured_outputs
        for one in constraints:
            if one.kind not in allowed:
                raise Forbidden(
                    f"{one.param}: this key may not constrain answers by {one.kind!r}; the "
                    "operator can allow it with structured_outputs in the keys file, or for "
                    "everybody with GATEWAY_STRUCTURED_OUTPUTS",
                    param=one.param,
                    code="constraint_not_allowed",
                )


# By hash, as they are in the file: a `Caller` for each would be fifty thousand objects more for the
# garbage collector to look through, which holds the event loop as long as that takes.
Entries = dict[str, dict[str, Any]]

ANONYMOUS = Caller(name="anonymous")
CALLER = web.RequestKey("caller", Caller)


class Keyring:
    """The keys as they are in the file now, and what is being answered for those in it."""

    def __init__(self, settings: Settings) -> None:
        self._file = FileWatch(settings.keys_file) if settings.keys_file else None
        hashes = map(_hash, settings.api_keys)
        self._from_environment = {one: Caller(name=_name_by_hash(one)) for one in hashes}
        self._settings = settings
        self._callers = dict(self._from_environment)  # and those of the file who have called
        self._entries: Entries = {}
        self._digests: dict[str, str] = {}  # by name
        self._open: dict[asyncio.Task[Any], tuple[Caller, RequestContext]] = {}
        if self._file is not None:
            self._file.has_changed()  # before it is read
            self._take(*self._read(self._file.path))
        self._check_exposure(settings)

    @property
    def is_open(self) -> bool:
        return self._file is None and not self._from_environment

    def list_names(self) -> list[str]:
        """Of all callers that there may be, those of the environment first."""
        if self.is_open:
            return [ANONYMOUS.name]
        own = [caller.name for caller in self._from_environment.values()]
        return own + [entry["name"] for entry in self._entries.values()]

    def find_named(self, name: str) -> Caller | None:
        """Whose batch it is, if there still is such a key."""
        if self.is_open:
            return ANONYMOUS if name == ANONYMOUS.name else None
        own = (one for one in self._from_environment.values() if one.name == name)
        digest = self._digests.get(name)
        return next(own, None) or (self._find(digest) if digest else None)

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """The caller by their key; `Unauthorized` says how to send one."""
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
        caller = self._callers.get(digest) or self._find(digest)
        if caller is None or (caller.hash and not hmac.compare_digest(caller.hash, digest)):
            raise Unauthorized("this API key is not known here", code="invalid_api_key")
        return caller

    def _find(self, digest: str) -> Caller | None:
        entry = self._entries.get(digest)
        if entry is None:
            return None
        caller = self._callers[digest] = Caller.model_validate(entry)
        return caller

    def open_call(self, caller: Caller, context: RequestContext) -> None:
        """What is being answered ends with its key. Keys of the environment do not change."""
        if caller.hash and (task := asyncio.current_task()) is not None:
            self._open[task] = caller, context

    def close_call(self) -> None:
        if self._open:
            self._open.pop(asyncio.current_task(), None)  # type: ignore[arg-type]  # None is no key

    async def reload(self) -> None:
        """Reads the file again if it has changed; a bad file leaves the keys as they were.

        In a thread: fifty thousand entries take a second. Meanwhile the old ones hold.
        """
        if self._file is None or not self._file.has_changed():
            return
        try:
            read = await asyncio.to_thread(self._read, self._file.path)
        except SettingsError as error:  # one that is gone is told once, too
            log.error("keys_not_reloaded", reason=str(error))  # noqa: TRY400 — no traceback to see
        else:
            self._take(*read)
            self._callers = dict(self._from_environment)
            log.info("keys_reloaded", count=len(self._entries) + len(self._from_environment))
            self._end_revoked()

    def _end_revoked(self) -> None:
        for task, (caller, context) in self._open.items():
            if caller.hash not in self._entries and context.ended_by is None:
                context.ended_by = Unauthorized(
                    "this API key has been withdrawn; what it had asked for ends here",
                    code="key_revoked",
                )
                task.cancel()

    def _take(self, entries: Entries, digests: dict[str, str]) -> None:
        self._entries, self._digests = entries, digests

    def _read(self, path: Path) -> tuple[Entries, dict[str, str]]:
        """What is in the environment as well would have two limits."""
        entries = read_keys(path)
        names = {entry["name"] for entry in entries.values()}
        self._check_kept(path, entries)
        for digest, caller in self._from_environment.items():
            if caller.name in names:
                raise SettingsError(
                    f"{path}: {caller.name} is the name of a key of GATEWAY_API_KEYS; give the "
                    "file's another name"
                )
            if digest in entries:
                raise SettingsError(
                    f"{path}: the key of {entries[digest]['name']} is in GATEWAY_API_KEYS too; "
                    "take it out there"
                )
        return entries, {entry["name"]: digest for digest, entry in entries.items()}

    def _check_kept(self, path: Path, entries: Entries) -> None:
        """What an entry asks to be kept has to be kept somewhere."""
        settings = self._settings
        for entry in entries.values():
            if not settings.usage_database and (
                entry.get("tokens_per_day") or entry.get("tokens_per_month")
            ):
                raise SettingsError(
                    f"{path}: {entry['name']} has tokens_per_day or tokens_per_month, which need "
                    "GATEWAY_USAGE_DATABASE"
                )
            if not settings.audit and entry.get("audit_text"):
                raise SettingsError(
                    f"{path}: {entry['name']} has audit_text, which needs GATEWAY_AUDIT=true"
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
            await app[KEYRING].reload()

    task = asyncio.create_task(watch())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def read_keys(path: Path) -> Entries:
    """The entries of a keys file by hash, checked; `SettingsError` names the bad one."""
    try:
        data: dict[str, Any] = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"GATEWAY_KEYS_FILE: cannot read {path}: {error}") from None
    entries = data.pop("keys", [])
    if data or not isinstance(entries, list):
        raise SettingsError(f"{path}: a keys file holds [[keys]] entries and nothing else")
    checked: Entries = {}
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
        if caller.hash in checked or caller.name in names:
            raise SettingsError(f"{path}: key {number} ({caller.name}) is there twice")
        checked[caller.hash] = entry
        names.add(caller.name)
    return checked


def make_key(name: str) -> tuple[str, str]:
    """A new key, to be given away once, and its entry for the file."""
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    return key, f'[[keys]]\nname = "{name}"\nhash = "{_hash(key)}"\n'


def _name_by_hash(hashed: str) -> str:
    """Files and batches are their key's by its name: by its place in the list they would pass to
    another key when one before it is taken out.
    """
    return f"key-{hashed.removeprefix('sha256:')[:_NAME_DIGITS]}"


def _hash(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
