"""Stand-ins for the public base images, made here: there is no registry to pull them from.

They carry the names that the Dockerfiles ask for, so those are built as they are.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.setup import SetupError, find_python
from tests.stack.docker import ROOT, Docker

PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
_BASE = "stand-in:base"


class CannotCopyError(Exception):
    """A Python that only works where it is."""


@dataclass(frozen=True)
class Pythons:
    """The Python for the images, and the one that the tests' own environment was made from."""

    images: Path
    engine: Path
    site: Path

    @property
    def variables(self) -> dict[str, str]:
        return {"STACK_PYTHON": str(self.engine), "STACK_SITE": str(self.site)}


def find_pythons() -> Pythons:
    try:
        found = find_python("3.12")  # what the Dockerfiles name
    except SetupError:
        found = sys.executable
    site = Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return Pythons(_prefix(found), _prefix(sys.executable), site / "site-packages")


def _prefix(python: str) -> Path:
    command = [python, "-c", "import sys; print(sys.base_prefix)"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if path == Path("/usr"):
        raise CannotCopyError(
            f"{python} belongs to the system and cannot be put into an image; "
            "pyenv's or uv's can (`make setup PYTHON=3.12`)"
        )
    return path


def make_base(pythons: Pythons, tar: Path) -> None:
    script = Path(__file__).parent / "make_base.sh"
    result = subprocess.run(
        [script, pythons.images, tar], capture_output=True, text=True, check=False, timeout=300
    )
    if result.returncode:
        raise RuntimeError(f"no base image: {(result.stderr + result.stdout)[-2000:]}")


def load_bases(docker: Docker, tar: Path) -> None:
    docker.run("import", "--change", f"ENV PATH={PATH}", str(tar), _BASE, timeout_s=120)
    tar.unlink()
    derive(docker, f"python:{_default('Dockerfile.gateway', 'PYTHON_TAG')}", 'CMD ["python3"]')
    # As the real one: another program to start, another folder to be in.
    derive(
        docker,
        f"vllm/vllm-openai:{_default('Dockerfile.engine', 'VLLM_TAG')}",
        'WORKDIR /vllm-workspace\nENTRYPOINT ["vllm", "serve"]',
    )
    derive(
        docker,
        _image_of("compose.yaml", "prometheus"),
        "RUN install -d -o 65534 -g 65534 /prometheus\n"
        'USER nobody\nVOLUME /prometheus\nWORKDIR /prometheus\nENTRYPOINT ["/bin/prometheus"]',
    )
    derive(
        docker,
        _image_of("compose.replicas.yaml", "balancer"),
        "RUN useradd --system --no-create-home --uid 99 balancer\n"
        "USER 99\n"
        'ENTRYPOINT ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]',
    )
    derive(
        docker, _image_of("compose.replicas.yaml", "redis"), 'WORKDIR /data\nCMD ["redis-server"]'
    )


def derive(docker: Docker, tag: str, lines: str) -> None:
    text = f"FROM {_BASE}\n{lines}\n".encode()
    docker.run("build", "--network=host", "--tag", tag, "-", stdin=text, timeout_s=120)


def _default(dockerfile: str, argument: str) -> str:
    for line in (ROOT / dockerfile).read_text(encoding="utf-8").splitlines():
        name, _, value = line.removeprefix("ARG ").partition("=")
        if line.startswith("ARG ") and name == argument and value:
            return value
    raise ValueError(f"{dockerfile} has no ARG {argument}=…")


def _image_of(file: str, service: str) -> str:
    lines = iter((ROOT / file).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line == f"  {service}:":
            return next(
                found.split(": ")[1] for found in lines if found.lstrip().startswith("image: ")
            )
    raise ValueError(f"{file} has no service {service}")
