"""Memory that glibc keeps after it was freed. Other libraries of C have no such calls."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_MAPPED_BYTES = 2**20


def map_large_blocks() -> None:
    """A freed block that was mapped by itself goes back to the system at once. glibc raises the
    size from which it maps to that of the largest such block, and then keeps the next bodies of
    megabytes in its heap, in pieces, for good.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def return_freed_memory() -> None:
    """Of smaller blocks, which one that is in use keeps from going back with those around it."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
