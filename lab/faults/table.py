"""All faults there are, in the order in which they are injected.

Those that end the service come last: the next one would have to wait for another.
"""

from __future__ import annotations

from lab.faults.fault import Fault
from lab.faults.rows import (
    engines_broken,
    hosts_and_clocks,
    processes_struck,
    resources_used_up,
    starts_and_ends,
    stores_away,
)


def list_faults() -> list[Fault]:
    return [
        *stores_away.FAULTS,
        *resources_used_up.FAULTS,
        *engines_broken.FAULTS,
        *hosts_and_clocks.FAULTS,
        *processes_struck.FAULTS,
        *starts_and_ends.FAULTS,
    ]
