"""What each key may use a minute, and what it has used since this gateway started."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from aiohttp import web

from gateway.admission.keys import Caller, Keyring
from gateway.admission.limits import Claim, Limits
from gateway.admission.throughput import Pace
from gateway.admission.tickets import explain_refusal, open_claim
from gateway.config import Settings
from gateway.observability.metrics import Metrics
from gateway.records.ledger import Ledger

_OTHERS = "(others)"  # no key can be called so
# A long answer is remembered over the next dozens.
_KEPT_OF_LONGEST = 0.95


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


@dataclass(slots=True)
class Spent:
    """By one request, so far: its tokens, and how long so many sequences ran for them."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float = 0.0
    sequences: int = 1
    model: str = ""


class Accounts:
    """One account a key, by its name."""

    def __init__(
        self,
        settings: Settings,
        keyring: Keyring,
        limits: Limits,
        metrics: Metrics,
        ledger: Ledger | None = None,
    ) -> None:
        self._ledger = ledger
        self._keyring = keyring
        self._limits = limits
        self._metrics = metrics
        self._most_shown = settings.metrics_keys
        self._settings = settings
        self._longest: defaultdict[str, float] = defaultdict(float)  # answers lately, in tokens
        self._pace = Pace()
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)
        metrics.usage_requests.read = self._list_requests
        metrics.usage_tokens.read = self._list_tokens

    async def take_request(self, caller: Caller, claim: Claim | None) -> None:
        """Counts one request against the caller's minute, or refuses it."""
        self._usage[caller.name].requests += 1
        if claim is not None and (refusal := await self._limits.count(claim)):
            raise explain_refusal(refusal, claim)

    def close_claim(self, claim: Claim) -> None:
        """For whatever a request has not settled on its way."""
        self._limits.settle(claim)

    async def count_tokens(self, caller: Caller, spent: Spent, claim: Claim | None = None) -> None:
        """What a request used by the engine's own count; known only when it is over."""
        self._metrics.tokens_in.inc(spent.prompt_tokens)
        self._metrics.tokens_out.inc(spent.completion_tokens)
        each = spent.completion_tokens / max(1, spent.sequences)
        self._pace.learn(each, spent.seconds)
        if caller.counts_tokens:
            kept = self._longest[caller.name] * _KEPT_OF_LONGEST
            self._longest[caller.name] = max(each, kept)
        self._charge(caller, claim, spent, spent.completion_tokens)

    async def charge_left(
        self,
        caller: Caller,
        told: Spent,
        most_each: int,
        ended_tokens: int = 0,
        claim: Claim | None = None,
    ) -> None:
        """What a request used whose caller left in the middle: what the engine has told of it, and
        not less than it makes in that time; beside that, what sequences have that ended before.
        """
        given = ended_tokens + self._bound_given(told, most_each)
        self._charge(caller, claim, told, given)

    async def charge_pieces(
        self,
        caller: Caller,
        told: Spent,
        pieces: Iterable[Spent],
        most_each: int,
        claim: Claim | None = None,
    ) -> None:
        """The same of a list that broke off: `told` of what has ended, or of all that was passed
        on, where that is more; of each piece that ran then, as long as it had run.
        """
        given = told.completion_tokens + sum(self._bound_given(one, most_each) for one in pieces)
        self._charge(caller, claim, told, given)

    def _bound_given(self, left: Spent, most_each: int) -> int:
        made = min(most_each, self._pace.count_tokens(left.seconds)) * left.sequences
        return max(left.completion_tokens, made)

    def expect_answer(self, caller: Caller) -> int:
        """Tokens that are set aside for an answer whose length nobody has bounded."""
        return max(self._settings.max_tokens, int(self._longest[caller.name]))

    def _charge(
        self, caller: Caller, claim: Claim | None, spent: Spent, completion_tokens: int
    ) -> None:
        """The claim is charged when it is settled, which gives back what was set aside."""
        used, prompt_tokens = self._usage[caller.name], spent.prompt_tokens
        if self._ledger is not None:
            self._ledger.add_tokens(caller.name, spent.model, prompt_tokens, completion_tokens)
        used.prompt_tokens += prompt_tokens
        used.completion_tokens += completion_tokens
        if not caller.tokens_per_minute:
            return
        if claim is None:  # nothing was set aside
            claim = open_claim(caller)
            claim.used_tokens = prompt_tokens + completion_tokens
            self._limits.settle(claim)
        else:
            claim.used_tokens += prompt_tokens + completion_tokens

    def read_usage(self) -> dict[str, Usage]:
        """Requests and tokens of every key there is, used or not."""
        return {name: self._usage.get(name, _NOTHING) for name in self._keyring.list_names()}

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
        names = self._keyring.list_names()
        first, rest = names[: self._most_shown], names[self._most_shown :]
        shown = {name: self._usage.get(name, _NOTHING) for name in first}
        if rest:
            shown[_OTHERS] = self.sum_usage(rest)
        return shown


ACCOUNTS = web.AppKey("accounts", Accounts)
