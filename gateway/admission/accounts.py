"""What each key may use a minute, and what it has used since this gateway started."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from aiohttp import web

from gateway.admission.keys import Caller, Keyring
from gateway.admission.limits import Limits
from gateway.config import Settings
from gateway.errors import RateLimited
from gateway.observability.metrics import Metrics

_OTHERS = "(others)"  # no key can be called so


@dataclass(slots=True)
class Usage:
    """Counted here and never reset; each replica counts its own."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Usage) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


_NOTHING = Usage()  # of a key that nobody has used; only read


class Accounts:
    """One account a key, by its name."""

    def __init__(
        self, settings: Settings, keyring: Keyring, limits: Limits, metrics: Metrics
    ) -> None:
        self._keyring = keyring
        self._limits = limits
        self._metrics = metrics
        self._most_shown = settings.metrics_keys
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)
        metrics.usage_requests.read = self._list_requests
        metrics.usage_tokens.read = self._list_tokens

    async def take_request(self, caller: Caller) -> None:
        """Counts one request against the caller's minute, or refuses it."""
        self._usage[caller.name].requests += 1
        if caller.tokens_per_minute:
            most = caller.tokens_per_minute
            if wait_s := await self._limits.take(f"tokens:{caller.name}", 0, most):
                raise _refusal(wait_s, "tokens_per_minute", most)
        if caller.requests_per_minute:
            most = caller.requests_per_minute
            if wait_s := await self._limits.take(f"requests:{caller.name}", 1, most):
                raise _refusal(wait_s, "requests_per_minute", most)

    async def count_tokens(
        self, caller: Caller, prompt_tokens: int, completion_tokens: int
    ) -> None:
        """What a request used by the engine's own count; known only when it is over."""
        self._metrics.tokens_in.inc(prompt_tokens)
        self._metrics.tokens_out.inc(completion_tokens)
        await self.charge_tokens(caller, prompt_tokens, completion_tokens)

    async def charge_tokens(
        self, caller: Caller, prompt_tokens: int, completion_tokens: int
    ) -> None:
        """To the caller's account alone: the engine has not told these figures."""
        used = self._usage[caller.name]
        used.prompt_tokens += prompt_tokens
        used.completion_tokens += completion_tokens
        if caller.tokens_per_minute:
            account, amount = f"tokens:{caller.name}", prompt_tokens + completion_tokens
            await self._limits.overdraw(account, amount, caller.tokens_per_minute)

    def read_usage(self) -> dict[str, Usage]:
        """Requests and tokens of every key there is, used or not."""
        callers = self._keyring.list_callers()
        return {caller.name: self._usage.get(caller.name, _NOTHING) for caller in callers}

    def sum_usage(self, names: Iterable[str] | None = None) -> Usage:
        """Of these keys, or of all."""
        total = Usage()
        rows = self.read_usage().values() if names is None else map(self._usage.get, names)
        for used in rows:
            if used is not None and used is not _NOTHING:  # most of many thousand keys
                total.add(used)
        return total

    def _list_requests(self) -> Iterator[tuple[Sequence[str], float]]:
        for name, used in self._read_bounded_usage().items():
            yield (name,), used.requests

    def _list_tokens(self) -> Iterator[tuple[Sequence[str], float]]:
        for name, used in self._read_bounded_usage().items():
            yield (name, "in"), used.prompt_tokens
            yield (name, "out"), used.completion_tokens

    def _read_bounded_usage(self) -> dict[str, Usage]:
        """Thousands of keys would be thousands of series: those far down the file are one."""
        names = [caller.name for caller in self._keyring.list_callers()]
        first, rest = names[: self._most_shown], names[self._most_shown :]
        shown = {name: self._usage.get(name, _NOTHING) for name in first}
        if rest:
            shown[_OTHERS] = self.sum_usage(rest)
        return shown


def _refusal(wait_s: float, limit: str, value: int) -> RateLimited:
    return RateLimited(
        f"this key's {limit.replace('_', ' ')} ({value}) are used up",
        code=limit,
        retry_after_s=wait_s,
    )


ACCOUNTS = web.AppKey("accounts", Accounts)
