"""The requests that decode together, as columns: a number a request instead of an object's field.

While nothing but "one token more" happens to any of them, their counters all move by one, and a
column moves at once what a loop over objects moves one by one. The tokens themselves are written
into the requests as they come; the counters of the requests stand still and are written back by
`settle`, before anybody but this batch looks at them. When what happens to which request is
`decode_scheduler.py`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, compress
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

Column = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class DecodeBatch:
    """Running requests in their order; a place in one column is the same request's in all."""

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        cached_counts: Sequence[int],
        held_counts: Sequence[int],
        max_model_len: int,
    ) -> None:
        self.requests = list(requests)
        self.answers: list[list[int]] = [r._output_token_ids for r in requests]
        self.texts: list[list[int]] = [r._all_token_ids for r in requests]
        # What the worker computes next; tokens known: the prompt's and the answer's so far.
        self.position = column(r.num_computed_tokens for r in requests)
        self.known = column(len(text) for text in self.texts)
        self.known_before = self.known.copy()
        self.prompt = column(r.num_prompt_tokens for r in requests)
        self.end = column(r.num_prompt_tokens + r.max_tokens for r in requests)
        self.cached = column(cached_counts)  # blocks that the prefix cache knows
        self.handed = column(map(len, self.answers)) - column(held_counts)
        self.may_wait = np.array([may_wait(r) for r in requests], dtype=np.bool_)
        self.stops = frozenset(chain.from_iterable(map(list_stops, requests)))
        # First tokens and what happened to a request travel with its next output: vLLM's own way.
        self.has_news = any(r.prefill_stats is not None or r.events for r in requests)
        self.max_model_len = max_model_len
        self._name(r.request_id for r in requests)

    def _name(self, ids: Any) -> None:
        self.ids: list[str] = list(ids)
        self.one_token_each = dict.fromkeys(self.ids, 1)
        self._pick: Callable[[Mapping[str, int]], Any] | None = (
            itemgetter(*self.ids) if len(self.ids) > 1 else None
        )

    def find_ending(self) -> Mask:
        """Those whose last token is on its way: there is nothing left to compute for them."""
        is_under_way = self.position >= self.known
        is_at_limit = self.position >= self.max_model_len - 1
        return (is_under_way & (self.known + 1 >= self.end)) | is_at_limit

    def read_tokens(self, output: ModelRunnerOutput) -> list[int] | None:
        """One token for each, in this batch's order; None: it is not that simple."""
        rows = output.sampled_token_ids
        if output.req_ids != self.ids:  # the worker's order, and those that ended since
            index = output.req_id_to_index
            try:
                places = self._pick(index) if self._pick else [index[self.ids[0]]]
            except KeyError:
                return None
            rows = [rows[place] for place in places]
        tokens: list[int] = list(chain.from_iterable(rows))
        return tokens if len(tokens) == len(self.ids) else None

    def add(self, tokens: list[int]) -> None:
        # `append` returns None, so `any` runs to the end, in C: a third of a loop's time.
        any(map(list.append, self.answers, tokens))
        any(map(list.append, self.texts, tokens))
        self.known += 1

    def find_stopped(self, tokens: list[int]) -> list[int]:
        """Places where the answer may be over; a few too many, each to be asked by itself."""
        is_over = (self.known >= self.end) | (self.known >= self.max_model_len)
        by_length: list[int] = np.flatnonzero(is_over).tolist()
        if self.stops.isdisjoint(tokens):
            return by_length
        stops = self.stops
        by_token = [place for place, token in enumerate(tokens) if token in stops]
        return sorted({*by_length, *by_token})

    def drop(self, gone: Sequence[int]) -> None:
        stays = np.ones(len(self.ids), dtype=np.bool_)
        stays[list(gone)] = False
        self.requests = list(compress(self.requests, stays))
        self.answers = list(compress(self.answers, stays))
        self.texts = list(compress(self.texts, stays))
        for name in COLUMNS:
            setattr(self, name, getattr(self, name)[stays])
        self._name(compress(self.ids, stays))

    def settle(self, *, has_placeholders: bool, next_step: int) -> dict[str, list[int]]:
        """Writes the counters back; returns what was held of the answers, by request."""
        # What is known is counted anew: a batch that contradicts itself is settled too.
        for request, text, position, known_before in zip(
            self.requests,
            self.texts,
            self.position.tolist(),
            self.known_before.tolist(),
            strict=True,
        ):
            scheduled = position - request.num_computed_tokens
            received = len(text) - known_before
            request.num_computed_tokens = position
            request.num_in_flight_tokens += scheduled - received
            if has_placeholders:
                request.num_output_placeholders += scheduled - received
            if next_step and scheduled:
                request.next_decode_eligible_step = next_step
        held = zip(self.ids, self.answers, self.handed.tolist(), strict=True)
        return {name: answer[handed:] for name, answer, handed in held if len(answer) > handed}


COLUMNS = ("position", "known", "known_before", "prompt", "end", "cached", "handed", "may_wait")


def column(numbers: Any) -> Column:
    return np.fromiter(numbers, dtype=np.int64)


def may_wait(request: Request) -> bool:
    """Nobody reads it before its end: no stream, no stop string for the front end to find."""
    params = request.sampling_params
    return bool(params.output_kind == RequestOutputKind.FINAL_ONLY and not params.stop)


def list_stops(request: Request) -> list[int]:
    params = request.sampling_params
    eos = [] if params.eos_token_id is None else [params.eos_token_id]
    return [*eos, *(params.stop_token_ids or ())]
