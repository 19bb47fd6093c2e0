"""A gateway without keys answers programs and its own page, and no page of another site."""

from __future__ import annotations

import socket

import httpx
import pytest

from common.ports import find_free_ports
from gateway.config import SettingsError, load_settings
from lab.fuzz.raw_http import ask, build_request
from tests.gateway.conftest import Serve, Served
from tests.plain_http import NO_TLS

BODY = b'{"prompt": "hello"}'
JSON = ("Content-Type", "application/json")
PATHS = ("/predict", "/v1/completions", "/v1/models", "/ui", "/ui/status", "/metrics", "/usage")


async def post(served: Served, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await served.client.post(
        "/predict", content=BODY, headers={"Content-Type": "application/json"} | named
    )


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "127.1",
        "[::1]:8000",
        "192.168.1.7",
        "localhost:8000",
        "LOCALHOST.",
        "app.localhost",
        "gateway:8000",
        "gateway_1",
        "gateway.internal",
        "gateway.default.svc.cluster.local:8000",
        "gateway.default.svc",
        "box.lan",
        "box.home.arpa",
        f"{socket.gethostname()}:8000",
    ],
)
async def test_gateway_answers_whoever_has_a_name_of_this_network(
    served: Served, host: str
) -> None:
    assert (await post(served, Host=host)).status_code == 200
    own = f"http://{host}"
    assert (await post(served, Host=host, Origin=own)).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["rebound.example:8000", "127.0.0.1.nip.io", "localhost.example", "a!b.example", "x.svc.io"],
)
async def test_gateway_under_a_strangers_name_refuses(served: Served, host: str) -> None:
    for path in PATHS:
        method = "POST" if path in {"/predict", "/v1/completions"} else "GET"
        answer = await served.client.request(method, path, headers={"Host": host})
        error = answer.json()["error"]

        assert (answer.status_code, error["code"]) == (403, "host_not_allowed"), path
        assert "GATEWAY_ALLOWED_HOSTS" in error["message"]
    assert served.engine.calls == []
    for path in ("/", "/healthz", "/readyz"):
        assert (await served.client.get(path, headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1"},
    ],
)
async def test_page_of_another_site_makes_nothing_generate(
    served: Served, headers: dict[str, str]
) -> None:
    answer = await post(served, **headers)

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
    assert "GATEWAY_ALLOWED_HOSTS" in answer.json()["error"]["message"]
    assert served.engine.calls == []


async def test_own_page_and_a_followed_link_are_answered(served: Served) -> None:
    host = served.url.removeprefix("http://")
    assert (await post(served, Origin=served.url)).status_code == 200
    # A proxy before it changed the Host; the browser says all the same whose page it is.
    through_proxy = {"Origin": "https://gateway.example", "Sec-Fetch-Site": "same-origin"}
    assert (await post(served, **through_proxy)).status_code == 200
    assert (await post(served, Origin=f"https://{host}")).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert (await served.client.get("/ui", headers=link)).status_code == 200
    assert (await served.client.get("/ui", headers={"Sec-Fetch-Site": "none"})).status_code == 200
    picture = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert (await served.client.get("/v1/models", headers=picture)).status_code == 403


@pytest.mark.parametrize("keys", [(), ("secret",)])
async def test_browser_that_asks_whether_a_page_may_send_json_hears_no(
    serve: Serve, keys: tuple[str, ...]
) -> None:
    async with serve(api_keys=keys) as served:
        question = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        answer = await served.client.options("/predict", headers=question)

        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_listed_hosts_may_call_and_their_pages_may(serve: Serve) -> None:
    async with serve(allowed_hosts=("llm.example", ".corp.example")) as served:
        for host in ("llm.example", "LLM.example.:80", "a.corp.example", "corp.example"):
            assert (await post(served, Host=host)).status_code == 200, host
        for host in ("x.llm.example", "badcorp.example", "example"):
            expected = 200 if host == "example" else 403
            assert (await post(served, Host=host)).status_code == expected, host
        page = {"Origin": "https://a.corp.example:8443", "Sec-Fetch-Site": "cross-site"}
        assert (await post(served, **page)).status_code == 200
        assert (await post(served, Origin="https://evil.example")).status_code == 403


async def test_any_host_may_be_listed_and_foreign_pages_stay_out(serve: Serve) -> None:
    """As the course's image does: nobody knows by which name its judge comes."""
    async with serve(allow_anonymous=True, allowed_hosts=("*",)) as served:
        assert (await post(served, Host="judge.example")).status_code == 200
        assert (await post(served, Origin="http://evil.example")).status_code == 403


async def test_anonymous_gateway_takes_programs_by_any_name_and_browsers_not(serve: Serve) -> None:
    async with serve(allow_anonymous=True) as served:
        assert (await post(served, Host="llm.example")).status_code == 200
        rebound = {"Host": "rebound.example", "Origin": "http://rebound.example"}
        answer = await post(served, **rebound)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


async def test_page_under_a_rebound_name_reads_what_an_anonymous_gateway_tells_and_no_more(
    serve: Serve,
) -> None:
    """Its GETs look like a program's, which may come by any name. A list of names keeps it out."""
    rebound = {"Host": "rebound.example"}
    browser = rebound | {"Origin": "http://rebound.example"}  # as with every POST
    async with serve(allow_anonymous=True) as served:
        for path in ("/v1/models", "/metrics"):
            assert (await served.client.get(path, headers=rebound)).status_code == 200
        assert (await post(served, **browser)).status_code == 403
        assert served.engine.calls == []
    async with serve(allow_anonymous=True, allowed_hosts=("llm.example",)) as served:
        for path in ("/v1/models", "/metrics"):
            assert (await served.client.get(path, headers=rebound)).status_code == 403
    async with serve(allow_anonymous=True, allowed_hosts=("*",)) as served:
        assert (await post(served, **browser)).status_code == 200  # `*` is any name
        foreign = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
        assert (await post(served, **foreign)).status_code == 403  # and no other page


async def test_gateway_with_keys_asks_for_the_key_alone(serve: Serve) -> None:
    async with serve(api_keys=("secret",)) as served:
        key = {"Authorization": "Bearer secret"}
        answer = await post(served, Host="llm.example", Origin="http://other.example", **key)
        assert answer.status_code == 200
        assert (await post(served, Host="llm.example")).status_code == 401


async def test_port_for_prometheus_is_not_for_a_name_that_points_here(serve: Serve) -> None:
    (port,) = find_free_ports(1)
    async with serve(metrics_port=port), httpx.AsyncClient(verify=NO_TLS) as client:
        url = f"http://127.0.0.1:{port}/metrics"
        assert (await client.get(url, headers={"Host": "gateway:8003"})).status_code == 200
        rebound = await client.get(url, headers={"Host": "rebound.example:8003"})
        assert (rebound.status_code, rebound.json()["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "json",
        ";",
    ],
)
@pytest.mark.parametrize("keys", [(), ("secret",)])
async def test_body_that_is_no_json_is_refused_whoever_sends_it(
    serve: Serve, kind: str, keys: tuple[str, ...]
) -> None:
    async with serve(api_keys=keys) as served:
        headers = {"Content-Type": kind, "Authorization": "Bearer secret"}
        for path in ("/predict", "/v1/chat/completions", "/tokenize"):
            answer = await served.client.post(path, content=BODY, headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (415, "unsupported_media_type")
            assert "application/json" in error["message"]
        assert served.engine.calls == []


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (JSON,),
        (("Content-Type", "Application/JSON; charset=utf-8"),),
        (("Content-Type", "application/vnd.api+json"),),
    ],
)
async def test_body_that_is_json_or_says_nothing_is_read(
    served: Served, headers: tuple[tuple[str, str], ...]
) -> None:
    answer = await ask(served.url, build_request("POST", "/predict", BODY, headers))

    assert answer.status == 200


@pytest.mark.parametrize("entry", ["http://x.example", "x.example:80", "a b", "*.example.com", ""])
def test_list_of_hosts_with_what_is_none_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.setenv("GATEWAY_PROMPT_STYLE", "raw")
    monkeypatch.setenv("GATEWAY_ALLOWED_HOSTS", f"ok.example,{entry}")
    if not entry:
        assert load_settings().allowed_hosts == ("ok.example",)
        return
    with pytest.raises(SettingsError, match=r"GATEWAY_ALLOWED_HOSTS: .* is no host"):
        load_settings()
