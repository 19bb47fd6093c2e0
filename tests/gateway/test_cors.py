"""Web pages of other origins: who may call, and what their browsers are told. By setting alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.admission.keys import make_key
from gateway.app import build_app
from gateway.config import SettingsError, load_settings
from tests.gateway.conftest import Serve, Served, make_settings

_APP = "https://app.example.com"
_PREFLIGHT = {
    "Origin": _APP,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}
_BROWSER = {"Origin": _APP, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}


async def test_options_without_the_setting_is_refused_as_ever(served: Served) -> None:
    answer = await served.client.options("/v1/chat/completions", headers=_PREFLIGHT)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert not any(name.startswith("access-control") for name in answer.headers)


async def test_listed_page_may_ask_and_call_without_a_key(serve: Serve) -> None:
    async with serve(cors_origins=(_APP,)) as served:
        asked = await served.client.options("/v1/chat/completions", headers=_PREFLIGHT)
        assert asked.status_code == 204
        assert asked.headers["Access-Control-Allow-Origin"] == _APP
        assert asked.headers["Access-Control-Allow-Methods"] == "POST"
        assert "x-stainless-lang" in asked.headers["Access-Control-Allow-Headers"]

        body = {"messages": [{"role": "user", "content": "hi"}], "model": "fake"}
        for fields in ({}, {"stream": True}, {"max_tokens": "many"}):
            answer = await served.client.post(
                "/v1/chat/completions", json=body | fields, headers=_BROWSER
            )
            assert answer.status_code == (400 if "max_tokens" in fields else 200)
            assert answer.headers["Access-Control-Allow-Origin"] == _APP
            assert "x-ratelimit-remaining-tokens" in answer.headers["Access-Control-Expose-Headers"]
            assert answer.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Origin" not in (await served.predict("a")).headers


@pytest.mark.parametrize("origin", ["https://evil.example", "http://app.example.com", "null"])
async def test_page_that_is_not_listed_is_told_nothing_and_refused(
    serve: Serve, origin: str
) -> None:
    async with serve(cors_origins=(_APP,)) as served:
        asked = await served.client.options("/predict", headers=_PREFLIGHT | {"Origin": origin})
        called = await served.client.post(
            "/predict", json={"prompt": "a"}, headers=_BROWSER | {"Origin": origin}
        )
        assert not any(name.startswith("access-control") for name in asked.headers)
        assert (called.status_code, called.json()["error"]["code"]) == (403, "cross_site")


async def test_any_page_may_call_a_gateway_with_keys(serve: Serve, tmp_path: Path) -> None:
    key, entry = make_key("a")
    path = tmp_path / "keys.toml"
    path.write_text(entry)
    async with serve(keys_file=path, cors_origins=("*",)) as served:
        asked = await served.client.options("/predict", headers=_PREFLIGHT)
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (204, "*")
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {key}"}, 200)):
            answer = await served.client.post(
                "/predict", json={"prompt": "a"}, headers=_BROWSER | headers
            )
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] == "*"


async def test_options_of_a_path_that_is_not_there_is_404(serve: Serve) -> None:
    async with serve(cors_origins=(_APP,)) as served:
        asked = await served.client.options("/v1/nothing", headers=_PREFLIGHT)
        assert (asked.status_code, asked.json()["error"]["code"]) == (404, "not_found")


async def test_listed_page_under_a_strangers_name_is_refused(serve: Serve) -> None:
    """Whose name points here is another question than who asks."""
    async with serve(cors_origins=(_APP,)) as served:
        answer = await served.client.post(
            "/predict", json={"prompt": "a"}, headers=_BROWSER | {"Host": "rebound.example"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "origin",
    [
        *("app.example.com", "https://app.example.com/", "HTTPS://a", ""),
        *("https://App.example.com", "https://app.example.com:443", "http://localhost:80"),
    ],
)
def test_origin_that_no_browser_sends_stops_the_start(origin: str) -> None:
    with pytest.raises(SettingsError, match="CORS_ORIGINS"):
        load_settings(["--cors-origins", f"https://ok.example,{origin or 'null'}"])


def test_any_origin_without_keys_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="without API keys"):
        build_app(make_settings(cors_origins=("*",)))
