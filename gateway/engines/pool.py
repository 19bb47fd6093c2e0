"""The engines behind this gateway: which there are, which model each serves, which one gets a call,
waiting for one.

The engines of a model are a pool of their own: its calls go to one of these and to no other. What
it serves an engine says itself; until it has, it may come to serve any model.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from aiohttp import web

from gateway.config import Settings
from gateway.engines.attempt import Attempt, EngineCall
from gateway.engines.engine import Engine, EngineState, hash_text
from gateway.engines.timeouts import Deadline
from gateway.errors import DeadlineUnreachable, Unavailable
from gateway.observability.metrics import Metrics
from gateway.schemas.vllm import ModelCard

# An affinity gives way when its engine has this much more than its share; but not where that is
# next to nothing, which is half of what it runs at once, and so many sequences at most.
_AFFINITY_SLACK = 1.25
_FEW_SEQUENCES = 8
_SHORTEST_RETRY_AFTER_S = 1.0
# An engine that has been away for less may just not have answered one look at it.
_BLIP_S = 3.0
_BREAKER_MARGIN_S = 0.01
_FORGET_MARGIN_S = 0.01
_LOOK_S = 60.0
_MOST_TOLD = 8  # engines in a message: hundreds would be a page for each caller
_LOAD = attrgetter("running")
_64_BITS = 2**64 - 1


@dataclass(slots=True)
class _Shared:
    """What all pools of a gateway have in common."""

    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    changes: int = 0
    draining: bool = False

    def tell(self) -> None:
        """Whoever waits for an engine looks anew; held by who has changed something."""
        self.changes += 1
        self.changed.notify_all()


class ModelPool:
    """Several engines as one: those of a model, and those that have not said yet what they serve.
    Without a name it is for whatever they will serve.
    """

    def __init__(
        self,
        name: str,
        engines: Iterable[Engine],
        settings: Settings,
        metrics: Metrics,
        shared: _Shared,
        *,
        base: str = "",
    ) -> None:
        """With a `base` it is for another name of that model's, which some of its engines know."""
        self.name = name
        self.base = base
        self.engines = list(engines)
        self._settings = settings
        self._metrics = metrics
        self._shared = shared
        self._changed = shared.changed
        # Those that are ready, as of the last change: of hundreds, a call cannot ask each.
        self._ready: list[Engine] = []
        self._ready_at = -1
        self._last_max_model_len: int | None = None
        self.held = 0  # calls that wait for an engine
        # Whoever must know how many sequences the engines run at once; `None`: nobody does.
        self.on_capacity: Callable[[int | None], None] = lambda _sequences: None

    def attempt(self, call: EngineCall) -> Attempt:
        """`async with pool.attempt(call) as answer`: the one way to have an engine work."""
        return Attempt(self, self._metrics, call)

    @property
    def is_ready(self) -> bool:
        """Whether a request that comes now would be served."""
        return not self._shared.draining and self.has_engine

    @property
    def has_engine(self) -> bool:
        """Whether one is ready, though the gateway may be stopping."""
        for engine in self._list_ready():  # noqa: SIM110 — a generator costs each call more
            if engine.is_usable:
                return True
        return False

    def count_usable(self, most: int) -> int:
        """Engines that would take a call, as far as that matters."""
        usable = (one for one in self._list_ready() if one.is_usable)
        return sum(1 for _ in itertools.islice(usable, most))

    def _list_ready(self) -> list[Engine]:
        if self._ready_at != self._shared.changes:
            self._ready = [one for one in self.engines if one.state is EngineState.READY]
            self._ready_at = self._shared.changes
        return self._ready

    def describe(self) -> str:
        """One line for people: why there is no engine to be had."""
        if self._shared.draining:
            return "the gateway is stopping"
        told = [f"{one.url} is {one.state}: {one.reason}" for one in self.engines[:_MOST_TOLD]]
        if (further := len(self.engines) - _MOST_TOLD) > 0:
            told.append(f"and {further} more")
        return "; ".join(told) or "no engine is listed"

    def tell_capacity(self) -> None:
        """After every change: of the engines that serve, or of all while none does. Without any it
        stays: who waits for one to come must get as far as to be held for it.
        """
        if not self.engines:
            return
        ready = [one for one in self.engines if one.state is EngineState.READY] or self.engines
        known = [one.sequences for one in ready if one.sequences is not None]
        self.on_capacity(sum(known) if len(known) == len(ready) else None)

    async def wait_ready(self, timeout_s: float) -> bool:
        return await self.wait_until(lambda: self.has_engine, timeout_s)

    async def wait_until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Looks anew whenever an engine's state or the list of engines has changed."""
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while not holds():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                # A breaker that closes by itself notifies nobody.
                breakers = (engine.breaker_left_s for engine in self._list_ready())
                breaker_s = min(breakers, default=left_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, breaker_s + _BREAKER_MARGIN_S)):
                        await self._changed.wait()
        return True

    async def wait_held(self, holds: Callable[[], bool]) -> None:
        """The same however long it takes, counted as a call that waits for an engine."""
        self.held += 1
        try:
            while not await self.wait_until(holds, _LOOK_S):
                pass
        finally:
            self.held -= 1

    async def ensure_ready(self, deadline: float | None) -> None:
        """Held for a while when no engine is ready, as during a restart; then `Unavailable`.

        The deadline, on the loop's clock, is of use here for a refusal alone: who would wait in
        vain is told so at once.
        """
        if self.has_engine:
            return
        if deadline is not None:
            self._check_deadline(deadline)
        self.held += 1
        try:
            is_ready = await self.wait_ready(self._settings.restart_hold_s)
        finally:
            self.held -= 1
        if not is_ready:
            raise Unavailable(
                f"no engine is ready: {self.describe()}", retry_after_s=self._retry_after_s()
            )

    def read_card(self) -> ModelCard | None:
        """What a usable engine says of the model that it serves."""
        return next((engine.card for engine in self.engines if engine.is_usable), None)

    @property
    def max_model_len(self) -> int | None:
        """The longest context of the engines, where it is known; while there are none, the last."""
        told = max((engine.max_model_len or 0 for engine in self.engines), default=0)
        return told or self._last_max_model_len

    def change_engines(self, engines: Sequence[Engine]) -> None:
        # One that has just told of another model leaves: what that takes says nothing of this one.
        self.engines = [one for one in self.engines if not one.card or one.card.name == self.name]
        self._last_max_model_len = self.max_model_len
        self.engines = list(engines)

    async def find_max_model_len(self, deadline: float | None) -> int | None:
        """The same; held while none has told what it serves."""
        if not any(engine.card for engine in self.engines):
            async with Deadline(deadline):
                await self.ensure_ready(deadline)
        return self.max_model_len

    async def acquire(
        self, affinity: str = "", avoid: Engine | None = None, deadline: float | None = None
    ) -> Engine:
        """An engine to send to, once there is one."""
        await self.ensure_ready(deadline)
        return self.engines[0] if len(self.engines) == 1 else self._choose(affinity, avoid)

    def has_other(self, engine: Engine) -> bool:
        """Whether another one would take what this one was too busy for."""
        return any(
            one is not engine and one.is_usable and not one.is_busy for one in self._list_ready()
        )

    async def wait_looked_at(self, engine: Engine) -> None:
        """Before a call is sent again: is the engine that failed it still in the same life?"""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.restart_hold_s):
                    while engine.suspect.is_set() and not self.has_other(engine):
                        await self._changed.wait()

    def _check_deadline(self, deadline: float) -> None:
        left_s = deadline - asyncio.get_running_loop().time()
        now = time.monotonic()
        if left_s <= 0 or any(now - one.down_since < _BLIP_S for one in self.engines):
            return  # it is over, which is said elsewhere; or a look was missed, and nothing starts
        if self._expected_start_s(usual_s=0.0) > left_s:  # by what was learnt here, or not at all
            raise DeadlineUnreachable(
                f"no engine is ready before the deadline in {max(0.0, left_s):.1f} s: "
                f"{self.describe()}",
                retry_after_s=self._retry_after_s(),
            )

    def _expected_start_s(self, usual_s: float) -> float:
        return min((one.expected_start_s(usual_s) for one in self.engines), default=usual_s)

    def _retry_after_s(self) -> float:
        return max(_SHORTEST_RETRY_AFTER_S, self._expected_start_s(self._settings.expected_start_s))

    def _choose(self, affinity: str, avoid: Engine | None) -> Engine:
        ready = self._list_ready()
        best = _find_best(ready, affinity)
        if best.is_usable and not (best.is_busy or best.is_avoided) and best is not avoid:
            return best
        ready = [engine for engine in ready if engine.is_usable]
        # An engine that said it is busy is asked again only when all say so.
        ready = [engine for engine in ready if not engine.is_busy] or ready
        ready = [engine for engine in ready if not engine.is_avoided] or ready
        ready = [engine for engine in ready if engine is not avoid] or ready
        return _find_best(ready, affinity)


class EnginePool(ModelPool):
    """All engines; each belongs to the pool of its model as well."""

    def __init__(self, engines: Iterable[Engine], settings: Settings, metrics: Metrics) -> None:
        super().__init__("", engines, settings, metrics, _Shared())
        self.models: dict[str, ModelPool] = {}
        self._leaving: list[Engine] = []  # no longer listed; they may have calls to finish
        # By a model's further names, such as its adapters': the engines that have it.
        self.adapters: dict[str, ModelPool] = {}
        # Names whose engines have left the list, and until when others may come in their place.
        self._left: dict[str, float] = {}
        self._forgetting: asyncio.Task[None] | None = None
        # Whoever must know which models there are.
        self.on_models: Callable[[], None] = lambda: None
        self._group()
        metrics.engine_ready.read = self._read_ready
        metrics.engine_state.read = self._read_states
        metrics.engine_info.read = self._read_models
        metrics.engine_breaker_open.read = self._read_breakers
        metrics.engine_running_sequences.read = self._read_running

    @property
    def draining(self) -> bool:
        return self._shared.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self._shared.draining = value

    @property
    def has_told_all(self) -> bool:
        """Whether it is known of each engine what it serves."""
        return bool(self.engines) and all(engine.cards for engine in self.engines)

    async def set_state(self, engine: Engine, state: EngineState, reason: str = "") -> None:
        if state is engine.state and not engine.suspect.is_set():
            engine.enter_state(state, reason)  # seen again: nobody need wake up for that
            return
        async with self._changed:
            engine.enter_state(state, reason)
            self.tell_capacity()
            self._shared.tell()

    async def set_engines(self, engines: Iterable[Engine]) -> None:
        """Those that are gone finish what they have; nothing new is sent to them."""
        async with self._changed:
            before, self.engines = self.engines, list(engines)
            self._leaving += [one for one in before if one not in self.engines]
            self._forget_finished()
            self._keep_names(_list_names(before) - _list_names(self.engines))
            self._group()
            self.tell_capacity()
            self._shared.tell()

    async def set_cards(self, engine: Engine, cards: Sequence[ModelCard]) -> None:
        """What the engine says that it serves; it may be another model than before its restart."""
        async with self._changed:
            engine.cards = tuple(cards)
            self._group()
            self.tell_capacity()
            self._shared.tell()

    def tell_capacity(self) -> None:
        for pool in self.models.values():
            pool.tell_capacity()

    def _keep_names(self, left: Collection[str]) -> None:
        """An engine is replaced by one with another address: until that has told what it serves,
        calls for its model are held. A model that is alone has a pool for whatever comes.
        """
        if not left or len(self.models) < 2:
            return
        hold_s = self._settings.restart_hold_s
        self._left |= dict.fromkeys(left, time.monotonic() + hold_s)
        asyncio.get_running_loop().call_later(hold_s + _FORGET_MARGIN_S, self._start_forgetting)

    def _start_forgetting(self) -> None:
        self._forgetting = asyncio.get_running_loop().create_task(self._forget_names())

    async def _forget_names(self) -> None:
        async with self._changed:
            now = time.monotonic()
            self._left = {name: until for name, until in self._left.items() if until > now}
            self._group()
            self.tell_capacity()
            self._shared.tell()

    def _group(self) -> None:
        """A pool for each model. As long as there is no second one, the first one's has all the
        engines, and it stays the same whatever they come to serve.
        """
        for name in _list_names(self.engines):
            self._left.pop(name, None)
        told = (one.card.name for one in self.engines if one.card)
        left = (name for name in self._left if name in self.models)
        names = list(dict.fromkeys((*self._settings.expected_models, *told, *left))) or [""]
        known, before = {}, self.models
        for name in names:
            known[name] = before.get(name) or self._make_pool(name, before, names)
        for name, pool in known.items():
            pool.name = name
            pool.change_engines(
                [one for one in self.engines if not one.card or one.card.name == name]
            )
        for pool in before.values():
            if pool not in known.values():
                pool.change_engines(())
        self.models = known
        self._group_adapters()
        self.on_models()

    def _group_adapters(self) -> None:
        """One may be loaded in some of its model's engines alone."""
        holders: dict[str, list[Engine]] = {}
        for engine in self.engines:
            for card in engine.cards[1:]:
                if card.name not in self.models:
                    holders.setdefault(card.name, []).append(engine)
        before, self.adapters = self.adapters, {}
        for name, engines in holders.items():
            base = engines[0].cards[0].name
            pool = before.get(name)
            if pool is None or pool.base != base:
                pool = ModelPool(name, (), self._settings, self._metrics, self._shared, base=base)
            # Two models may have adapters of one name: the first one's is meant.
            pool.engines = [one for one in engines if one.cards[0].name == base]
            self.adapters[name] = pool
        for name in self._left:
            pool = before.get(name)
            if pool is not None and pool.base in self.models:
                pool.engines = []
                self.adapters[name] = pool

    def _make_pool(
        self, name: str, before: Mapping[str, ModelPool], names: Sequence[str]
    ) -> ModelPool:
        only = next(iter(before.values())) if len(before) == 1 else None
        if only is not None and only.name not in names and name == names[0]:
            return only
        return ModelPool(name, (), self._settings, self._metrics, self._shared)

    def _read_models(self) -> Iterator[tuple[Sequence[str], float]]:
        for engine in self.engines:
            yield (engine.url, engine.card.name if engine.card else ""), 1

    def _read_ready(self) -> Iterator[tuple[Sequence[str], float]]:
        for engine in self.engines:
            yield (engine.url,), engine.state is EngineState.READY

    def _read_states(self) -> Iterator[tuple[Sequence[str], float]]:
        for engine in self.engines:
            for state in EngineState:
                yield (engine.url, state), engine.state is state

    def _read_breakers(self) -> Iterator[tuple[Sequence[str], float]]:
        now = time.monotonic()
        for engine in self.engines:
            yield (engine.url,), engine.breaker_open_until > now

    def _read_running(self) -> Iterator[tuple[Sequence[str], float]]:
        """Of those that have left, too, until they have finished: only then may they be stopped."""
        self._forget_finished()
        running: Counter[str] = Counter()
        for engine in (*self.engines, *self._leaving):  # one may be listed anew meanwhile
            running[engine.url] += engine.running
        for url, sequences in running.items():
            yield (url,), sequences

    def _forget_finished(self) -> None:
        """Where engines come and go, as pods do, their figures would add up for ever."""
        listed = {engine.url for engine in self.engines}
        leaving = [one for one in self._leaving if one.running and one not in self.engines]
        kept = listed | {engine.url for engine in leaving}
        for url in {engine.url for engine in self._leaving} - kept:
            self._metrics.forget_engine(url)
        self._leaving = leaving


def _list_names(engines: Iterable[Engine]) -> set[str]:
    """Of models and adapters."""
    return {card.name for engine in engines for card in engine.cards}


def _find_best(engines: Sequence[Engine], affinity: str) -> Engine:
    """The one with least to do; or, of those that have not much more than their share, the one that
    is this affinity's (rendezvous hashing: when an engine goes, only its own sessions move).
    """
    if not affinity:
        return min(engines, key=_LOAD)
    most = _AFFINITY_SLACK * (sum(map(_LOAD, engines)) + 1) / len(engines) + 1
    # A header may hold bytes that are no text; they name a session as well as others do.
    number = hash_text(affinity)
    return min(
        (engine for engine in engines if engine.running <= most or _has_little(engine)),
        key=lambda engine: engine.number * number & _64_BITS,
    )


def _has_little(engine: Engine) -> bool:
    few = _FEW_SEQUENCES
    return engine.running < (min(few, engine.sequences // 2) if engine.sequences else few)


POOL = web.AppKey("pool", EnginePool)
