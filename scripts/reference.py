"""Writes the tables of settings and metrics into docs/, as the programs declare them (`make docs`):
`python -m scripts.reference`. `--check` changes nothing and says whether they are true.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def render(text: str, kind: str, table: Callable[[str], str]) -> str:
    """The page with every table as the programs are now."""
    for program in ("gateway", "launcher"):
        block = re.compile(rf"(<!-- {program} {kind}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        rows = table(program).replace("\\", r"\\")
        text = block.sub(rf"\g<1>{rows}\g<2>", text)
    return text


def tabulate_settings(program: str) -> str:
    rows = importlib.import_module(f"{program}.config").list_settings()
    lines = ["| variable | flag | default | |", "|---|---|---|---|"]
    for variable, flag, default, description in rows:
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{variable}` | `{flag}` | {shown} | {_escape(description)} |")
    return "\n".join(lines) + "\n"


def tabulate_figures(program: str) -> str:
    module = {"gateway": "gateway.observability.metrics", "launcher": "launcher.engine.status"}[
        program
    ]
    lines = ["| name | type | labels | |", "|---|---|---|---|"]
    for figure in importlib.import_module(module).list_metrics():
        labels = ", ".join(f"`{label}`" for label in figure.labels)
        lines.append(f"| `{figure.name}` | {figure.kind} | {labels} | {_escape(figure.meaning)} |")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", chr(92) + "|")


PAGES = {
    "docs/settings.md": ("settings", tabulate_settings),
    "docs/metrics.md": ("figures", tabulate_figures),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are true")
    arguments = parser.parse_args()
    is_true = True
    for name, (kind, table) in PAGES.items():
        page = ROOT / name
        current = page.read_text(encoding="utf-8")
        wanted = render(current, kind, table)
        if not arguments.check:
            page.write_text(wanted, encoding="utf-8")
            continue
        is_true &= wanted == current
        print(f"{name} is true" if wanted == current else f"{name}: run `make docs`")
    return int(not is_true)


if __name__ == "__main__":
    sys.exit(main())
