"""How long tests wait for what has to come, each kind in one place.

Only a test that fails waits so long. On a quiet machine a program of ours starts in half a second
and the real vLLM in twenty; beside a dozen others either has taken a minute and more. All of it is
less than pytest's own limit, so that a failure says what was waited for.
"""

from __future__ import annotations

PROGRAM_S = 180.0  # a program starts, ends, or says what it is asked
ENGINE_S = 240.0  # the real vLLM starts
