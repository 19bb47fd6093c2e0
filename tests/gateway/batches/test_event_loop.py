"""What many lines, and one that is large, cost everybody else: the event loop is never kept."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import CHAT, ask, dump, open_sdk, until
from tests.gateway.process import check_blocks, serve_process

LINES = 8_000


@pytest.mark.slow
async def test_batch_of_many_lines_and_of_a_large_one_blocks_nobody(tmp_path: Path) -> None:
    blocks = tmp_path / "blocks.jsonl"
    large = ask(LINES, "x" * 10**7)
    data = dump([ask(n) for n in range(LINES)]) + orjson.dumps(large)
    engine = Behaviour(max_model_len=2**20)
    folder = str(tmp_path / "batches")
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url, "--batch-folder", folder, blocks=blocks) as gateway,
        open_sdk(gateway.url) as sdk,
    ):
        file = await sdk.files.create(file=("in.jsonl", data), purpose="batch")
        engine.delays = lambda question: 0 if len(engine.calls) < 300 else 60
        made = await sdk.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        await until(lambda: len(engine.calls) >= 300)
        await sdk.batches.cancel(made.id)

        async def has_ended() -> bool:
            return bool((await sdk.batches.retrieve(made.id)).status == "cancelled")

        await until(has_ended)
        ended = await sdk.batches.retrieve(made.id)

    assert ended.request_counts.failed > LINES / 2
    check_blocks(blocks)
