"""The grader's contract at POST /predict, in the cases where servers go wrong."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from urllib.parse import urlsplit

import httpx

from lab.selftest.checked_gateway import (
    QUESTION,
    CheckedGateway,
    Observation,
    expect,
    read_object,
    read_responses,
)

_MANY = 1025
# Around the engine's own cap on a list, so that a piece put back at the wrong place shows.
_REFUSED_PLACES = (0, 511, 1023, 1024)
_SEEN_WITHIN_S = 20.0
_FREED_WITHIN_S = 5.0
_LONG_BATCH = 400
_ODD_TEXTS = (
    "😀👩‍👩‍👧‍👦 emoji",
    "𠜎𠜱𡿺 beyond the basic plane",
    "שלום مرحبا right to left",
    "e\u0301 a\u0308 combining",
    "zero\u200bwidth\u2028line\u3000wide",
    '"quoted" \\back\\slash\n\ttab',
)


def check_empty_list(gateway: CheckedGateway) -> Observation:
    answer = gateway.predict([])
    read_responses(answer, 0)
    return Observation("an empty list is answered by an empty list")


def check_one_prompt(gateway: CheckedGateway) -> Observation:
    """A text is answered by a text; a list of one by a list of one, with the same text."""
    root = read_object(gateway.http.get("/")).get("status")
    expect(root in ("batch", "ok"), f"GET / says {root!r}, neither batch nor ok")
    single = read_object(gateway.predict(QUESTION)).get("response")
    form = "a text"
    if isinstance(single, list) and len(single) == 1:
        single, form = single[0], "a list of one"
    expect(isinstance(single, str) and single.strip(), f"the answer is {single!r}")
    listed = read_responses(gateway.predict([QUESTION]), 1)
    expect(listed[0] == single, "the same prompt in a list of one is answered differently")
    return Observation(
        f"GET / says {root}; a text is answered by {form}, a list of one by a list of one"
    )


def check_unicode(gateway: CheckedGateway) -> Observation:
    """Every text is answered at its place, however its JSON is written."""
    prompts = [*_ODD_TEXTS, QUESTION]
    read_responses(gateway.predict(prompts, max_tokens=8), len(prompts))
    answers = []
    for ascii_only in (True, False):
        body = json.dumps({"prompt": prompts, "max_tokens": 8}, ensure_ascii=ascii_only).encode()
        headers = {"Content-Type": "application/json"}
        answer = gateway.http.post("/predict", content=body, headers=headers)
        answers.append(read_responses(answer, len(prompts)))
    expect(answers[0][-1] == answers[1][-1], "escaped and plain JSON are answered differently")
    expect(answers[0][-1].strip(), "the last text has an empty answer")
    return Observation(f"{len(prompts)} odd texts, escaped and plain")


def check_many_prompts(gateway: CheckedGateway) -> Observation:
    """More than the engine takes in one call; empty ones among them show whether order holds."""
    prompts = [f"{number} {QUESTION}" for number in range(_MANY)]
    for place in _REFUSED_PLACES:
        prompts[place] = ""
    started = time.perf_counter()
    answer = gateway.predict(prompts, max_tokens=4)
    responses = read_responses(answer, _MANY)
    elapsed_s = time.perf_counter() - started
    blank = tuple(place for place, text in enumerate(responses) if not text.strip())
    missing = len(set(blank) - set(_REFUSED_PLACES))
    expect(missing <= _MANY // 100, f"{missing} of {_MANY} answers are empty")
    refused = sorted(map(int, read_object(answer).get("errors", {})))
    expect(
        refused == [*_REFUSED_PLACES],
        f"empty prompts stood at {[*_REFUSED_PLACES]}, errors are at {refused[:8]}",
    )
    return Observation(f"{_MANY} answers in order in {elapsed_s:.1f} s", {"many_s": elapsed_s})


def check_over_long(gateway: CheckedGateway) -> Observation:
    """Alone an error that says why; in a list an empty answer at its place, the others whole."""
    long = "长" * (8 * gateway.max_model_len if gateway.max_model_len else 400_000)
    alone = gateway.predict(long)
    if alone.status_code == httpx.codes.OK:
        cut = read_object(alone).get("response")
        cut = cut[0] if isinstance(cut, list) and len(cut) == 1 else cut
        is_text = isinstance(cut, str) and cut.strip()
        expect(is_text, f"an over-long prompt has neither an answer nor an error: {cut!r}")
        return Observation("an over-long prompt is cut and answered")
    expect(400 <= alone.status_code < 500, f"alone it is answered {alone.status_code}")
    error = read_object(alone).get("error")
    message = error.get("message") if isinstance(error, dict) else None
    expect(message, f"alone it is refused without a reason: {alone.text[:120]}")
    mixed = gateway.predict([QUESTION, long, QUESTION])
    responses = read_responses(mixed, 3)
    expect(responses[1] == "", "in a list it has an answer")
    expect(responses[0].strip() and responses[2].strip(), "its neighbours have no answer")
    expect(list(read_object(mixed).get("errors", {})) == ["1"], "in a list its reason is missing")
    return Observation(f"{alone.status_code}, its neighbours are answered: {str(message)[:60]}")


def check_disconnect(gateway: CheckedGateway) -> Observation:
    """A caller who hangs up in the middle of a batch frees the engine at once."""
    before = gateway.count_running()
    if before is None:
        expect(False, "the server has no gateway_running_sequences at /metrics to see it by")
    idle = before or 0.0
    with contextlib.closing(_send_long_batch(gateway)):
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while (gateway.count_running() or 0.0) <= idle:
            expect(time.monotonic() < deadline, "the batch never was seen inside")
            time.sleep(0.02)
    hung_up = time.monotonic()
    while (running := gateway.count_running() or 0.0) > idle:
        waited_s = time.monotonic() - hung_up
        expect(waited_s < _FREED_WITHIN_S, f"{running:.0f} sequences run on {waited_s:.0f} s later")
        time.sleep(0.02)
    freed_s = time.monotonic() - hung_up
    read_responses(gateway.predict([QUESTION], max_tokens=4), 1)
    return Observation(
        f"the engine was free again after {freed_s * 1e3:.0f} ms", {"freed_s": freed_s}
    )


def _send_long_batch(gateway: CheckedGateway) -> http.client.HTTPConnection:
    """A connection on which a batch was sent that runs for long."""
    prompts = [f"{number} Q" for number in range(_LONG_BATCH)]
    length = max(16, min(1500, gateway.max_model_len - 64)) if gateway.max_model_len else 900
    body = json.dumps({"prompt": prompts, "temperature": 1.5, "max_tokens": length}).encode()
    url = urlsplit(gateway.url)
    is_secure = url.scheme == "https"
    kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    caller = kind(url.hostname or "", url.port, timeout=10)
    # The plain client's own, so that a key goes along.
    headers = {**gateway.http.headers, "Content-Type": "application/json"}
    caller.request("POST", url.path.rstrip("/") + "/predict", body, headers)
    return caller


CONTRACT_CHECKS = (
    ("empty list", check_empty_list),
    ("unicode", check_unicode),
    ("one prompt", check_one_prompt),
    (f"{_MANY:,} prompts", check_many_prompts),
    ("over-long", check_over_long),
    ("disconnect", check_disconnect),
)
