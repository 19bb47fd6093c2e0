"""A real Prometheus on a free port, scraping what runs here, with the rules as they are shipped."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.ports import find_free_ports
from tests.deploy.expressions import RULES
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS


@contextlib.contextmanager
def run_prometheus(folder: Path, targets: dict[str, str]) -> Iterator[str]:
    """Its address; `targets` are jobs with their `host:port`."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here; `scripts/system.sh prometheus` gets it")
    config = folder / "prometheus.yml"
    config.write_text(build_config(targets), encoding="utf-8")
    (port,) = find_free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [program, f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
    command += ["--enable-feature=exemplar-storage"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_ready(url, process, folder / "prometheus.log")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=PROGRAM_S)


def build_config(targets: dict[str, str]) -> str:
    lines = ["global: {scrape_interval: 1s, evaluation_interval: 1s}"]
    lines += [f"rule_files: ['{RULES}/*.yml']", "scrape_configs:"]
    for job, target in targets.items():
        lines.append(f"  - {{job_name: {job}, static_configs: [{{targets: ['{target}']}}]}}")
    return "\n".join(lines) + "\n"


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PROGRAM_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if (
                httpx.get(f"{url}/-/ready", trust_env=False, verify=NO_TLS).status_code
                == httpx.codes.OK
            ):
                return
        time.sleep(0.1)
    pytest.fail(f"Prometheus is not ready:\n{log.read_text(errors='replace')[-2000:]}")
