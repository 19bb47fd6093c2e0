"""What a /metrics page says, by name and by labels."""

from __future__ import annotations

import pytest

from common.prometheus_text import parse_samples, sum_by_labels, sum_samples

PAGE = """\
# HELP requests_total Answered.
# TYPE requests_total counter
requests_total{route="/predict",status="200"} 3.0
requests_total{route="/predict",status="400"} 1.0
requests_total{route="/a \\"b\\"",status="200"} 2.0
# TYPE seconds histogram
seconds_bucket{le="1.0"} 4.0
seconds_bucket{le="+Inf"} 5.0
seconds_sum 7.5
seconds_count 5.0
"""


def test_samples_are_summed_over_all_labels() -> None:
    samples = parse_samples(PAGE)

    assert sum_samples(samples, "requests_total") == 6
    assert sum_samples(samples, "seconds_sum") == 7.5
    assert sum_samples(samples, "nothing") == 0


def test_samples_are_summed_by_labels() -> None:
    samples = parse_samples(PAGE)

    assert sum_by_labels(samples, "requests_total", "route") == {("/predict",): 4, ('/a "b"',): 2}
    assert sum_by_labels(samples, "requests_total", "status", "lane")["200", ""] == 5
    assert sum_by_labels(samples, "requests_total")[()] == 6


def test_page_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="html"):
        parse_samples("<html> nobody's page")
