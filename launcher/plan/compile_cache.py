"""The compile cache: where it is, and whether the next start will find its work done.

vLLM keeps compiled code under VLLM_CACHE_ROOT by a hash of nearly everything; what is kept here is
the fingerprint of every start that has become ready.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.files import write_file
from launcher.plan.hardware import GIB


def describe_cache(cache: Path, fingerprint: str) -> dict[str, Any]:
    compiled = cache / "vllm" / "torch_compile_cache"
    size = sum(f.stat().st_size for f in compiled.rglob("*") if f.is_file())
    is_known = _mark(cache, fingerprint).is_file()
    seconds = _mark(cache, fingerprint).read_text(encoding="ascii").strip() if is_known else ""
    if is_known:
        line = f"warm: this very start became ready before, last in {seconds} s"
    else:
        line = "cold: nothing with these flags, model, vLLM and GPU has started here"
    return {
        "path": str(cache),
        "is_warm": is_known,
        "compiled_bytes": size,
        "line": f"{line} ({cache}, {size / GIB:.2f} GiB compiled)",
    }


def note_start(cache: Path, fingerprint: str, seconds: float) -> None:
    """Called when the engine has become ready."""
    mark = _mark(cache, fingerprint)
    mark.parent.mkdir(parents=True, exist_ok=True)
    write_file(mark, f"{seconds:.1f}\n")


def _mark(cache: Path, fingerprint: str) -> Path:
    return cache / "starts" / fingerprint
