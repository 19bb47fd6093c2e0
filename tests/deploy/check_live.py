"""Every panel of every dashboard against a running Prometheus: does it show anything?

    python -m tests.deploy.check_live http://127.0.0.1:9090 --gateway http://127.0.0.1:8000

With --gateway some of everything is sent there first. Panels that need what a stack may lack are
named in WITHOUT_DATA, each with its reason; whatever else is empty after --within seconds fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from tests.deploy.expressions import Expression, list_expressions
from tests.plain_http import NO_TLS

_GPU = "needs an NVIDIA GPU beside the launcher"
_SPECULATION = "needs an engine that speculates (speculative-config)"
WITHOUT_DATA = {
    ("overview", "Alerts"): "lists the alerts that fire, and none should",
    ("engine", "GPU utilization"): _GPU,
    ("engine", "GPU memory"): _GPU,
    ("engine", "GPU power"): _GPU,
    ("engine", "GPU temperature"): _GPU,
    ("engine", "Acceptance rate"): _SPECULATION,
    ("engine", "Accepted, by position"): _SPECULATION,
    ("engine", "Tokens per draft"): _SPECULATION,
}
_PAUSE_S = 1.0


@dataclass(frozen=True)
class Finding:
    """An expression that shows nothing, or is none."""

    expression: Expression
    problem: str

    def __str__(self) -> str:
        one = self.expression
        return f"{one.board}, {one.panel}: {self.problem}: {one.promql}"


def check_live(prometheus: str, within_s: float = 60.0) -> list[Finding]:
    """What is still empty when the time is over; asks again until nothing is."""
    deadline = time.monotonic() + within_s
    left = [one for one in list_expressions() if (one.board, one.panel) not in WITHOUT_DATA]
    with httpx.Client(base_url=prometheus, timeout=20, trust_env=False, verify=NO_TLS) as client:
        while True:
            findings = [found for one in left if (found := check(client, one)) is not None]
            if not findings or time.monotonic() > deadline:
                return findings
            left = [found.expression for found in findings]
            time.sleep(_PAUSE_S)


def check(client: httpx.Client, expression: Expression) -> Finding | None:
    """Over the last five minutes, as a panel would; not a number is no data."""
    now = time.time()
    query = {"query": expression.promql, "start": now - 300, "end": now, "step": 5}
    answer = client.post("/api/v1/query_range", data=query).json()
    if answer["status"] != "success":
        return Finding(expression, answer.get("error", "refused"))
    values = [float(value) for series in answer["data"]["result"] for _, value in series["values"]]
    if not any(map(math.isfinite, values)):
        return Finding(expression, "not a number" if values else "no data")
    return None


def make_traffic(gateway: str, key: str = "") -> None:
    """Some of everything that the panels show, refusals and errors too."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    question = "What is a CUDA warp?"
    with httpx.Client(
        base_url=gateway, timeout=120, trust_env=False, headers=headers, verify=NO_TLS
    ) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        batch = [question, question, *(f"{question} ({number})" for number in range(14)), ""]
        client.post("/predict", json={"prompt": batch, "max_tokens": 24}).raise_for_status()
        client.post("/predict", json={"prompt": question}).raise_for_status()
        messages = [{"role": "user", "content": question}]
        chat = {"model": model, "messages": messages, "max_tokens": 24, "stream": True}
        client.post("/v1/chat/completions", json=chat).raise_for_status()
        client.post("/v1/chat/completions", json=chat | {"max_tokens": -1})
        client.post("/predict", content=b"no JSON")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prometheus", help="its address")
    parser.add_argument("--gateway", default="", help="send some of everything there first")
    parser.add_argument("--key", default="", help="the gateway's API key, if it wants one")
    parser.add_argument("--within", type=float, default=60.0, help="seconds (default: 60)")
    asked = parser.parse_args(arguments)
    if asked.gateway:
        make_traffic(asked.gateway, asked.key)
    findings = check_live(asked.prometheus, asked.within)
    for finding in findings:
        print(finding)  # noqa: T201
    total = len(list_expressions())
    print(f"{total} expressions, {len(findings)} empty; {len(WITHOUT_DATA)} panels may be")  # noqa: T201
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
