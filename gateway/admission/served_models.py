"""The models behind this address: which one a call is for, and what each has for itself.

A model has its engines, its queue before them, its prompts and its shared answers: calls of one
neither wait for those of another nor mix with them. What its engines are is `engines/pool.py`'s
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from gateway.admission.keys import Caller
from gateway.admission.queue import AdmissionQueue
from gateway.admission.throughput import FirstTokens
from gateway.admission.tickets import LANES, LaneName
from gateway.config import Settings
from gateway.engines.lists.deduplication import Deduplicator
from gateway.engines.pool import EnginePool, ModelPool
from gateway.engines.timeouts import Deadline
from gateway.errors import InvalidRequest, NotFound, Unavailable
from gateway.observability.metrics import Metrics
from gateway.prompts.builders import PromptBuilders

_RETRY_AFTER_S = 5


@dataclass(slots=True, eq=False)
class ServedModel:
    """One model and what is its own."""

    pool: ModelPool
    queue: AdmissionQueue
    generator: Deduplicator
    first_tokens: FirstTokens = field(default_factory=FirstTokens)
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def name(self) -> str:
        return self.pool.name

    def count_tokens(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens


class ServedModels:
    """Finds a call's model by its name: a look into a dictionary, where the name is known."""

    def __init__(
        self,
        settings: Settings,
        pool: EnginePool,
        prompts: PromptBuilders,
        build: Callable[[ModelPool, AdmissionQueue | None], ServedModel],
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._build = build
        self.prompts = prompts
        self.all: list[ServedModel] = []
        self._adapters: list[ServedModel] = []
        self._told: dict[str, Mapping[str, object]] = {}  # what its engines last said of each
        # By each name that an engine tells; `None` is for calls that name none.
        self.by_name: dict[str | None, ServedModel] = {}
        pool.on_models = self._note
        self._note()
        self._tell(metrics)

    @property
    def is_several(self) -> bool:
        """Whether it matters by which name one asks."""
        return len(self.all) + len(self._adapters) > 1

    @property
    def is_only(self) -> bool:
        """Whether a call can be for no other model, whatever it names."""
        return self._knows_all and not self.is_several

    def list_names(self, caller: Caller) -> list[str]:
        """What this caller may ask for, aliases included; the default comes first, since clients
        that care for no name take the first of the list.
        """
        names = sorted(filter(None, self.by_name), key=lambda name: name != self._default)
        names += [alias for alias, name in self._settings.alias_map.items() if name in self.by_name]
        return [name for name in names if not caller.models or self._resolve(name) in caller.models]

    def list_cards(self, caller: Caller) -> list[dict[str, object]]:
        """GET /v1/models where there are several: as the engines told at their last start, so that
        one that is away or slow keeps nobody waiting.
        """
        return [
            {"object": "model", **self._told.get(self._resolve(name), {}), "id": name}
            for name in self.list_names(caller)
        ]

    def count(self, lane: LaneName) -> tuple[int, int]:
        """Sequences of a lane that run and that wait, of all models."""
        counts = [one.queue.count(lane) for one in self.all]
        return sum(running for running, _ in counts), sum(waiting for _, waiting in counts)

    def serves(self, served: ServedModel) -> bool:
        """Still: its engines may have left the list for good."""
        return served in self.all or served in self._adapters

    def find_known(self, name: str | None) -> ServedModel | None:
        """Without waiting for anybody; the only model there is takes all names, for its engines
        refuse what is none of theirs.
        """
        known = self.by_name.get(name)
        if known is None and name is not None and self.is_only:
            return self.all[0]
        return known

    async def find(self, name: str | None, caller: Caller, deadline: float | None) -> ServedModel:
        """Held for a while, as for a restart, while an engine may still come to serve it."""
        known = self.find_known(name)
        if known is not None:
            return known
        wanted = name or self._default

        def is_settled() -> bool:
            found = self.find_known(name)
            return found.pool.has_engine if found else self._knows_all or not wanted

        async with Deadline(deadline):
            is_over = await self._pool.wait_until(is_settled, self._settings.restart_hold_s)
        found = self.find_known(name)
        if found is None and is_over:
            raise self._refuse(name, caller)
        if found is None or not is_over:
            told = found.pool if found else self._pool
            raise Unavailable(
                f"no engine is ready for the model {wanted!r}: {told.describe()}",
                retry_after_s=_RETRY_AFTER_S,
            )
        return found

    async def find_context(self, name: object, deadline: float | None) -> int | None:
        """The longest context of a model's engines; held while none of them has told. None where
        nobody knows which model it is: the engine then judges the text itself.
        """
        known = self.find_known(self._resolve(name) if isinstance(name, str) else None)
        if known is None:
            return None
        return known.pool.max_model_len or await known.pool.find_max_model_len(deadline)

    async def find_shortest_context(self, deadline: float | None) -> int | None:
        """What is short enough for each model is for any; held while none has told what it is. By
        it no text is refused: that takes the context of its own model.
        """
        if not self.is_several:
            return await self.all[0].pool.find_max_model_len(deadline)
        known = [one.pool.max_model_len for one in self.all]
        return min((length for length in known if length), default=None)

    async def wait_default_ready(self, timeout_s: float) -> bool:
        """For the model that /predict asks without a name."""

        def has_engine() -> bool:
            found = self.find_known(None)
            return found is not None and found.pool.has_engine

        return await self._pool.wait_until(has_engine, timeout_s)

    @property
    def _default(self) -> str:
        name = self._settings.default_model
        return self._resolve(name)

    @property
    def _knows_all(self) -> bool:
        """No engine is left that could serve what nobody has told of."""
        return len(self._pool.engines) == 1 or self._pool.has_told_all

    def _resolve(self, name: str) -> str:
        return self._settings.alias_map.get(name, name)

    def _note(self) -> None:
        known = {id(one.pool): one for one in (*self.all, *self._adapters)}
        pools = self._pool.models.values()
        self.all = [known.get(id(pool)) or self._build(pool, None) for pool in pools]
        # An adapter runs on its model's engines, so it takes its model's places.
        self._told |= {
            card.name: card.told for one in self._pool.engines for card in reversed(one.cards)
        }
        queues = {one.name: one.queue for one in self.all}
        self._adapters = [
            known.get(id(pool)) or self._build(pool, queues[pool.base])
            for pool in self._pool.adapters.values()
        ]
        named = [one for one in self.all if one.name]
        by_name: dict[str | None, ServedModel] = {
            one.name: one for one in (*named, *self._adapters)
        }
        default = by_name.get(self._default) if self._default else None
        if default is None and not self._default and len(self.all) == 1:
            default = self.all[0]
        if default is not None:
            by_name[None] = default
        self.by_name = by_name

    def _refuse(self, name: str | None, caller: Caller) -> InvalidRequest | NotFound:
        names = ", ".join(self.list_names(caller)) or "none that this key may use"
        if name is None and not self._default:
            return InvalidRequest(
                f"several models are served here ({names}): name one as `model`; "
                "GATEWAY_DEFAULT_MODEL says which is meant without that",
                param="model",
                code="missing_field",
            )
        return NotFound(
            f"there is no model {name or self._default!r} here; there are: {names}",
            param="model",
            code="model_not_found",
        )

    def _tell(self, metrics: Metrics) -> None:
        metrics.running_sequences.read = lambda: [((lane,), self.count(lane)[0]) for lane in LANES]
        metrics.waiting_sequences.read = lambda: [((lane,), self.count(lane)[1]) for lane in LANES]
        metrics.max_running_sequences.read = lambda: [
            ((), sum(one.queue.capacity for one in self.all))
        ]
        most_waiting = self._settings.max_waiting
        metrics.max_waiting_sequences.read = lambda: [((), most_waiting * len(self.all))]
        metrics.model_ready.read = lambda: [
            ((one.name,), one.pool.is_ready) for one in self._list_named()
        ]
        metrics.model_held_calls.read = lambda: [
            ((one.name,), one.pool.held) for one in self._list_named()
        ]
        metrics.model_running_sequences.read = lambda: self._count_each(0)
        metrics.model_waiting_sequences.read = lambda: self._count_each(1)
        metrics.model_requests.read = lambda: [
            ((one.name,), one.requests) for one in self._list_named()
        ]
        metrics.model_tokens.read = self._read_tokens

    def _list_named(self) -> Sequence[ServedModel]:
        """Models and adapters; the sequences of an adapter are its model's."""
        return [one for one in (*self.all, *self._adapters) if one.name]

    def _count_each(self, place: int) -> Iterator[tuple[Sequence[str], float]]:
        for one in self.all:
            for lane in LANES if one.name else ():
                yield (one.name, lane), one.queue.count(lane)[place]

    def _read_tokens(self) -> Iterator[tuple[Sequence[str], float]]:
        for one in self._list_named():
            yield (one.name, "in"), one.prompt_tokens
            yield (one.name, "out"), one.completion_tokens


MODELS = web.AppKey("models", ServedModels)
SERVED_MODEL = web.RequestKey("served_model", ServedModel)
