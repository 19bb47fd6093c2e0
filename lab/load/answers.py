"""What a caller is answered, held against what they must be answered.

What is not here: how it is asked (`traffic.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import aiohttp

from common.questions import QuestionPair
from lab.failures import LabFailure

PREDICT = "/predict"
_FEWEST_KNOWN = 10
# What comes of reading an answer that has another shape than it should.
MISSHAPEN = (LookupError, TypeError, AttributeError, ValueError, RecursionError)
# What a caller can come to know: `told` an error with its status, `refused` nobody listens there,
# `cut` the connection broke. `lost`: nothing tells them that what they have is not the answer.
Outcome = Literal["right", "told", "refused", "cut", "lost", "wrong", "doubled", "swapped"]
NOT_TRUE: tuple[Outcome, ...] = ("wrong", "doubled", "swapped")


class WrongAnswer(Exception):
    """An answer that is not the one to what was asked."""

    outcome: Outcome = "wrong"


class SwappedAnswer(WrongAnswer):
    """The right answer to something else."""

    outcome: Outcome = "swapped"


class DoubledAnswer(WrongAnswer):
    """The right answer, more than once."""

    outcome: Outcome = "doubled"


class TooFewKnown(LabFailure):
    """A model whose answers nobody can hold against anything."""

    exit_code = 1


class LostAnswer(Exception):
    """No answer, or an error where there should be none."""


class ToldSo(LostAnswer):
    """An error instead of an answer; 200: in a stream, or of one question of several."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Verdict:
    """What one request came to."""

    outcome: Outcome
    detail: str = ""
    status: int = 0  # of what was told


@dataclass(frozen=True)
class KnownModel:
    """Its name, and the questions whose answers it knows by heart."""

    name: str
    pairs: list[tuple[str, str]]

    @cached_property
    def answers(self) -> frozenset[str]:
        return frozenset(answer.strip() for _, answer in self.pairs)

    def check(self, got: str, wanted: str, asked: str) -> None:
        text, right = got.strip(), wanted.strip()
        if text == right:
            return
        said = f"asked {asked!r}: {got!r} instead of {wanted!r}"
        if right and text.count(right) > 1:
            raise DoubledAnswer(said)
        raise SwappedAnswer(said) if text in self.answers else WrongAnswer(said)


async def learn_model(
    session: aiohttp.ClientSession, url: str, pairs: Sequence[QuestionPair]
) -> KnownModel:
    """The questions that it answers word for word when nothing else runs."""
    async with session.get(url + "/v1/models") as answer:
        model: str = (await answer.json())["data"][0]["id"]
    body = {"prompt": [pair.question for pair in pairs]}
    async with session.post(url + PREDICT, json=body) as answer:
        replies = (await answer.json())["response"]
    known = [
        (pair.question, pair.reference)
        for pair, got in zip(pairs, replies, strict=True)
        if got.strip() == pair.reference.strip()
    ]
    shown = f"{len(known)} of the {len(pairs)} answers"
    if len(known) < _FEWEST_KNOWN:
        raise TooFewKnown(
            f"the model knows {shown} to the questions; {_FEWEST_KNOWN} that it knows by heart are "
            "needed, or nobody could tell a wrong answer"
        )
    print(f"{model}: {shown} known by heart", flush=True)
    return KnownModel(model, known)


async def judge(request: Awaitable[None]) -> Verdict:
    """What came of it, whatever it raises."""
    try:
        await request
    except WrongAnswer as error:
        return Verdict(error.outcome, str(error))
    except ToldSo as error:
        return Verdict("told", f"{type(error).__name__}: {error}", error.status)
    except (LostAnswer, TimeoutError, aiohttp.ClientError, *MISSHAPEN) as error:
        return Verdict(_name_outcome(error), f"{type(error).__name__}: {error}")
    return Verdict("right")


def _name_outcome(error: Exception) -> Outcome:
    # Some of a client's errors are TimeoutErrors or ValueErrors, too.
    if isinstance(error, LostAnswer | TimeoutError):
        return "lost"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "refused"
    return "cut" if isinstance(error, aiohttp.ClientError) else "wrong"
