"""What passing a /v1 call on costs, beside a plain aiohttp relay; no engine is needed.

The part `relay` of scripts/bench.py, whose options it takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench

if __name__ == "__main__":
    sys.argv[1:1] = ["--only", "relay", "--out", str(Path("out") / "bench-relay.json")]
    sys.exit(bench.main())
