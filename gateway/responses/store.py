"""What is asked of the table of responses. Who asks for another's is told that there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from sqlalchemy import CTE, ColumnElement, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.config import Settings
from gateway.errors import InvalidRequest, NotFound
from gateway.responses.event_log import Piece
from gateway.responses.follower import StoredEvents
from gateway.responses.shapes import OPEN, Told, build_failed, join_output
from gateway.responses.turns import Turn, refuse_previous
from gateway.storage.database import Database
from gateway.storage.rows import DAY_S, lock_owner
from gateway.storage.tables import RESPONSE_EVENTS, RESPONSES

_ROWS_AT_ONCE = 200
_PIECES_AT_ONCE = 50
_NO_EVENTS: Mapping[str, Piece] = {}
_TABLE = RESPONSES.c
_EVENTS = RESPONSE_EVENTS.c
_IS_OPEN = _TABLE.status.in_(OPEN)


@dataclass(frozen=True, slots=True)
class Parent:
    """The response that another one goes on from."""

    id: str
    depth: int
    context_bytes: int


@dataclass(frozen=True, slots=True)
class OpenRow:
    """A background response that has not ended, and who runs it."""

    id: str
    worker: str
    beat: int


class Store:
    """Of one gateway, which is known by its name; all of them may share the table."""

    def __init__(self, database: Database, settings: Settings, worker: str) -> None:
        self._database, self.worker = database, worker
        self._kept_s = settings.responses_retention_days * DAY_S
        self._most, self._most_bytes = (
            settings.responses_max_stored,
            settings.responses_max_stored_bytes,
        )

    async def ensure_there(self) -> None:
        """Else `StorageUnavailable` says that it is not."""
        async with self._database.read() as connection:
            await connection.execute(select(1))

    async def find_parent(self, owner: str, response_id: str) -> Parent:
        query = select(_TABLE.status, _TABLE.depth, _TABLE.context_bytes)
        query = query.where(_is_there(owner, response_id))
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise refuse_previous(response_id)
        if row.status in OPEN:
            raise InvalidRequest(
                f"{response_id} has not ended yet: it is {row.status}",
                param="previous_response_id",
                code="previous_response_not_ended",
            )
        return Parent(response_id, row.depth, row.context_bytes)

    async def read_conversation(self, owner: str, parent: Parent) -> list[bytes]:
        """Lists of items, as they were sent and answered in turn."""
        chain = _find_chain(owner, parent.id)
        query = select(_TABLE.input, _TABLE.output).join(chain, chain.c.id == _TABLE.id)
        async with self._database.read() as connection:
            rows = (await connection.execute(query.order_by(_TABLE.depth))).all()
        if len(rows) < parent.depth:
            raise refuse_previous(parent.id, "An earlier one of its conversation has been deleted.")
        return [part for row in rows for part in (row.input, row.output)]

    async def list_inputs(
        self, owner: str, response_id: str, hold: Callable[[int], None]
    ) -> list[tuple[str, bytes]]:
        """What the engine was given: inputs, and the outputs of earlier turns, with their ids. How
        many bytes these may have is told before they are read.
        """
        chain = _find_chain(owner, response_id)
        query = select(_TABLE.id, _TABLE.input, _TABLE.output)
        query = query.join(chain, chain.c.id == _TABLE.id).order_by(_TABLE.depth)
        async with self._database.read() as connection:
            hold((await _find(connection, owner, response_id)).context_bytes)
            rows = (await connection.execute(query)).all()
        lists = [
            one for row in rows for one in ((row.id, row.input), (f"{row.id}_out", row.output))
        ]
        return lists[:-1]

    async def add(self, turn: Turn, told: Told, events: Piece | None = None) -> None:
        """As it is now; it makes room where its owner has too many."""
        now = int(time.time())
        context_bytes = turn.input_bytes + len(told.output)
        row = {
            "id": turn.id,
            "owner": turn.owner,
            "previous_id": turn.previous_id,
            "status": told.status,
            "is_background": turn.is_background,
            "created_at": now,
            "expires_at": now + int(self._kept_s),
            "depth": turn.depth,
            "bytes": context_bytes + len(told.rest),
            "context_bytes": turn.context_bytes + context_bytes,
            "worker": self.worker if told.status in OPEN else "",
            "beat": 0,
            "input": turn.input,
            "output": told.output,
            "response": told.rest,
        }
        async with self._database.write() as connection:
            await lock_owner(connection, turn.owner)
            await connection.execute(insert(RESPONSES), row)
            if events is not None:
                await _add_events(connection, {turn.id: events})
            await self._make_room(connection, turn.owner, turn.id)

    async def _make_room(self, connection: AsyncConnection, owner: str, newest: str) -> None:
        """Where nothing goes on from, and nothing else rests longer, is let go of first."""
        query = select(func.count(), func.coalesce(func.sum(_TABLE.bytes), 0))
        count, size = (await connection.execute(query.where(_TABLE.owner == owner))).one()
        more, more_bytes = count - self._most, int(size) - self._most_bytes
        ends = and_(_TABLE.owner == owner, _TABLE.id != newest, ~_IS_OPEN, _is_end())
        oldest = select(_TABLE.id, _TABLE.bytes).where(ends).order_by(_TABLE.id)
        while more > 0 or more_bytes > 0:
            gone: list[str] = []
            for row in (await connection.execute(oldest.limit(_ROWS_AT_ONCE))).all():
                if more > 0 or more_bytes > 0:
                    gone.append(row.id)
                    more, more_bytes = more - 1, more_bytes - row.bytes
            if not gone:
                return
            await connection.execute(delete(RESPONSES).where(_TABLE.id.in_(gone)))

    async def find(self, owner: str, response_id: str) -> bytes:
        async with self._database.read() as connection:
            row = await _find(connection, owner, response_id)
        return await join_output(row.response, row.status, row.output)

    async def delete(self, owner: str, response_id: str) -> None:
        async with self._database.write() as connection:
            await _find(connection, owner, response_id)
            await connection.execute(delete(RESPONSES).where(_TABLE.id == response_id))

    async def cancel(self, owner: str, response_id: str) -> bytes:
        """One that has ended stays as it is."""
        async with self._database.write() as connection:
            row = await _find(connection, owner, response_id)
            if not row.is_background:
                raise InvalidRequest(
                    "Cannot cancel a synchronous response.",
                    param="response_id",
                    code="not_in_background",
                )
            change = update(RESPONSES).where(_TABLE.id == response_id, _IS_OPEN)
            await connection.execute(change.values(status="cancelled", worker=""))
            row = await _find(connection, owner, response_id)
        return await join_output(row.response, row.status, row.output)

    async def end(self, turn: Turn, told: Told, events: Piece | None = None) -> bool:
        """Whether it was still ours to end: else it has been cancelled, deleted or given up. The
        last of its events come with it.
        """
        context_bytes = turn.input_bytes + len(told.output)
        values = {
            "status": told.status,
            "output": told.output,
            "response": told.rest,
            "bytes": context_bytes + len(told.rest) + _sum_events(turn.id),
            "context_bytes": turn.context_bytes + context_bytes,
            "worker": "",
        }
        mine = and_(_TABLE.id == turn.id, _TABLE.worker == self.worker, _IS_OPEN)
        async with self._database.write() as connection:
            # It holds the row: nobody deletes it before its events are there.
            is_mine = select(_TABLE.id).where(mine).with_for_update()
            if (await connection.execute(is_mine)).one_or_none() is None:
                return False
            if events is not None:
                await _add_events(connection, {turn.id: events})
            await connection.execute(update(RESPONSES).where(mine).values(**values))
            return True

    async def look(
        self,
        running: Collection[str],
        entered: Collection[str],
        events: Mapping[str, Piece] = _NO_EVENTS,
    ) -> list[OpenRow]:
        """Shows that those that we run live, which of them have begun, and what some of them have
        told; returns all that are open, whoever runs them.
        """
        query = select(_TABLE.id, _TABLE.worker, _TABLE.beat).where(_IS_OPEN)
        if not running:
            async with self._database.read() as connection:
                return [OpenRow(*row) for row in await connection.execute(query)]
        mine = and_(_TABLE.worker == self.worker, _IS_OPEN)
        beat = update(RESPONSES).where(mine).values(beat=_TABLE.beat + 1)
        async with self._database.write() as connection:
            await connection.execute(beat)
            if entered:
                began = and_(mine, _TABLE.id.in_(list(entered)))
                await connection.execute(
                    update(RESPONSES).where(began).values(status="in_progress")
                )
            if events:  # of those whose rows are held by now
                held = set((await connection.execute(select(_TABLE.id).where(mine))).scalars())
                told = {name: piece for name, piece in events.items() if name in held}
                await _add_events(connection, told)
            return [OpenRow(*row) for row in await connection.execute(query)]

    async def read_events(self, owner: str, response_id: str, after: int) -> StoredEvents:
        """Those after one of them, or the next some; none of what is no stream."""
        query = select(_EVENTS.number, _EVENTS.count, _EVENTS.size, _EVENTS.packed)
        later = and_(_EVENTS.response_id == response_id, _EVENTS.number + _EVENTS.count > after + 1)
        query = query.where(later).order_by(_EVENTS.number).limit(_PIECES_AT_ONCE)
        async with self._database.read() as connection:
            # First: of one that has ended all of them are there.
            status = (await _find(connection, owner, response_id, _TABLE.status)).status
            rows = (await connection.execute(query)).all()
        return StoredEvents(status, [Piece(*row) for row in rows])

    async def count_events(self, response_id: str) -> int:
        query = select(func.coalesce(func.sum(_EVENTS.count), 0))
        async with self._database.read() as connection:
            found = await connection.execute(query.where(_EVENTS.response_id == response_id))
            return int(found.scalar_one())

    async def give_up(self, row: OpenRow, message: str) -> bool:
        """For one whose gateway is gone, if it has not moved since it was looked at."""
        still = and_(
            _TABLE.id == row.id, _TABLE.worker == row.worker, _TABLE.beat == row.beat, _IS_OPEN
        )
        async with self._database.write() as connection:
            query = select(_TABLE.response).where(still).with_for_update()
            told = (await connection.execute(query)).scalar_one_or_none()
            if told is None:
                return False
            failed = orjson.dumps(build_failed(orjson.loads(told), 503, message))
            change = update(RESPONSES).where(still)
            await connection.execute(change.values(status="failed", response=failed, worker=""))
            return True

    async def sweep(self) -> None:
        """Whose time is over, unless another one goes on from it: the last ones first."""
        ends = and_(_TABLE.expires_at <= int(time.time()), ~_IS_OPEN, _is_end())
        old = select(_TABLE.id).where(ends).limit(_ROWS_AT_ONCE)
        while True:
            async with self._database.write() as connection:
                done = await connection.execute(delete(RESPONSES).where(_TABLE.id.in_(old)))
            if done.rowcount == 0:
                return

    async def close(self) -> None:
        await self._database.close()


def _is_there(owner: str, response_id: str) -> ColumnElement[bool]:
    own = and_(_TABLE.id == response_id, _TABLE.owner == owner)
    return and_(own, or_(_TABLE.expires_at > int(time.time()), _IS_OPEN))


def _is_end() -> ColumnElement[bool]:
    """Nothing goes on from it."""
    later = RESPONSES.alias()
    return ~exists().where(later.c.previous_id == _TABLE.id)


def _find_chain(owner: str, response_id: str) -> CTE:
    """It and all that it goes on from."""
    first = select(_TABLE.id, _TABLE.previous_id)
    first = first.where(_TABLE.id == response_id, _TABLE.owner == owner)
    chain = first.cte("chain", recursive=True)
    before = select(_TABLE.id, _TABLE.previous_id).join(chain, chain.c.previous_id == _TABLE.id)
    return chain.union_all(before.where(_TABLE.owner == owner))


async def _find(
    connection: AsyncConnection, owner: str, response_id: str, *columns: ColumnElement[Any]
) -> Any:
    query = select(*columns or (RESPONSES,)).where(_is_there(owner, response_id))
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound(
            f"Response with id '{response_id}' not found.",
            param="response_id",
            code="response_not_found",
        )
    return row


async def _add_events(connection: AsyncConnection, told: Mapping[str, Piece]) -> None:
    """Of responses that are there; they count among what these take."""
    rows = [{"response_id": name, **asdict(piece)} for name, piece in told.items()]
    if not rows:
        return
    await connection.execute(insert(RESPONSE_EVENTS), rows)
    for name, piece in told.items():
        more = update(RESPONSES).where(_TABLE.id == name)
        await connection.execute(more.values(bytes=_TABLE.bytes + piece.size))


def _sum_events(response_id: str) -> Any:
    query = select(func.coalesce(func.sum(_EVENTS.size), 0))
    return query.where(_EVENTS.response_id == response_id).scalar_subquery()
