"""A batch through OpenAI's SDK with the real engine, its gateway killed in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Stack
from tests.gateway.batches.conftest import dump, open_sdk, until
from tests.gateway.batches.test_jobs import check_counts
from tests.gateway.process import serve_process

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "CUDA"}], "max_tokens": 24},
    "/v1/completions": {"prompt": "CUDA", "max_tokens": 24},
}
LINES = 80


@pytest.mark.parametrize("endpoint", BODIES)
async def test_batch_of_the_real_engine_outlives_a_kill_of_its_gateway(
    stack: Stack, tmp_path: Path, endpoint: str
) -> None:
    body = {"model": "demo", "temperature": 0, **BODIES[endpoint]}
    lines = [
        {"custom_id": f"line-{n}", "method": "POST", "url": endpoint, "body": body}
        for n in range(LINES)
    ]
    lines[7]["body"] = {**body, "model": "gone"}
    flags = ("--batch-folder", str(tmp_path / "batches"), "--batch-lease-s", "1")
    async with (
        serve_process(tmp_path, stack.engine, *flags) as gateway,
        open_sdk(gateway.url) as sdk,
    ):
        file = await sdk.files.create(file=("in.jsonl", dump(lines)), purpose="batch")
        made = await sdk.batches.create(
            input_file_id=file.id, endpoint=endpoint, completion_window="24h"
        )

        async def has_some() -> bool:
            return bool((await sdk.batches.retrieve(made.id)).request_counts.completed)

        await until(has_some)
        gateway.process.kill()
        await gateway.process.wait()
    found: list[Any] = []
    async with (
        serve_process(tmp_path, stack.engine, *flags) as gateway,
        open_sdk(gateway.url) as sdk,
    ):

        async def has_ended() -> bool:
            found[:] = [await sdk.batches.retrieve(made.id)]
            return bool(found[0].status == "completed")

        await until(has_ended)
        good = (await sdk.files.content(found[0].output_file_id)).text.splitlines()
        bad = (await sdk.files.content(found[0].error_file_id)).text.splitlines()

    check_counts(found[0], good, bad)
    assert len(bad) == 1
    assert '"custom_id":"line-7"' in bad[0]
    assert '"status_code":404' in bad[0]
    ids = [line.partition('"custom_id":"')[2].partition('"')[0] for line in good]
    assert ids == [f"line-{n}" for n in range(LINES) if n != 7]
