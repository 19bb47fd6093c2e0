"""The `[[engine]]` sections of a settings file: the settings of each engine of this host."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from common.errors import SettingsError
from common.settings import suggest
from launcher.config import LauncherSettings, ServeSettings
from launcher.plan.command import find_vllm
from launcher.plan.hardware import change_count, parse_device, query_gpus
from launcher.plan.prepare import Prepared
from launcher.plan.sharing import Place, Wanted, deal_out, share_out
from launcher.plan.spreading import check_nodes

# What belongs to all of them together.
_COMMON = frozenset(
    (
        "config",
        "engine",
        "host",
        "port",
        "gateway_hang_timeout_s",
        "log_format",
        "engine_log",
        "shortest_turn_s",
        "gpu_locks",
    )
) | {name for name in LauncherSettings.model_fields if name.startswith(("status_", "node", "join"))}
_PORTS_APART = 10
_PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")


def list_engines(settings: LauncherSettings) -> list[LauncherSettings]:
    """Of each section, with what it does not say from the rest of the file; without sections the
    settings themselves. Each as often as its `copies` say.
    """
    check_nodes(settings)
    if not settings.engine and settings.copies == 1:
        return [settings]
    found = list(_read_sections(settings))
    places = share_out([_read_wish(one) for one in found], _list_gpus(found[0]))
    return [_place(one, place) for one, place in zip(found, places, strict=True)]


def find_places(prepared: Prepared) -> tuple[str, Iterable[str], int]:
    """Of which kind they are, their numbers, and how many an engine takes: GPUs, or one of as many
    places as there are numbers on a CPU.
    """
    settings, plan = prepared.settings, prepared.plan
    if not plan.device.is_gpu:
        return "cpu", map(str, itertools.count()), 1
    return "gpu", settings.gpus or _list_gpus(settings), plan.n_gpus


def meet(one: LauncherSettings, other: LauncherSettings) -> bool:
    """Whether they share a device."""
    return Place(one.gpus, one.share).meets(Place(other.gpus, other.share))


def _read_sections(settings: LauncherSettings) -> Iterator[LauncherSettings]:
    next_port = settings.engine_port
    for number, section in enumerate(settings.engine or ({},), start=1):
        first = _read_section(settings, section, f"[[engine]] {number}", next_port)
        folder = first.state_dir if "state_dir" in section else settings.state_dir
        dealt = deal_out(first.gpus, first.copies, _count_gpus(first))
        for copy, gpus in enumerate(dealt):
            port = first.engine_port + copy * _PORTS_APART
            own = {"engine_port": port, "state_dir": folder and folder / str(port)}
            yield first.model_copy(update={"copies": 1, "gpus": gpus, **(own if copy else {})})
        next_port += first.copies * _PORTS_APART


def _read_section(
    settings: LauncherSettings, section: Mapping[str, Any], where: str, port: int
) -> LauncherSettings:
    known = set(ServeSettings.model_fields) - _COMMON
    for name in section:
        if name in _COMMON:
            raise SettingsError(f"{where}: {name} is for all engines: put it above the sections")
        if name not in known:
            raise SettingsError(f"{where}: unknown setting {name}{suggest(name, known)}")
    common = settings.model_fields_set & ServeSettings.model_fields.keys()  # not the command's own
    above = settings.model_dump(include=common - {"engine", "config"})
    own: dict[str, Any] = {"engine_port": port, "engine": (), "config": None, **section}
    if settings.state_dir is not None and "state_dir" not in section:
        own["state_dir"] = settings.state_dir / str(own["engine_port"])
    try:
        read = ServeSettings(**{**above, **own})
        # Now, when it is not read once more: its [tuned] is every section's.
        return read.model_copy(update={"config": settings.config})
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{where}: {problem['loc'][0]}: {message}") from None


def _count_gpus(settings: LauncherSettings) -> int:
    """As many as `set` asks for."""
    n_gpus = 1
    for pair in settings.set:
        name, _, value = pair.partition("=")
        if name.replace("_", "-") in _PARALLEL and value.isdecimal():
            n_gpus *= max(1, int(value))
    return n_gpus


def _read_wish(settings: LauncherSettings) -> Wanted:
    share = settings.share if "share" in settings.model_fields_set else 0.0
    return Wanted(settings.gpus, _count_gpus(settings), share, settings.takes_turns)


def _place(settings: LauncherSettings, place: Place) -> LauncherSettings:
    update: dict[str, Any] = {"gpus": place.gpus, "share": place.share}
    if settings.gpu and place.gpus:
        update["gpu"] = change_count(settings.gpu, len(place.gpus))
    return settings.model_copy(update=update)


def _list_gpus(settings: LauncherSettings) -> list[str]:
    """By their numbers: those here, or those that are only planned for; none where vLLM is built
    for a CPU.
    """
    if settings.gpu:
        device = parse_device(settings.gpu)
        return [str(number) for number in range(device.count)] if device.is_gpu else []
    with contextlib.suppress(SettingsError):  # `explain` works without vLLM; others tell it later
        if find_vllm().build == "cpu":
            return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip()]
    return [row[0] for row in asyncio.run(query_gpus("index,name"))]
