"""/v1/responses/{id}: what engines keep, and what must not run past the limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.admission.keys import make_key
from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until


@pytest.mark.parametrize("value", [True, 1, "yes"])
async def test_background_response_is_refused(served: Served, value: object) -> None:
    answer = await served.client.post("/v1/responses", json={"input": "a", "background": value})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "background_not_served",
        "background",
    )
    assert served.engine.calls == []


@pytest.mark.parametrize("value", [False, None, 0, "no"])
async def test_response_in_the_foreground_is_served(served: Served, value: object) -> None:
    body = {"input": "a", "background": value}

    answer = await served.client.post("/v1/responses", json=body)

    assert (answer.status_code, served.engine.calls[-1]) == (200, body)


async def test_stored_response_is_found_at_whichever_engine_has_it(serve: Serve) -> None:
    engines = Behaviour(), Behaviour(responses=("resp_1",))
    async with (
        serve(*engines) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        found = await client.responses.retrieve("resp_1")
        cancelled = await client.responses.cancel("resp_1")
        with pytest.raises(openai.NotFoundError, match="'resp_2' not found"):
            await client.responses.retrieve("resp_2")

    assert (found.id, cancelled.id) == ("resp_1", "resp_1")
    assert engines[1].asked_responses == [
        "GET /v1/responses/resp_1",
        "POST /v1/responses/resp_1/cancel",
        "GET /v1/responses/resp_2",
    ]


@pytest.mark.parametrize("name", ["..", "%2e%2e", "a%2fb", "a.b", "x" * 200])
async def test_name_that_is_no_id_reaches_no_engine(served: Served, name: str) -> None:
    answer = await served.client.get(f"/v1/responses/{name}")

    assert answer.status_code in {404, 405}
    assert served.engine.asked_responses == []


async def test_stored_response_of_a_model_that_is_not_the_keys_is_not_told(
    serve: Serve, tmp_path: Path
) -> None:
    key, entry = make_key("one")
    file = tmp_path / "keys.toml"
    file.write_text(f'{entry}models = ["other"]\n')
    async with serve(Behaviour(responses=("resp_1",)), keys_file=file) as served:
        answer = await served.client.get(
            "/v1/responses/resp_1", headers={"Authorization": f"Bearer {key}"}
        )

        cancelled = await served.client.post(
            "/v1/responses/resp_1/cancel", headers={"Authorization": f"Bearer {key}"}
        )
        told = served.engine.asked_responses

    for one in (answer, cancelled):
        assert (one.status_code, one.json()["error"]["code"]) == (403, "model_not_allowed")
    assert told == ["GET /v1/responses/resp_1"] * 2


async def test_stored_response_of_the_keys_model_is_cancelled(serve: Serve, tmp_path: Path) -> None:
    key, entry = make_key("one")
    file = tmp_path / "keys.toml"
    file.write_text(f'{entry}models = ["fake"]\n')
    async with serve(Behaviour(responses=("resp_1",)), keys_file=file) as served:
        answer = await served.client.post(
            "/v1/responses/resp_1/cancel", headers={"Authorization": f"Bearer {key}"}
        )
        told = served.engine.asked_responses

    assert answer.status_code == 200
    assert told[-1] == "POST /v1/responses/resp_1/cancel"


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cuts_connection": True}])
async def test_stored_response_is_found_though_another_engine_fails(
    serve: Serve, fault: dict[str, Any]
) -> None:
    failing, having = Behaviour(), Behaviour(responses=("resp_1",))
    async with serve(failing, having) as served:
        for name, value in fault.items():
            setattr(failing, name, value)
        found = await served.client.get("/v1/responses/resp_1")
        await until(lambda: all(one.is_usable for one in served.app[POOL].engines))
        missing = await served.client.get("/v1/responses/resp_2")

    assert (found.status_code, found.json()["id"]) == (200, "resp_1")
    assert missing.status_code >= 500  # the one that failed may have it


async def test_stored_response_without_an_engine_is_503(serve: Serve) -> None:
    async with serve(Behaviour(is_healthy=False), wait_ready=False) as served:
        answer = await served.client.get("/v1/responses/resp_1")

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
