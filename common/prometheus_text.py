"""Reading what a /metrics page says; for everything outside hot paths, and without fetching it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from prometheus_client.parser import text_string_to_metric_families

Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]


def parse_samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """By the sample's whole name, `_total` and `_bucket` included. ValueError if it is none."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def sum_samples(samples: Samples, name: str) -> float:
    """Over all labels; 0 where there is none of that name."""
    return sum(value for _, value in samples.get(name, ()))


def sum_by_labels(samples: Samples, name: str, *labels: str) -> Counter[tuple[str, ...]]:
    """By these labels' values; whole numbers, as counters of requests are."""
    sums: Counter[tuple[str, ...]] = Counter()
    for given, value in samples.get(name, ()):
        sums[tuple(given.get(label, "") for label in labels)] += int(value)
    return sums
