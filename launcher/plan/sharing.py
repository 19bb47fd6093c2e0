"""Several engines on one host: which GPUs each gets, and what share of their memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import SettingsError

_CPU = "cpu"
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Wanted:
    """What one engine asks for; empty and 0 leave it to us."""

    gpus: tuple[str, ...] = ()
    n_gpus: int = 1
    share: float = 0.0
    takes_turns: bool = False  # with the others of its device that do: they count as one


@dataclass(frozen=True)
class Place:
    """Where it runs: on these GPUs, or on the CPU without any; and its share of each."""

    gpus: tuple[str, ...]
    share: float

    def meets(self, other: Place) -> bool:
        """Whether both use a device, and so may not measure its free memory at the same time."""
        return not self.gpus or not other.gpus or bool(set(self.gpus) & set(other.gpus))


def share_out(wanted: Sequence[Wanted], gpus: Sequence[str]) -> list[Place]:
    """In the order of the sections: each on the GPUs with the fewest engines so far, and what of a
    device nobody has claimed in equal parts to those who have not said how much.
    """
    load: dict[str, list[int]] = {gpu: [] for gpu in gpus or (_CPU,)}
    for number, one in enumerate(wanted):
        for gpu in _choose(one, number, load, has_gpus=bool(gpus)):
            load[gpu].append(number)
    shares = [one.share or 1.0 for one in wanted]
    for gpu, numbers in load.items():
        in_turn = [number for number in numbers if wanted[number].takes_turns]
        together = [number for number in numbers if not wanted[number].takes_turns]
        claimed = sum(wanted[number].share for number in together)
        claimed += max((wanted[number].share for number in in_turn), default=0.0)
        others = [number for number in numbers if not wanted[number].share]
        if claimed > 1 + _ROUNDING or (others and claimed > 1 - _ROUNDING):
            where = "the CPU" if gpu == _CPU else f"GPU {gpu}"
            raise SettingsError(
                f"the engines on {where} claim {claimed:.0%} of it, and {len(others)} more are to "
                "run there: lower their `share`, or give them other `gpus`"
            )
        # Those that take turns are never there at the same time.
        parts = len([number for number in others if number in together])
        parts += any(number in in_turn for number in others)
        for number in others:
            shares[number] = min(shares[number], (1 - claimed) / parts)
    return [
        Place(tuple(gpu for gpu, numbers in load.items() if number in numbers and gpu != _CPU), one)
        for number, one in enumerate(shares)
    ]


def deal_out(gpus: Sequence[str], copies: int, n_gpus: int) -> list[tuple[str, ...]]:
    """The named GPUs, side by side, to copies that want so many each; where there are fewer, some
    copies have the same ones.
    """
    hands = min(copies, len(gpus) // n_gpus) or 1
    dealt = [
        tuple(gpus[len(gpus) * hand // hands : len(gpus) * (hand + 1) // hands])
        for hand in range(hands)
    ]
    return [dealt[copy % hands] for copy in range(copies)]


def _choose(
    one: Wanted, number: int, load: dict[str, list[int]], *, has_gpus: bool
) -> Sequence[str]:
    if not has_gpus:
        return (_CPU,)
    if unknown := [gpu for gpu in one.gpus if gpu not in load]:
        raise SettingsError(
            f"engine {number + 1}: there is no GPU {unknown[0]} here (there are {', '.join(load)})"
        )
    if one.gpus:
        return one.gpus
    if one.n_gpus > len(load):
        raise SettingsError(f"engine {number + 1} wants {one.n_gpus} GPUs; here are {len(load)}")
    return sorted(load, key=lambda gpu: len(load[gpu]))[: one.n_gpus]
