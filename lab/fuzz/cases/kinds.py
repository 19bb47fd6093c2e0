"""The table of kinds, and every case by its number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lab.fuzz.cases.case import Case, Draw, Target
from lab.fuzz.cases.constraint_cases import (
    build_choice_case,
    build_regex_case,
    build_schema_case,
    build_tools_case,
)
from lab.fuzz.cases.engine_cases import (
    build_message_case,
    build_route_case,
    build_sampling_case,
    build_token_case,
)
from lab.fuzz.cases.http_cases import (
    build_garbled,
    build_hung_up,
    build_left_stream,
    build_odd_body,
    build_odd_framing,
    build_odd_header,
    build_odd_line,
    build_odd_value,
    build_pipelined,
    build_valid,
)
from lab.fuzz.cases.stored_cases import build_batch_case, build_form_case, build_id_case

_SPREAD = 1_000_003


@dataclass(frozen=True)
class Kind:
    """`weight`: how many of a hundred or so cases are of it."""

    weight: int
    build: Callable[[Draw], Case]
    meaning: str


KINDS = {
    "valid": Kind(10, build_valid, "right requests, packed, in chunks, in pieces"),
    "values": Kind(14, build_odd_value, "fields that hold something else, or are missing"),
    "bodies": Kind(8, build_odd_body, "no JSON, other encodings, torn, packed, unfolding to more"),
    "headers": Kind(6, build_odd_header, "headers with what they should not hold"),
    "framing": Kind(5, build_odd_framing, "lengths, chunks, upgrades, folded and endless headers"),
    "lines": Kind(4, build_odd_line, "methods, paths and versions that are none"),
    "garbled": Kind(3, build_garbled, "bytes of a request that are others, missing or too many"),
    "pipelined": Kind(1, build_pipelined, "several requests at once on one connection"),
    "hung-up": Kind(2, build_hung_up, "callers gone before an answer"),
    "left-streams": Kind(4, build_left_stream, "streams left at their first bytes or later"),
    "schemas": Kind(8, build_schema_case, "JSON schemas, in every field that takes one"),
    "regexes": Kind(7, build_regex_case, "regular expressions, in patterns too"),
    "choices": Kind(3, build_choice_case, "choices, grammars, structural tags, two at once"),
    "tools": Kind(5, build_tools_case, "lists of tools and which of them must be called"),
    "tokens": Kind(5, build_token_case, "token ids in prompts, lists, biases; embeddings"),
    "sampling": Kind(6, build_sampling_case, "numbers and flags of sampling at their edges"),
    "messages": Kind(4, build_message_case, "turns of a conversation, their parts and calls"),
    "routes": Kind(3, build_route_case, "the other routes that are passed on"),
    "forms": Kind(3, build_form_case, "multipart, right and torn, for files and for speech"),
    "batches": Kind(3, build_batch_case, "files of requests, and batches made of them"),
    "ids": Kind(3, build_id_case, "ids of stored responses, files and batches"),
}


def make_case(seed: int, number: int, target: Target) -> Case:
    """The same one for the same seed, without those before it."""
    chance, name = _begin(seed, number)
    return replace(KINDS[name].build(Draw(chance, number, target)), kind=name)


def make_cases(seed: int, count: int, target: Target) -> Iterator[Case]:
    return (make_case(seed, number, target) for number in range(count))


def find_kind(seed: int, number: int) -> str:
    return _begin(seed, number)[1]


def _begin(seed: int, number: int) -> tuple[random.Random, str]:
    chance = random.Random(seed * _SPREAD + number)
    return chance, chance.choices([*KINDS], [kind.weight for kind in KINDS.values()])[0]
