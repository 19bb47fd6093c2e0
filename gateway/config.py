"""Every setting of the gateway, declared once: the variable (`GATEWAY_PORT`), the flag (`--port`),
`--help` and the table in the docs come from here. How they are read is in `common/settings.py`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from aiohttp import web
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.config import JsonDict
from pydantic_settings import SettingsConfigDict

from common.errors import SettingsError
from common.files import read_text
from common.project import DEMO_QUESTIONS
from common.settings import (
    CommaList,
    OptionalAddress,
    ProgramSettings,
    SettingRow,
    check_address,
    describe_settings,
    read_settings,
)
from common.web.cors import check_origins
from common.web.foreign_pages import check_hosts

__all__ = ["SETTINGS", "Settings", "SettingsError", "list_settings", "load_settings"]

PREFIX = "GATEWAY_"
# Of a setting that is taken from GATEWAY_CONFIG while the gateway runs; its schema says so, too.
AT_ONCE: JsonDict = {"x-taken-at-once": True}
CONSTRAINTS = ("json", "choice", "regex", "tools", "grammar", "structural_tag")
# What stands before the address of a place where engines are found.
SOURCE = re.compile(r"(dns|srv|kubernetes)\+(?=https?://)")
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w./-]*)?")
_SYSTEM_PROMPTS = Path(__file__).parent / "prompts" / "system_prompts"


def _name_server(url: str) -> str:
    """The same for the same server, however its address is written."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme.rpartition("+")[2]]
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{port}{parts.path}"


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_engine(entry: str) -> str:
    """An engine's address, or where engines are found."""
    source = SOURCE.match(entry)
    if source is None:
        return check_address(entry)
    parts = urlsplit(check_address(entry[source.end() :]))
    if parts.username or parts.password:
        raise ValueError("where engines are found by name, they have no user and password")
    if parts.scheme == "https" and source[1] != "srv":
        raise ValueError(f"{entry!r}: no certificate names an address; use http, or srv+https")
    if parts.port and source[1] == "srv":
        raise ValueError(f"{entry!r}: SRV records tell the port; leave it out")
    return entry


class Settings(ProgramSettings):
    """An OpenAI-compatible gateway over vLLM engines.

    Before the flags, `check` only judges the settings. Alone: `new-key NAME` makes an API key,
    `roll URL --config FILE` puts new engines in the place of old ones, `schema` prints the JSON
    schema of the settings file, `example` such a file with every setting, `completion SHELL`
    completes flags.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, cli_prog_name="python -m gateway")
    groups: ClassVar[Mapping[str, str]] = {
        "config": "Where settings come from",
        "host": "Where it listens, and what it calls",
        "prompt_style": "How /predict asks",
        "max_tokens": "How /predict answers",
        "root_status": "Getting warm",
        "api_keys": "Who may come in",
        "reload_interval_s": "Files that are followed",
        "max_body_bytes": "What a caller may send",
        "engine_sequences": "The queue before the engines",
        "dedup": "Calls of engines",
        "routing": "/v1",
        "keepalive_comment_s": "Streams, and callers who are slow",
        "connect_timeout_s": "Times",
        "responses_database": "Stored responses",
        "usage_database": "Usage and audit",
        "ui": "The page",
        "grade_record": "Figures and spans",
        "log_format": "The log",
    }

    config: Path | None = Field(
        None,
        description="TOML file with any of these settings; read again when it changes, and what "
        "can be is taken at once (docs/operations.md).",
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    reuse_port: bool = Field(
        False,
        description="Let several gateways listen on one port of this host; the kernel spreads "
        "connections over them. Each keeps its own limits and metrics.",
    )
    engines: CommaList = Field(
        ("http://127.0.0.1:8001",),
        description="Base URLs of the engines, separated by commas; or where they are found: "
        "`dns+http://name:8001` (each address of the name), `srv+http://_http._tcp.name` (its SRV "
        "records), `kubernetes+http://service.namespace:8001` (the service's ready endpoints).",
        json_schema_extra=AT_ONCE,
    )
    discovery_interval_s: float = Field(
        2.0,
        gt=0,
        description="Longest pause between two looks at a DNS name for engines; a shorter time to "
        "live of its records is followed, but no more than once a second.",
    )
    dns_server: str = Field(
        "",
        description="Name server for engines found by DNS, as `address:port`; empty: those of this "
        "host.",
    )
    kubernetes_api: OptionalAddress = Field(
        "",
        description="Address of the Kubernetes API for engines found by it; empty: the cluster's "
        "that the gateway runs in.",
    )
    kubernetes_account: Path = Field(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        description="Folder with the service account's `token`, `ca.crt` and `namespace`.",
    )
    tokenizer: Path | None = Field(
        None,
        description="Folder with the model's tokenizer.json and chat template; without it prompts "
        "travel as text and the style `chat` cannot be used.",
    )

    default_model: str = Field(
        "",
        description="Model that /predict and calls without `model` ask, where the engines serve "
        "several; GATEWAY_TOKENIZER is then this one's. Empty: the only one.",
    )
    expected_models: CommaList = Field(
        (),
        description="Models that engines will come to serve, separated by commas: a call of one is "
        "held while it has no engine, not refused. `launcher up` sets it where engines take turns.",
    )
    tokenizers: CommaList = Field(
        (),
        description="Folders with tokenizer and chat template of further models: "
        "`name=/path/of/folder`, separated by commas. A model without one gets its prompts of "
        "/predict as text, without a template.",
    )

    prompt_style: Literal["chat", "chatml", "qa", "raw"] = Field(
        "chat",
        description="How /predict turns a question into a prompt: chat is the model's own "
        "template.",
        json_schema_extra=AT_ONCE,
    )
    system_prompt: str = Field(
        "",
        description="System prompt that /predict puts before each question.",
        json_schema_extra=AT_ONCE,
    )
    system_prompt_file: str = Field(
        "",
        description="File with the system prompt of /predict, or the shipped `one-line` (the "
        "course's 1)… 2)…).",
        json_schema_extra=AT_ONCE,
    )
    enable_thinking: bool = Field(
        False,
        description="Let /predict's answers begin with thinking, where the chat template knows it "
        "(Qwen3's).",
        json_schema_extra=AT_ONCE,
    )
    max_input_tokens: int = Field(
        0,
        ge=0,
        description="Cut a question of /predict so that its prompt has at most so many tokens; 0: "
        "refuse what is too long.",
        json_schema_extra=AT_ONCE,
    )

    max_tokens: int = Field(
        256,
        ge=1,
        description="New tokens that an answer of /predict may have.",
        json_schema_extra=AT_ONCE,
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=2,
        description="Temperature of /predict; 0 is greedy.",
        json_schema_extra=AT_ONCE,
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the probability that /predict samples from (nucleus sampling).",
        json_schema_extra=AT_ONCE,
    )
    top_k: int = Field(
        0,
        ge=-1,
        description="How many tokens /predict samples from; 0 or -1: all.",
        json_schema_extra=AT_ONCE,
    )
    seed: int | None = Field(
        None,
        description="Seed of /predict's sampling; empty: another one for each call.",
        json_schema_extra=AT_ONCE,
    )
    stop: CommaList = Field(
        (),
        description="Texts that end an answer of /predict, separated by commas.",
        json_schema_extra=AT_ONCE,
    )
    single_line: bool = Field(
        False,
        description="Fold the line breaks of /predict's answers into spaces.",
        json_schema_extra=AT_ONCE,
    )
    strip_thinking: bool = Field(
        True,
        description="Leave the <think> block out of /predict's answers.",
        json_schema_extra=AT_ONCE,
    )
    single_as_list: bool = Field(
        False,
        description="Answer a single prompt of /predict with a list of one, as one course entry "
        "does.",
        json_schema_extra=AT_ONCE,
    )

    root_status: Literal["batch", "ok"] = Field(
        "batch",
        description="What GET / says when warm: the course's judge reads its mode there.",
        json_schema_extra=AT_ONCE,
    )
    root_hold_s: float = Field(
        10.0, ge=0, description="How long GET / waits for the warm-up before it answers 503."
    )
    warmup_prompts: int = Field(
        358, ge=1, description="Questions in the warm-up batch: the batch size that will be served."
    )
    warmup_file: Path = Field(
        DEMO_QUESTIONS,
        description="Questions for the warm-up, in any form that `python -m lab grade` reads.",
    )
    warmup_timeout_s: float = Field(
        600.0, gt=0, description="Time that one warm-up batch may take."
    )

    api_keys: CommaList = Field(
        (),
        repr=False,
        description="API keys, separated by commas; better in GATEWAY_KEYS_FILE, hashed.",
    )
    keys_file: Path | None = Field(
        None,
        description="TOML file with hashed keys and their limits; read again when it changes. "
        "`python -m gateway new-key NAME` makes an entry.",
    )
    redis_url: str = Field(
        "",
        repr=False,
        description="Redis in which several gateways keep the keys' limits together "
        "(`redis://:password@host:6379/0`, `rediss://` for TLS, `unix://`); empty: each gateway "
        "keeps its own.",
    )
    redis_away: Literal["local", "refuse"] = Field(
        "local",
        description="What becomes of calls of keys with limits while Redis is away: local limits "
        "them in each gateway alone, refuse answers 503.",
    )
    redis_timeout_s: float = Field(
        0.5,
        gt=0,
        description="How long a request waits for Redis before Redis counts as away.",
    )
    allow_anonymous: bool = Field(
        False, description="Serve everybody on an address that is not the loopback's, without keys."
    )
    allowed_hosts: CommaList = Field(
        (),
        description="Further names by which a gateway without keys and the port for Prometheus may "
        "be called, separated by commas; `.example.com` is all names below it, `*` any. Addresses, "
        "names of one word and names that no public DNS has (`x.internal`, `x.local`) always may. "
        "With GATEWAY_ALLOW_ANONYMOUS and no list, only browsers are held to it.",
    )

    cors_origins: CommaList = Field(
        (),
        description="Origins whose web pages may call this gateway from a browser "
        "(`https://app.example.com`), separated by commas; `*` any, which needs keys. Empty: none "
        "but the gateway's own.",
    )

    reload_interval_s: float = Field(
        1.0, gt=0, description="Pause between two looks at the keys file and the settings file."
    )

    max_body_bytes: int = Field(32 * 2**20, ge=1024, description="Largest request body.")
    max_body_values: int = Field(
        4_000_000,
        ge=1,
        description="Most values (numbers, texts and so on) in a request body; an object or a list "
        "counts for 100.",
        json_schema_extra=AT_ONCE,
    )
    max_held_bytes: int = Field(
        128 * 2**20,
        ge=1024,
        description="Bytes of request bodies that may be in memory at once, from their arrival "
        "until an engine answers; those above 64 KiB leave an eighth of it to the others.",
    )
    max_bytes_per_token: int = Field(
        16,
        ge=1,
        description="Longest text of a call, as so many bytes for each token of the model's "
        "context (of /predict, characters); what is longer is refused before it is cut into "
        "tokens.",
        json_schema_extra=AT_ONCE,
    )
    refusals_per_s: int = Field(
        200,
        ge=0,
        description="Refused requests (4xx, 429 aside) that are answered in a second, of all "
        "callers together; what comes on top waits its turn, a second at most, so that a flood "
        "of bad requests from a few hundred connections leaves time for the good ones. 0: as "
        "many as come.",
    )
    max_prompts: int = Field(
        10_000, ge=1, description="Most prompts in one /predict call.", json_schema_extra=AT_ONCE
    )
    max_n: int = Field(
        16, ge=1, description="Largest `n` and `best_of` of a /v1 call.", json_schema_extra=AT_ONCE
    )
    max_logprobs: int = Field(
        20,
        ge=-1,
        description="Largest `logprobs` of a /v1 call; -1: as many as the engine allows, which may "
        "be its whole vocabulary.",
        json_schema_extra=AT_ONCE,
    )
    max_new_tokens: int = Field(
        131_072,
        ge=1,
        description="Largest `max_tokens` of a /v1 call, by whichever name.",
        json_schema_extra=AT_ONCE,
    )
    max_schema_bytes: int = Field(
        65_536,
        ge=1,
        description="Largest JSON schema or tool list of a /v1 call.",
        json_schema_extra=AT_ONCE,
    )
    media_hosts: CommaList = Field(
        (),
        description="Hosts that a call's media (images, audio, video by URL) may come from though "
        "their addresses are no public ones, separated by commas; `.example.com` is all names "
        "below it, `*` any host whatsoever.",
    )
    media_options: bool = Field(
        False,
        description="Let callers say how the engine reads and prepares media (`media_io_kwargs`, "
        "`mm_processor_kwargs`): how many frames and pixels it makes of a file, which nobody "
        "bounds.",
        json_schema_extra=AT_ONCE,
    )
    structured_outputs: CommaList = Field(
        ("json", "choice", "regex", "tools"),
        description="Constraints that callers may put on an answer's form: json, choice, regex, "
        "tools (forced or strict ones), and, for trusted callers since their cost cannot be told "
        "beforehand, grammar and structural_tag. A key may have a list of its own.",
        json_schema_extra=AT_ONCE,
    )
    max_regex_characters: int = Field(
        4096,
        ge=1,
        description="Most characters in all regular expressions of a /v1 call.",
        json_schema_extra=AT_ONCE,
    )
    max_regex_states: int = Field(
        20_000,
        ge=1,
        description="Most parts that a regular expression of a /v1 call may have, its counts "
        "multiplied out.",
        json_schema_extra=AT_ONCE,
    )
    max_uncertain_states: int = Field(
        64,
        ge=1,
        description="The same for one in which it is not certain where a part ends and the next "
        "begins: the engine follows all possibilities side by side.",
        json_schema_extra=AT_ONCE,
    )
    max_prompts_per_call: int = Field(
        1024,
        ge=1,
        description="Most prompts in one call to an engine (vLLM's own cap is 1024).",
        json_schema_extra=AT_ONCE,
    )
    engine_sequences: int = Field(
        0,
        ge=0,
        description="Sequences that each engine runs at once (vLLM's `max-num-seqs`): more are not "
        "sent to it, but a few that wait there. 0: as its launcher says (GATEWAY_LAUNCHERS), else "
        "learnt from its metrics. `launcher up` sets it.",
    )
    max_running: int = Field(
        4096,
        ge=1,
        description="Sequences that may be inside a model's engines at once, whatever they run; "
        "while that is not known, no request counts for more than half of them.",
    )
    max_waiting: int = Field(
        16_384,
        ge=0,
        description="Sequences that may wait in a model's queue for a place inside its engines.",
        json_schema_extra=AT_ONCE,
    )
    queue_timeout_s: float = Field(
        120.0,
        gt=0,
        description="How long a request may wait in the queue for a place inside the engines.",
        json_schema_extra=AT_ONCE,
    )
    interactive_weight: float = Field(
        8.0, gt=0, description="Weight of the lane `interactive` when both lanes wait for places."
    )
    batch_weight: float = Field(
        1.0, gt=0, description="Weight of the lane `batch` when both lanes wait for places."
    )

    dedup: bool = Field(
        True,
        description="Generate identical greedy prompts of /predict once and answer all of them.",
    )
    max_attempts: int = Field(
        3, ge=1, description="How often a call is sent to engines before its failure is told."
    )
    restart_hold_s: float = Field(
        30.0,
        ge=0,
        description="How long a request waits while no engine is ready, as during a restart.",
    )
    expected_start_s: float = Field(
        60.0,
        gt=0,
        description="How long an engine's start is thought to take until one has been seen: what "
        "Retry-After says.",
    )
    breaker_failures: int = Field(
        5, ge=1, description="Failures in a row after which an engine is left alone for a while."
    )
    breaker_pause_s: float = Field(
        5.0, ge=0, description="How long an engine is left alone after failures in a row."
    )

    routing: Literal["least", "session", "prefix"] = Field(
        "least",
        description="Which engine gets a /v1 call: the one with least to do; or always the same "
        "for a session (X-Session-Id, prompt_cache_key, user) or for prompts that begin alike.",
    )
    prefix_characters: int = Field(
        1024,
        ge=1,
        description="Characters at a prompt's beginning that count for routing by prefix.",
    )
    aliases: CommaList = Field(
        (),
        description="Further names for models: `gpt-4o=demo`, separated by commas.",
        json_schema_extra=AT_ONCE,
    )
    keepalive_comment_s: float = Field(
        15.0,
        gt=0,
        description="Silence after which a stream gets a comment, so that proxies do not cut it.",
    )
    stream_idle_timeout_s: float = Field(
        300.0, gt=0, description="Silence after which an engine's stream has failed."
    )
    body_timeout_s: float = Field(60.0, gt=0, description="Time for a request's body to arrive.")
    client_write_timeout_s: float = Field(
        120.0,
        gt=0,
        description="How long a caller may take nothing of their answer before the connection is "
        "closed.",
    )

    connect_timeout_s: float = Field(5.0, gt=0, description="Time to connect to an engine.")
    engine_timeout_s: float = Field(900.0, gt=0, description="Time for one call to an engine.")
    engine_keepalive_s: float = Field(
        4.0,
        ge=0,
        description="How long an idle connection to an engine is kept; less than the engine keeps "
        "it (vLLM: 5 s).",
    )
    probe_interval_s: float = Field(
        1.0, gt=0, description="Pause between two looks at an engine's health."
    )
    probe_timeout_s: float = Field(
        5.0, gt=0, description="Time that one look at an engine's health may take."
    )
    client_keepalive_s: float = Field(
        75.0, ge=0, description="How long a caller's idle connection is kept."
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        description="Time for running requests to finish once the gateway is told to stop.",
    )

    batch_folder: Path | None = Field(
        None,
        description="Folder for what /v1/files and /v1/batches keep; empty, and without "
        "GATEWAY_BATCH_BUCKET: these routes are off. Several gateways may share one: on one host, "
        "or on a shared file system with GATEWAY_BATCH_DATABASE.",
    )
    batch_database: str = Field(
        "",
        repr=False,
        description="PostgreSQL for the state of files and batches, as "
        "`postgresql://user:password@host/name`; needs the extra `postgres`. Empty: a SQLite file "
        "in GATEWAY_BATCH_FOLDER, which then has to be on a local disk.",
    )
    batch_bucket: str = Field(
        "",
        description="Bucket for the bytes of files, as `s3://bucket/prefix`, in S3 or what speaks "
        "its protocol; needs the extra `s3`, and GATEWAY_BATCH_DATABASE or a folder for SQLite. "
        "Empty: they are in GATEWAY_BATCH_FOLDER.",
    )
    batch_s3_endpoint: OptionalAddress = Field(
        "", description="Address of the bucket's storage; empty: AWS, or AWS_ENDPOINT_URL."
    )
    batch_s3_region: str = Field(
        "", description="Region of the bucket; empty: AWS_REGION, or us-east-1."
    )
    batch_s3_key: str = Field(
        "",
        repr=False,
        description="Key for the bucket, as `access key:secret`; empty: what AWS's own variables "
        "say (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of the pod).",
    )
    batch_max_file_bytes: int = Field(
        2**30, ge=1024, description="Largest file that can be uploaded for a batch."
    )
    batch_max_lines: int = Field(
        50_000, ge=1, description="Most requests (lines) in a file for a batch."
    )
    batch_max_jobs: int = Field(
        100,
        ge=1,
        description="Most batches of one key that have not ended; a key may have a bound of its "
        "own.",
    )
    batch_max_stored_bytes: int = Field(
        20 * 2**30,
        ge=1024,
        description="Most bytes that the files of one key may take, those with answers included; a "
        "key may have a bound of its own.",
    )
    batch_max_running: int = Field(
        256,
        ge=1,
        description="Most requests of batches that this gateway has running at once; below that it "
        "finds out by itself how many the engines bear.",
    )
    batch_retention_days: float = Field(
        30.0,
        gt=0,
        le=3650,
        description="How long files and ended batches are kept, unless their caller or their key "
        "says less.",
    )
    batch_lease_s: float = Field(
        15.0,
        gt=0,
        description="Silence of the gateway that runs a batch after which another one, or the same "
        "after a restart, takes it over.",
    )

    responses_database: str = Field(
        "",
        repr=False,
        description="Database for what /v1/responses stores, so that a conversation goes on by "
        "`previous_response_id` and background responses can be fetched: the path of a SQLite file "
        "on a local disk, or `postgresql://user:password@host/name` (extra `postgres`), which "
        "several gateways may share. Empty: nothing is stored.",
    )
    responses_retention_days: float = Field(
        30.0,
        gt=0,
        le=3650,
        description="How long a stored response is kept; what a later one goes on from, as long as "
        "that.",
    )
    responses_max_input_bytes: int = Field(
        4 * 2**20,
        ge=1024,
        description="Largest `input` of a call whose response is stored, or run in the background.",
    )
    responses_max_stored: int = Field(
        10_000,
        ge=1,
        description="Most stored responses of one key; of more, those conversations go that have "
        "rested longest.",
    )
    responses_max_stored_bytes: int = Field(
        2**30,
        ge=2**20,
        description="Most bytes that the stored responses of one key may take; of more, those "
        "conversations go that have rested longest.",
    )
    responses_max_turns: int = Field(
        1000, ge=1, le=10_000, description="Most responses of one conversation, one after another."
    )
    responses_max_background: int = Field(
        1000,
        ge=1,
        description="Most background responses that this gateway has waiting or running at once; "
        "they do not count for GATEWAY_MAX_WAITING.",
    )
    responses_lease_s: float = Field(
        15.0,
        gt=0,
        description="Silence of a gateway that runs a background response after which another one, "
        "or the same after a restart, declares it failed.",
    )

    usage_database: str = Field(
        "",
        repr=False,
        description="Database for what each key uses by model and day, for budgets and for the "
        "audit: the path of a SQLite file on a local disk, or "
        "`postgresql://user:password@host/name` (extra `postgres`), which several gateways may "
        "share. Empty: nothing of it is kept.",
    )
    usage_interval_s: float = Field(
        1.0,
        gt=0,
        description="Pause between two writes of usage and audit, and between two looks at what "
        "other gateways have used of budgets.",
    )
    audit: bool = Field(
        False,
        description="Keep a row of each request in GATEWAY_USAGE_DATABASE: who, when, which model, "
        "sizes, verdict. Prompt and answer only of keys whose entry says `audit_text = true`.",
    )
    audit_redact: CommaList = Field(
        ("emails", "keys", "phones"),
        description="What is taken out of prompts and answers before they are kept: emails, keys, "
        "phones, or regular expressions whose repeats are bounded; one with a comma in the "
        "settings file.",
    )
    audit_text_characters: int = Field(
        8192, ge=1, le=65_536, description="Characters that are kept of a prompt and of an answer."
    )
    audit_ttl_days: float = Field(
        30.0, gt=0, le=3650, description="How long rows of the audit are kept."
    )

    ui: bool = Field(True, description="Serve the page at /ui.")
    launchers: CommaList = Field(
        (),
        description="Status addresses of the engines' launchers, shown on the page, separated by "
        "commas; `http://*:8002` is that port on the host of each engine. `launcher up` sets it.",
    )

    grade_record: Path | None = Field(
        None,
        description="Record that `python -m lab grade --record FILE` writes; /metrics tells its "
        "figures.",
    )
    metrics_host: str = Field(
        "127.0.0.1", description="Address of the port for Prometheus alone (GATEWAY_METRICS_PORT)."
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port for Prometheus alone, with the usage of each key by its name, which the "
        "public /metrics tells only as a sum; 0: none.",
    )
    metrics_keys: int = Field(
        200,
        ge=0,
        description="Keys that have usage figures of their own in the metrics; all others are one "
        "figure.",
    )
    otlp_endpoint: OptionalAddress = Field(
        "",
        description="Send spans to this OpenTelemetry collector (OTLP over HTTP, such as "
        "`http://localhost:4318`); needs the extra `otel`. The rest by OTEL_* variables.",
    )

    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="Form of the log: auto is readable on a terminal and JSON elsewhere."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe lines that are logged.", json_schema_extra=AT_ONCE
    )

    @field_validator("structured_outputs")
    @classmethod
    def _check_constraints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value).difference(CONSTRAINTS):
            raise ValueError(f"{min(unknown)!r} is none of {', '.join(CONSTRAINTS)}")
        return value

    @field_validator("aliases")
    @classmethod
    def _check_aliases(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pair in value:
            if not all(pair.partition("=")):
                raise ValueError(f"{pair!r} is not alias=model")
        return value

    @field_validator("batch_database")
    @classmethod
    def _check_database(cls, value: str) -> str:
        if value and not value.startswith(("postgresql://", "postgres://")):
            raise ValueError("give postgresql://user:password@host/name, or nothing for SQLite")
        return value

    @field_validator("batch_bucket")
    @classmethod
    def _check_bucket(cls, value: str) -> str:
        if value and not _BUCKET.fullmatch(value):
            raise ValueError(f"{value!r} is not s3://bucket/prefix")
        return value

    @field_validator("batch_s3_key")
    @classmethod
    def _check_s3_key(cls, value: str) -> str:
        if value and not all(value.partition(":")):
            raise ValueError("give access key:secret")
        return value

    @field_validator("responses_database", "usage_database")
    @classmethod
    def _check_place(cls, value: str) -> str:
        if "://" in value and not value.startswith(("postgresql://", "postgres://")):
            raise ValueError("give the path of a file, or postgresql://user:password@host/name")
        return value

    @field_validator("tokenizers")
    @classmethod
    def _check_tokenizers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pair in value:
            model, _, folder = pair.partition("=")
            if not model.strip() or not folder.strip():
                raise ValueError(f"{pair!r} is not model=folder")
            if not Path(folder.strip()).is_dir():
                raise ValueError(f"there is no folder {folder.strip()!r}")
        return value

    @field_validator("allowed_hosts", "media_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_hosts(value)

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_origins(value)

    @cached_property
    def alias_map(self) -> dict[str, str]:
        pairs = (pair.partition("=") for pair in self.aliases)
        return {alias.strip(): model.strip() for alias, _, model in pairs}

    @cached_property
    def tokenizer_map(self) -> dict[str, Path]:
        pairs = (pair.partition("=") for pair in self.tokenizers)
        return {model.strip(): Path(folder.strip()) for model, _, folder in pairs}

    @field_validator("dns_server")
    @classmethod
    def _check_dns_server(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        is_port = port.isdecimal() and 0 < int(port) < 2**16
        if value and not (is_port and _is_ip_address(host.strip("[]"))):
            raise ValueError(f"{value!r} is not address:port, such as 10.0.0.10:53")
        return value

    @field_validator("engines", "launchers")
    @classmethod
    def _check_addresses(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value and info.field_name == "engines":
            raise ValueError("at least one engine is needed")
        check = _check_engine if info.field_name == "engines" else check_address
        urls = tuple(check(url).rstrip("/") for url in value)
        if twice := [url for url, n in Counter(map(_name_server, urls)).items() if n > 1]:
            raise ValueError(f"{twice[0]} is there twice")
        return urls

    @model_validator(mode="after")
    def _check_files(self) -> Settings:
        if self.metrics_port and self.metrics_port == self.port:
            raise ValueError("metrics_port must be another than port, which everybody can reach")
        self._check_batches()
        if self.audit and not self.usage_database:
            raise ValueError("audit needs usage_database too: its rows are kept there")
        if self.system_prompt and self.system_prompt_file:
            raise ValueError("give system_prompt or system_prompt_file, not both")
        if self.prompt_style == "chat" and self.tokenizer is None:
            raise ValueError(
                "prompt_style chat needs the model's template: set tokenizer to the model's "
                "folder, or prompt_style to chatml, qa or raw"
            )
        if self.tokenizer is not None and not self.tokenizer.is_dir():
            raise ValueError(f"tokenizer: there is no folder {str(self.tokenizer)!r}")
        if not self.warmup_file.is_file():
            raise ValueError(f"warmup_file: there is no file {str(self.warmup_file)!r}")
        self.read_system_prompt()
        return self

    def foresee(self, other: Settings) -> Settings:
        """These as they would be with what another one has of what is taken at once."""
        copy = self.model_copy()
        copy.take(other)
        return copy

    def take(self, other: Settings) -> None:
        """The one change that there is: all who read a setting when they need it see the new one.
        What is only right together has been judged before.
        """
        for name in list_taken_at_once():
            self.__dict__[name] = getattr(other, name)
        self.__dict__.pop("alias_map", None)  # which is made of another one

    def _check_batches(self) -> None:
        if self.batch_database and not self.keeps_batches:
            raise ValueError(
                "batch_database needs batch_folder or batch_bucket too: files are kept there"
            )
        if self.batch_bucket and not self.batch_database and self.batch_folder is None:
            raise ValueError(
                "batch_bucket needs batch_database too, or batch_folder for SQLite: what is known "
                "of the files is kept there"
            )
        if not self.batch_bucket and (
            self.batch_s3_endpoint or self.batch_s3_region or self.batch_s3_key
        ):
            raise ValueError("batch_s3_… is for a bucket: name it with batch_bucket")

    @property
    def keeps_batches(self) -> bool:
        return self.batch_folder is not None or bool(self.batch_bucket)

    def read_system_prompt(self) -> str:
        """The system prompt of /predict, from whichever setting holds it."""
        if not self.system_prompt_file:
            return self.system_prompt
        shipped = _SYSTEM_PROMPTS / f"{self.system_prompt_file}.txt"
        path = shipped if shipped.is_file() else Path(self.system_prompt_file)
        try:
            return read_text(path).strip()
        except OSError as error:
            names = ", ".join(sorted(file.stem for file in _SYSTEM_PROMPTS.glob("*.txt")))
            raise ValueError(
                f"system_prompt_file: cannot read {str(path)!r} ({error.strerror}); "
                f"shipped: {names}"
            ) from None


SETTINGS = web.AppKey("settings", Settings)


def load_settings(arguments: Sequence[str] = ()) -> Settings:
    """Flags, then the environment, then the file; `SettingsError` says what is wrong."""
    if PREFIX + "SERVICE_HOST" in os.environ:
        raise SettingsError(
            f"{PREFIX}SERVICE_HOST is Kubernetes' word for its Service `gateway`, and others of "
            "its words look like settings: say `enableServiceLinks: false` in the pod's spec"
        )
    if PREFIX + "WORKERS" in os.environ:
        raise SettingsError(
            f"{PREFIX}WORKERS is no setting any more: a gateway is one process. Several "
            f"gateways share a port with {PREFIX}REUSE_PORT=true (docs/gateway.md)"
        )
    return read_settings(Settings, arguments)


def list_taken_at_once() -> list[str]:
    """Settings that are taken from the file while the gateway runs."""
    fields = Settings.model_fields.items()
    return [name for name, field in fields if field.json_schema_extra == AT_ONCE]


def list_settings() -> list[SettingRow]:
    return describe_settings(Settings)
