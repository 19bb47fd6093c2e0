"""`x-should-retry`: OpenAI's clients try again by themselves, and not where that is of no use."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from gateway.admission.accounts import ACCOUNTS
from gateway.admission.keys import make_key
from tests.gateway.conftest import Serve, Served


async def _ask(served: Served, key: str = "none") -> openai.APIStatusError:
    """With the SDK's own two retries."""
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key=key, max_retries=2
    ) as client:
        with pytest.raises(openai.APIStatusError) as raised:
            await client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "hi"}]
            )
        return raised.value


async def test_call_that_took_too_long_is_not_made_again(serve: Serve) -> None:
    async with serve(engine_timeout_s=1.0) as served:
        served.engine.delay_s = 60
        error = await _ask(served)

        assert (error.status_code, error.code) == (504, "engine_timeout")
        assert error.response.headers["x-should-retry"] == "false"
        assert len(served.engine.calls) == 1


async def test_call_past_its_deadline_is_not_made_again(served: Served) -> None:
    served.engine.delay_s = 60
    answer = await served.client.post(
        "/predict", json={"prompt": "a"}, headers={"X-Deadline-Ms": "100"}
    )
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")


async def test_call_of_a_key_that_has_long_to_wait_is_not_made_again(
    serve: Serve, tmp_path: Path
) -> None:
    """More than the minute that the SDK would wait; it would come back within a second."""
    key, entry = make_key("a")
    path = tmp_path / "keys.toml"
    path.write_text(entry + "tokens_per_minute = 2\n")
    async with serve(keys_file=path) as served:
        headers = {"Authorization": f"Bearer {key}"}
        first = await served.client.post("/predict", json={"prompt": "a"}, headers=headers)
        assert first.status_code == 200
        error = await _ask(served, key)

        assert (error.status_code, error.code) == (429, "tokens_per_minute")
        assert int(error.response.headers["Retry-After"]) > 60
        assert served.app[ACCOUNTS].read_usage()["a"].requests == 2


async def test_refusals_that_pass_say_nothing_of_retries(serve: Serve, tmp_path: Path) -> None:
    key, entry = make_key("a")
    path = tmp_path / "keys.toml"
    path.write_text(entry + "requests_per_minute = 60\n")
    async with serve(keys_file=path) as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        statuses, answer = [], await served.predict("a")
        while answer.status_code == 200:
            answer = await served.predict("a")
            statuses.append(answer.status_code)
        assert answer.status_code == 429
        assert "x-should-retry" not in answer.headers
