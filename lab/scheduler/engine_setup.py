"""What of an engine's settings a scheduler looks at; free of vLLM, whose import takes seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSetup:
    is_async: bool = True
    is_v2_runner: bool = True
    block_size: int = 16
    blocks: int = 4000
    sequences: int = 512
    step_tokens: int = 16384
    context: int = 4096
    policy: str = "fcfs"
    has_prefix_cache: bool = True
    chunk_tokens: int = 0  # the most of a prompt in one step; 0: as much as fits
    window: int = 0  # of attention; 0: all of the context
    has_clients: bool = False  # several front ends, each told which of its requests ended
