"""What `python -m lab bench` is told, and what follows: what is measured, how much, how long."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from lab import options
from lab.bench.relay.relay_comparison import RelayLoad
from lab.bench.rounds import RoundBudget
from lab.bench.vllm_bench import VllmBenchLoad
from lab.bench.workloads import BenchWorkload, ManyCalls, ManyStreams, OneCall
from lab.intervals import FEWEST_ROUNDS
from lab.paths import OUT

PARTS = ("one", "batch", "calls", "streams", "outside", "relay")
QUICK_PARTS = ("one", "batch", "calls", "streams", "relay")
# Short answers where what is added to a call is sought: it does not depend on their length.
_SINGLE_TOKENS, _STREAM_TOKENS = 8, 64
SINGLE_TITLE = f"one prompt, {_SINGLE_TOKENS} tokens"


@dataclass(frozen=True)
class BenchScale:
    """Seconds a part, rounds, and how much is asked."""

    seconds: dict[str, float]
    fewest: int
    prompts: int
    most: int = 150
    streams: tuple[int, ...] = (1, 16, 64)
    outside: VllmBenchLoad = field(default_factory=VllmBenchLoad)
    relay: RelayLoad = field(default_factory=RelayLoad)

    def budget(self, part: str, most: int, share: float = 1.0) -> RoundBudget:
        most = min(most, self.most)
        return RoundBudget(self.seconds[part] * share, most, min(self.fewest, most))


# On two cores with the demo model: ten minutes, and one.
FULL = BenchScale(
    seconds=dict(zip(PARTS, (15, 80, 180, 120, 45, 85), strict=True)),
    fewest=FEWEST_ROUNDS,
    prompts=358,
)
QUICK = BenchScale(
    seconds=dict(zip(PARTS, (4, 6, 8, 12, 24, 10), strict=True)),
    fewest=3,
    prompts=64,
    outside=VllmBenchLoad(prompts=32),
    relay=RelayLoad(calls=200, seconds=0.3),
)


@dataclass(frozen=True)
class AskedQuestions:
    """The file's questions, as often as they are needed, and how long an answer may be."""

    known: tuple[str, ...]
    max_tokens: int

    def take(self, count: int) -> tuple[str, ...]:
        return tuple(itertools.islice(itertools.cycle(self.known), count))


def batch_title(prompts: int) -> str:
    return f"{prompts} prompts in one call"


def list_workloads(
    parts: Sequence[str], scale: BenchScale, asked: AskedQuestions
) -> Iterator[tuple[BenchWorkload, RoundBudget]]:
    """In the order of the parts."""
    all_questions, longest = asked.take(scale.prompts), asked.max_tokens
    if "one" in parts:
        single = OneCall(SINGLE_TITLE, asked.take(1), min(_SINGLE_TOKENS, longest))
        yield single, scale.budget("one", 150)
    if "batch" in parts:
        batch = OneCall(batch_title(scale.prompts), all_questions, longest)
        yield batch, scale.budget("batch", 150)
    if "calls" in parts:
        calls = ManyCalls(f"{scale.prompts} calls at once", all_questions, longest)
        yield calls, scale.budget("calls", 150)
    if "streams" in parts:
        # A few streams vary more from round to round and take less time: they get more rounds.
        total = sum(count**0.25 for count in scale.streams)
        for count in scale.streams:
            title = f"{count} chat stream{'s at once' if count > 1 else ''}"
            streams = ManyStreams(title, asked.take(count), min(_STREAM_TOKENS, longest))
            yield streams, scale.budget("streams", 150, count**0.25 / total)


def parse_arguments(words: Sequence[str], description: str | None = None) -> argparse.Namespace:
    parser = build_parser(description)
    arguments = options.parse_options(parser, words)
    arguments.scale = QUICK if arguments.quick else FULL
    if arguments.prompts:
        arguments.scale = replace(arguments.scale, prompts=arguments.prompts)
    arguments.parts = arguments.only or (QUICK_PARTS if arguments.quick else PARTS)
    has_contenders = arguments.peers or arguments.beside
    if has_contenders and arguments.only is None:
        arguments.parts = ("relay",)
    if has_contenders and "relay" not in arguments.parts:
        parser.error("--peers and --beside have no effect without the part relay")
    if bool(arguments.url) != bool(arguments.direct_url):
        parser.error("--url and --direct-url go together: the gateway, and the engine behind it")
    if arguments.url and (arguments.launcher_options or arguments.model):
        parser.error("a model and options for the launcher have no effect on a running stack")
    if arguments.url:
        arguments.status_url = arguments.status_url or options.find_neighbour(arguments.url)
    return arguments


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = options.build_parser("bench", description)
    options.add_service(parser, "bench", ["--url", "--server-url"])
    add = parser.add_argument_group("the stack").add_argument
    help_ = "the engine behind --url, whose gateway was started with GATEWAY_DEDUP=false"
    add("--direct-url", type=options.address, default="", metavar="URL", help=help_)
    add("--model", default="", help="model of the stack that is started (default: the demo)")
    help_ = "of the served model (default: the folder that the launcher serves)"
    add("--tokenizer", default="", metavar="FOLDER", help=help_)
    options.add_questions(parser)
    positive = options.whole_number(1)
    add = parser.add_argument_group("what is measured").add_argument
    add("--quick", action="store_true", help="a minute's look: fewer prompts, too few rounds")
    add("--only", type=_parts, metavar="PART,…", help=f"some of {', '.join(PARTS)}")
    help_ = "other routers beside the gateway in the part relay, installed from the package index"
    add("--peers", action="store_true", help=help_)
    help_ = "another checkout of this project, whose gateway is in the part relay as well"
    add("--beside", default="", metavar="FOLDER", help=help_)
    add("--prompts", type=positive, metavar="N", help="in the batch, and calls at once (358; 64)")
    add("--max-tokens", type=positive, default=256, metavar="N", help="an answer (default: 256)")
    add("--seed", type=int, default=1, help="of the order of turns (default: 1)")
    add = parser.add_argument_group("what comes of it").add_argument
    default = str(OUT / "bench.json")
    add("--out", default=default, metavar="FILE", help=f"JSON (default: {default})")
    add("--against", default="", metavar="FILE", help="a stored run: what has really changed?")
    options.add_record(parser)
    return parser


def _parts(text: str) -> tuple[str, ...]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: no such part")
    return tuple(part for part in PARTS if part in chosen)
