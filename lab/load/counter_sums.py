"""Whether the gateway's own counters add up to what was sent to it."""

from __future__ import annotations

from collections.abc import Iterator

from common.prometheus_text import Samples, sum_by_labels, sum_samples
from lab.load.answers import PREDICT
from lab.load.traffic import Tally


def count_inside(samples: Samples) -> int:
    """Sequences that run or wait."""
    names = ("gateway_running_sequences", "gateway_waiting_sequences")
    return int(sum(sum_samples(samples, name) for name in names))


def find_mismatches(tally: Tally, before: Samples, after: Samples) -> Iterator[str]:
    """By route and status. Who hung up counts as 499, as 200 if they were too late, or not."""
    counted = sum_by_labels(after, "gateway_requests_total", "route", "status")
    counted.subtract(sum_by_labels(before, "gateway_requests_total", "route", "status"))
    for path in {route for route, _ in tally.statuses} | set(tally.hung_up):
        sent = {status: n for (route, status), n in tally.statuses.items() if route == path}
        got = {int(status): n for (route, status), n in counted.items() if route == path}
        # The model list and the first batch are not among the clients' requests.
        loose = tally.hung_up[path] + tally.unanswered[path]
        spare = sum(got.values()) - sum(sent.values())
        # One who hangs up may be gone before anybody has seen what they asked.
        if not 0 <= spare <= loose:
            told = f"{sum(sent.values())} answered and {loose} left"
            yield f"{path}: {told}, the gateway counted {sum(got.values())}: {got}"
        elif any(number > got.get(status, 0) for status, number in sent.items()):
            yield f"{path}: sent {sent}, the gateway counted {got}"
    name = "gateway_predict_characters_total"
    characters = int(sum_samples(after, name) - sum_samples(before, name))
    if not tally.hung_up[PREDICT] and characters != tally.characters:
        yield f"/predict: {tally.characters} characters came, {characters} were counted"
