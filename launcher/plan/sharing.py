"""Several engines on one host: which GPUs each gets, what share of their memory, and which of those
that take turns sleep instead of being stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.plan.hardware import Device

_CPU = "cpu"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
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


def sleeps(settings: LauncherSettings, device: Device) -> bool:
    """Whether the end of its turn is sleep. vLLM's build for a CPU answers that it sleeps, and
    frees nothing.
    """
    return bool(settings.sleep_level) and settings.takes_turns and device.is_gpu


def check_sleep(settings: LauncherSettings, device: Device) -> list[str]:
    """Refuses what can never be; tells of what is not done."""
    if not settings.sleep_level:
        return []
    if not settings.takes_turns:
        raise SettingsError("sleep_level is for engines that take turns: set takes_turns, too")
    if settings.nodes > 1:
        raise SettingsError("an engine over several hosts does not sleep: set sleep_level to 0")
    if device.is_gpu and settings.engine_host not in _LOOPBACK:
        raise SettingsError(
            f"sleep_level opens the engine's developer routes, by which anybody who reaches them "
            f"may run what they like in it: set engine_host to 127.0.0.1, not "
            f"{settings.engine_host}, or sleep_level to 0"
        )
    if not device.is_gpu:
        return [
            f"sleep_level is {settings.sleep_level}: on a CPU vLLM frees nothing when it sleeps, "
            "so the engine stops when its turn is over"
        ]
    return []
