"""What is put where something else belongs: values, fields, headers, framings, methods, paths."""

from __future__ import annotations

from typing import Any

from lab.fuzz.cases.case import DEEP, HUGE, KEY

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 17, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30),
    *(0.5, -0.5, 2.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"), HUGE, DEEP),
    *("", " ", "\0", "\x1b[31m", "é" * 500, "a" * 50_000, "\ud800", "\udfff\ud800", "名", "0", "5"),
    *("<|im_start|>system", "{{ 7*7 }}", "%s%n", "../../etc/passwd", "\r\nX-Evil: 1", "\u2028"),
    *([], [[]], [None], [""], ["a", 1], [1, 2, 3], [-1], [2**40], [[5], [6]], [True], ["a"] * 1100),
    *({}, {"a": {}}, {"": None}, {"role": "user"}, [{"role": "user"}], {"type": "json_object"}),
    *({"include_usage": "yes"}, {"include_usage": True, "x": 1}, [{"type": "text", "text": "a"}]),
)
FIELDS = (
    *("prompt", "prompts", "system", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed"),
    *("model", "messages", "input", "stream", "stream_options", "n", "best_of", "logprobs", "echo"),
    *("top_logprobs", "prompt_logprobs", "response_format", "structured_outputs", "tools", "text"),
    *("guided_json", "priority", "user", "prompt_cache_key", "tool_choice", "request_id", "suffix"),
    *("max_completion_tokens", "ignore_eos", "min_tokens", "logit_bias", "truncate_prompt_tokens"),
    *("__proto__", "", "\0", "x\r\ny", "名", "a" * 300),
)
TEXTS: tuple[str | bytes, ...] = (
    *("", " ", "0", "1", "-1", "+5", "1e3", "0x10", "60000", "9" * 9, "9" * 30, "１２", "true"),
    *("a b", "x" * 128, "x" * 129, "x" * 7000, "ünïcode", "日本", "a,b", "a;b=c", '"quoted"', "*"),
    *("interactive", "batch", "highest", "gzip", "identity", "close", "*/*", "text/html", "\t"),
    *(b"\xff\xfe", b"\x80", b"caf\xe9", b"\xed\xa0\x80", b"a\x7fb", b"%00", b"%0d%0aX: 1"),
    *("Bearer", "Bearer ", "bearer x", "Basic dTpw", b"Bearer \xff", f"Bearer {KEY}x", "null"),
    *("application/json", "application/json; charset=utf-16", "multipart/form-data", "text/plain"),
    *("multipart/form-data; boundary=", "application/x-www-form-urlencoded", "a/b; c=\xff"),
    *("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1,other=2"),
)
HEADER_NAMES = (
    *("X-Request-Id", "X-Deadline-Ms", "X-Priority", "X-Session-Id", "Accept", "anthropic-version"),
    *("traceparent", "tracestate", "Content-Type", "Authorization", "x-api-key", "Cookie", "Range"),
    *("Accept-Encoding", "User-Agent", "Referer", "Origin", "If-None-Match", "X-Forwarded-For"),
    *("TE", "Trailer", "Via", "Date", "Forwarded", "X-Vllm-Priority", "Keep-Alive"),
    "Cache-Control",
    *("Proxy-Connection", "Max-Forwards", "Content-Language", "Content-Location", "Warning", "A"),
)
FRAMINGS: tuple[tuple[tuple[str, str | bytes], ...], ...] = (
    *((("Content-Length", "5"),), (("Content-Length", "99999"),)),
    *((("Content-Length", "999999999999999999999999"),), (("Content-Length", "-1"),)),
    *((("Content-Length", "+5"),), (("Content-Length", "0x10"),), (("Content-Length", "1e3"),)),
    *((("Content-Length", ""),), (("Content-Length", "5, 5"),)),
    (("Content-Length", "5"), ("Content-Length", "6")),
    (("Content-Length", "5"), ("Content-Length", "5")),
    (("Content-Length", "5"), ("Transfer-Encoding", "chunked")),
    (("Transfer-Encoding", "chunked"), ("Content-Length", "5")),
    *((("Transfer-Encoding", "chunked"),), (("Transfer-Encoding", "Chunked"),)),
    *((("Transfer-Encoding", "chunked, chunked"),), (("Transfer-Encoding", "gzip, chunked"),)),
    *((("Transfer-Encoding", "chunked, identity"),), (("Transfer-Encoding", "identity"),)),
    *((("Transfer-Encoding", "xchunked"),), (("Transfer-Encoding", b"\x0bchunked"),)),
    (("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "identity")),
    (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")),
    (("Upgrade", "h2c"), ("Connection", "Upgrade, HTTP2-Settings"), ("HTTP2-Settings", "AAMA")),
    *((("Connection", "close"),), (("Connection", "keep-alive, close"),), (("Expect", "200-ok"),)),
    *((("Expect", ""),), (("Expect", "100-continue, x"),), (("Host", "other"),)),
    *((("Host", b"\xff"),), (("Host", ""),), (("X" * 9000, "a"),), (("A", "b" * 9000),)),
    *(tuple(("A", "b") for _ in range(300)), (("A b", "c"),), (("A\0", "c"),), (("A", b"b\0c"),)),
    *((("A", b"b\nc"),), (("A", b"b\r\n folded"),), (("A", b"b\rc"),), ((" A", "b"),)),
    *((("", "b"),), (("Content-Length ", "5"),)),
)
METHODS = (
    *("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post", "POSTS"),
    *("M-SEARCH", "X" * 100, "PRI", "", "P\0ST", "GÉT"),
)
PATHS = (
    *("/", "/healthz", "/readyz", "/metrics", "/usage", "/v1/models", "/v1", "/v1/", "//predict"),
    *("/predict/", "/PREDICT", "/predict?x=1", "/predict?%ff=%", "/predict#a", "/predict;a", "*"),
    *("/v1/../collective_rpc", "/v1/%2e%2e/collective_rpc", "/health", "/v1/models/x", "/%"),
    "/%zz",
    *("/v1/completions%00", "/v1/completions?a=\udcff", "/\udcff\udcfe", "/名", "/a b", ""),
    "predict",
    *("http://gateway/predict", "http://other:1/v1/models", "http://[::1/predict", "http://"),
    "a:80",
    *("/v1/completions?" + "q" * 4000, "/" + "p" * 9000, "/" * 200),
    "/v1/chat/completions/../models",
    *("/ui", "/ui/", "/ui/page.js", "/ui/status", "/ui/x", "/ui/..%2f..%2fconfig.py", "/ui/%00"),
    *("//[", "//[::1]/predict", "//other/predict", "http://a:b/", "http://a:99999/", "//a:99999/"),
)
VERSIONS = (
    *("HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "HTTP/0.9", "HTTP/9", "HTTP/", "http/1.1", "", "X"),
    *("HTTP/1.1 x", "HTTP/11"),
)
