"""What is to be kept and is not written yet, and what of each budget is known to be used.

Here the serving path ends: it adds to dictionaries and lists of bounded size and waits for nothing.
`service.py` takes what has gathered and tells what the database says then, so what a key has used
is what was read last, what is on its way there, and what has come since.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web

from gateway.observability.metrics import Metrics
from gateway.observability.request_record import RequestRecord
from gateway.records.periods import Calendar

_MOST_SUMS = 100_000
_MOST_ROWS = 10_000
_MOST_HELD_BYTES = 64 * 2**20  # of texts that wait
_MOST_TEXT_BYTES = 2**20  # of one request's body, or of its answer
_ROWS_AT_ONCE = 500
_MOST_TOKENS = 2**40  # of one request; an engine that tells more is out of its mind
_GONE = 499

SumKey = tuple[str, str, str]  # day, key, model
SpentKey = tuple[str, str]  # day or month, key


@dataclass(slots=True)
class Sums:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    batch_lines: int = 0


@dataclass(slots=True)
class Entry:
    """One request of a known key, while it is answered."""

    key: str
    is_audited: bool = False
    wants_text: bool = False
    model: str = ""
    prompt_bytes: int = 0
    answer_bytes: int = 0
    prompt: bytes | None = None  # its body
    answer: list[bytes] = field(default_factory=list)  # the answer's, or a stream's events
    is_cut: bool = False  # of the answer there was more

    def note_prompt(self, body: bytes) -> None:
        self.prompt_bytes = len(body)
        if self.wants_text and len(body) <= _MOST_TEXT_BYTES:
            self.prompt = body

    def note_answer(self, data: bytes) -> None:
        """For each chunk of a stream, so only this."""
        self.answer_bytes += len(data)
        if not self.wants_text:
            return
        if self.answer_bytes <= _MOST_TEXT_BYTES:
            self.answer.append(data)
        else:
            self.is_cut = True

    @property
    def held_bytes(self) -> int:
        return len(self.prompt or b"") + sum(map(len, self.answer))

    def drop_texts(self) -> None:
        self.prompt = None
        self.answer = []
        self.wants_text = False


@dataclass(slots=True)
class AuditRow:
    """One request that has been answered; its texts are made ready where nobody waits."""

    id: str
    time_ms: int
    route: str
    request_id: str
    status: int
    verdict: str
    prompt_tokens: int | None
    completion_tokens: int | None
    duration_ms: int
    entry: Entry


@dataclass(slots=True)
class Batch:
    """What is written in one go, as often as it takes, and counted once."""

    number: int
    sums: dict[SumKey, Sums]
    spent: dict[SpentKey, int]
    rows: list[AuditRow]

    @property
    def is_empty(self) -> bool:
        return not (self.sums or self.spent or self.rows)


class Ledger:
    """Of one gateway; `None` stands in its place where nothing is kept."""

    def __init__(self, metrics: Metrics, *, audits: bool) -> None:
        self._audits = audits
        self._calendar = Calendar()
        self._sums: dict[SumKey, Sums] = {}
        self._spent: Counter[SpentKey] = Counter()
        self._rows: list[AuditRow] = []
        self._written: Mapping[SpentKey, int] = {}  # on its way
        self._known: dict[SpentKey, int] = {}
        self._known_of = self._calendar.today()
        self._held_bytes = 0
        self._number = 0
        self._dropped = metrics.records_dropped
        metrics.records_waiting.read = lambda: [
            (("usage",), len(self._sums)),
            (("audit",), len(self._rows)),
        ]

    def open(self, key: str, text_share: float) -> Entry:
        """Of `text_share` of the requests the texts are kept, too."""
        is_audited = self._audits
        wants_text = is_audited and text_share > 0 and random.random() < text_share  # noqa: S311
        return Entry(key, is_audited, wants_text)

    def add_tokens(self, key: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        prompt_tokens = min(prompt_tokens, _MOST_TOKENS)
        completion_tokens = min(completion_tokens, _MOST_TOKENS)
        day, month = self._calendar.today()
        if (sums := self._find(day, key, model)) is not None:
            sums.prompt_tokens += prompt_tokens
            sums.completion_tokens += completion_tokens
        self._spent[day, key] += prompt_tokens + completion_tokens
        self._spent[month, key] += prompt_tokens + completion_tokens

    def close(
        self,
        entry: Entry,
        request_id: str,
        record: RequestRecord,
        status: int,
        *,
        is_line: bool = False,
    ) -> None:
        """The request has been answered, or is a line of a batch that has."""
        if (sums := self._find(self._calendar.today()[0], entry.key, entry.model)) is not None:
            if is_line:
                sums.batch_lines += 1
            else:
                sums.requests += 1
        if entry.is_audited:
            self._add_row(entry, request_id, record, status)

    def _add_row(self, entry: Entry, request_id: str, record: RequestRecord, status: int) -> None:
        if len(self._rows) >= _MOST_ROWS:
            self._dropped.labels("audit").inc()
            return
        if entry.wants_text:
            size = entry.held_bytes
            if self._held_bytes + size > _MOST_HELD_BYTES:
                self._dropped.labels("text").inc()
                entry.drop_texts()
            else:
                self._held_bytes += size
        now_ns = time.time_ns()
        row = AuditRow(
            id=f"{now_ns:016x}{random.getrandbits(48):012x}",
            time_ms=now_ns // 1_000_000,
            route=record.route,
            request_id=request_id,
            status=status,
            verdict=record.error_code or _judge(status),
            prompt_tokens=_bound(record.prompt_tokens),
            completion_tokens=_bound(record.completion_tokens),
            duration_ms=round(record.elapsed_s() * 1000),
            entry=entry,
        )
        self._rows.append(row)

    def find_spent(self, key: str, *, month: bool) -> int:
        """Tokens of this day, or of this month, by all gateways as far as is known."""
        period = self._calendar.today()[month], key
        return self._known.get(period, 0) + self._written.get(period, 0) + self._spent[period]

    @property
    def has_much(self) -> bool:
        """More audit rows than go in one write."""
        return len(self._rows) >= _ROWS_AT_ONCE

    def take(self) -> Batch:
        """All that has gathered, but for rows: some at a time."""
        self._number += 1
        rows = self._rows[:_ROWS_AT_ONCE]
        del self._rows[: len(rows)]
        batch = Batch(self._number, self._sums, dict(self._spent), rows)
        self._written = batch.spent
        self._sums, self._spent = {}, Counter()
        return batch

    def note_written(self, batch: Batch, spent: Mapping[SpentKey, int]) -> None:
        """The batch is there for good; `spent` is what all have used where that has changed."""
        today = self._calendar.today()
        if today != self._known_of:
            self._known_of = today
            self._known = {one: n for one, n in self._known.items() if one[0] in today}
        self._known.update(spent)
        self._written = {}
        self._held_bytes -= sum(row.entry.held_bytes for row in batch.rows)

    def count_waiting(self) -> int:
        return len(self._sums) + len(self._rows)

    def _find(self, day: str, key: str, model: str) -> Sums | None:
        place = day, key, model
        sums = self._sums.get(place)
        if sums is None:
            if len(self._sums) >= _MOST_SUMS:
                self._dropped.labels("usage").inc()
                return None
            sums = self._sums[place] = Sums()
        return sums


def _bound(tokens: int | None) -> int | None:
    return None if tokens is None else min(tokens, _MOST_TOKENS)


def _judge(status: int) -> str:
    if status == _GONE:
        return "caller_gone"
    return f"http_{status}" if status >= 400 else "ok"


LEDGER: web.AppKey[Ledger | None] = web.AppKey("ledger")
