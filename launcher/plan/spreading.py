"""One engine on several hosts: what its options then are, and which processes run where.

A host here is a node to vLLM. Every node gets the same options but for its rank; those that are not
the first are headless: they serve no HTTP. Who joins, and when, is `launcher/nodes/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil

from common.errors import SettingsError
from common.web.addresses import is_loopback
from launcher.config import PREFIX, LauncherSettings
from launcher.plan.engine_plan import EngineOption, EnginePlan

_SOURCE, _ORIGIN = "launcher settings", "launcher"
# vLLM numbers processes so: all of one copy, in it all of one stage, in it the parts of a layer.
_KINDS = ("data", "pipeline", "prefill-context", "tensor")


@dataclass(frozen=True)
class Layout:
    """Which of the engine's processes, a device each, run on which host."""

    nodes: int
    sizes: dict[str, int]  # by kind, in the order in which vLLM numbers processes

    @property
    def processes(self) -> int:
        product = 1
        for size in self.sizes.values():
            product *= size
        return product

    @property
    def per_node(self) -> int:
        return self.processes // self.nodes

    def describe(self, rank: int) -> str:
        """Of one host, in words."""
        first = rank * self.per_node
        last = first + self.per_node - 1
        places = [self._find_place(number) for number in range(first, last + 1)]
        parts = []
        for kind, size in self.sizes.items():
            if size > 1:
                numbers = sorted({place[kind] for place in places})
                parts.append(f"{kind} {_span(numbers[0], numbers[-1])} of {size}")
        return f"process {_span(first, last)} of {self.processes}: {', '.join(parts)}"

    def _find_place(self, number: int) -> dict[str, int]:
        place = {}
        for kind in reversed(self.sizes):
            number, place[kind] = divmod(number, self.sizes[kind])
        return place


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def check_nodes(settings: LauncherSettings) -> None:
    """What does not go together, before anything is planned."""
    if settings.join and settings.nodes > 1:
        raise SettingsError(
            f"{PREFIX}JOIN and {PREFIX}NODES: a host that joins is told by the head how many there "
            f"are; leave {PREFIX}NODES out here"
        )
    has_more = bool(settings.engine) or settings.copies > 1
    if has_more and (settings.join or settings.nodes > 1):
        raise SettingsError(
            "[[engine]] sections and copies are engines of one host; one that runs on several is "
            "alone: give it a launcher of its own"
        )
    is_joined = settings.nodes > 1 and settings.nodes_backend == "mp"
    if is_joined and not is_loopback(settings.node_address_used) and not settings.nodes_token:
        raise SettingsError(
            f"whoever reaches {settings.node_address} could join the engine: set "
            f"{PREFIX}NODES_TOKEN, here and on the hosts that join"
        )


def list_node_options(
    settings: LauncherSettings, asked: Iterable[EngineOption]
) -> list[EngineOption]:
    """Of the head; `asked` are the options that say how it is cut."""
    if settings.nodes == 1:
        return []
    copies = next((o.value for o in asked if o.name == "data-parallel-size" and not o.omit), 1)
    rows = _list_ray(settings, copies) if settings.nodes_backend == "ray" else _list_mp(settings)
    return [EngineOption(name, value, why, _SOURCE, _ORIGIN) for name, value, why in rows]


def _list_mp(settings: LauncherSettings) -> Iterator[tuple[str, object, str]]:
    yield "distributed-executor-backend", "mp", "each host's launcher starts its own part"
    yield "nnodes", settings.nodes, f"the hosts of {PREFIX}NODES"
    yield "node-rank", 0, "this one is the head"
    yield "master-addr", settings.node_address_used, "where the others find the head"
    yield "master-port", settings.node_port + 1, "the processes of one model meet here"
    yield "data-parallel-rpc-port", settings.node_port + 2, "its copies, if there are any, here"


def _list_ray(settings: LauncherSettings, copies: object) -> Iterator[tuple[str, object, str]]:
    yield "distributed-executor-backend", "ray", "the Ray cluster starts the parts on its hosts"
    if isinstance(copies, int) and copies > 1:
        here = max(1, copies // settings.nodes)
        yield "data-parallel-backend", "ray", "the Ray cluster starts the copies, too"
        yield "data-parallel-address", settings.node_address_used, "the head, to Ray"
        yield "data-parallel-size-local", here, "as many copies on every host"


def list_node_variables(address: str) -> list[EngineOption]:
    """Of any of the hosts, by its own address."""
    rows = [("VLLM_HOST_IP", address, "how the engine's other hosts reach this one")]
    if interface := find_interface(address):
        why = "the processes' groups would meet at whatever this host's own name stands for"
        rows.append(("GLOO_SOCKET_IFNAME", interface, why))
    return [EngineOption(name, value, why, _SOURCE, _ORIGIN) for name, value, why in rows]


def find_interface(address: str) -> str:
    """Its name, by an address of this host; empty: it is another's."""
    for name, rows in psutil.net_if_addrs().items():
        if any(row.address.partition("%")[0] == address for row in rows):
            return str(name)
    return "lo" if is_loopback(address) else ""


def find_layout(settings: LauncherSettings, plan: EnginePlan) -> Layout | None:
    """None where it runs on one host; `SettingsError` where it cannot be dealt out evenly."""
    nodes = settings.nodes
    if nodes == 1:
        return None
    sizes = {kind: int(plan.value(f"{kind}-parallel-size") or 1) for kind in _KINDS}
    layout = Layout(nodes, sizes)
    told = " x ".join(f"{kind} {size}" for kind, size in sizes.items() if size > 1) or "1 process"
    if layout.processes % nodes:
        raise SettingsError(
            f"{told} cannot be dealt out to {nodes} hosts: set data-parallel-size={nodes} for a "
            f"model that fits on one of them, pipeline-parallel-size={nodes} or "
            f"tensor-parallel-size={nodes} for one that does not (or multiples), with --set"
        )
    copy = layout.processes // sizes["data"]
    if layout.per_node % copy and copy % layout.per_node:
        raise SettingsError(
            f"{told}: {layout.per_node} processes a host are neither whole copies of {copy} "
            "nor an even part of one"
        )
    return layout
