"""What GET /usage and GET /audit ask for: from which day to which, and of whom."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

from gateway.errors import Forbidden, InvalidRequest
from gateway.records.periods import DAY_S

_MOST_DAYS = 3660
_USUALLY_LISTED, _MOST_LISTED = 100, 1000
_ID = re.compile(r"[0-9a-f]{28}")
_NUMBER = re.compile(r"[0-9]{1,9}")
_KEY = re.compile(r"[\w.@-]{1,64}")

Group = Literal["day", "month"]


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Both days included."""

    first: str
    last: str
    group: Group
    key: str | None


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """From one moment to another, and before the row `after`: the newest come first."""

    begins: float
    ends: float
    key: str | None
    limit: int
    after: str | None


def parse_usage_query(query: Mapping[str, str], own: str | None) -> UsageQuery:
    """`own` is the name of a key that may see itself alone."""
    _refuse_unknown(query, ("from", "to", "group", "key"))
    first, last = _parse_range(query, usually_month=True)
    group = query.get("group", "day")
    if group not in {"day", "month"}:
        raise InvalidRequest("group is day or month", param="group")
    which: Group = "month" if group == "month" else "day"
    key = _parse_key(query)
    if own is not None and key not in {None, own}:
        raise Forbidden(
            "this key may see what it has used itself; more needs an admin key", code="not_admin"
        )
    return UsageQuery(first.isoformat(), last.isoformat(), which, own or key)


def parse_audit_query(query: Mapping[str, str]) -> AuditQuery:
    _refuse_unknown(query, ("from", "to", "key", "limit", "after"))
    first, last = _parse_range(query, usually_month=False)
    limit = query.get("limit", str(_USUALLY_LISTED))
    if not (_NUMBER.fullmatch(limit) and 0 < int(limit) <= _MOST_LISTED):
        raise InvalidRequest(f"limit is a number from 1 to {_MOST_LISTED}", param="limit")
    after = query.get("after")
    if after is not None and not _ID.fullmatch(after):
        raise InvalidRequest("after is the id of the last row that you have", param="after")
    ends = _begin(last) + DAY_S
    return AuditQuery(_begin(first), ends, _parse_key(query), int(limit), after)


def _parse_range(query: Mapping[str, str], *, usually_month: bool) -> tuple[date, date]:
    """Until today, from the beginning of that month or day, where the query does not say."""
    first = _parse_day("from", query["from"]) if "from" in query else None
    last = _parse_day("to", query["to"]) if "to" in query else None
    if last is None:
        today = datetime.now(UTC).date()
        last = max(today, first or today)
    if first is None:
        first = last.replace(day=1) if usually_month else last
    if first > last:
        raise InvalidRequest("from lies after to", param="from")
    if (last - first).days > _MOST_DAYS:
        raise InvalidRequest(f"from and to are at most {_MOST_DAYS} days apart", param="from")
    return first, last


def _parse_day(name: str, text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day = None
    if day is None or day.isoformat() != text or day.year < 1970:
        raise InvalidRequest(f"{name} is a day of UTC, such as 2026-11-29", param=name)
    return day


def _parse_key(query: Mapping[str, str]) -> str | None:
    key = query.get("key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequest("key is the name of a key", param="key")
    return key


def _begin(day: date) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()


def _refuse_unknown(query: Mapping[str, str], known: tuple[str, ...]) -> None:
    for name in query:
        if name not in known:
            raise InvalidRequest(f"{name[:100]!r} is none of {', '.join(known)}", param=name[:100])
