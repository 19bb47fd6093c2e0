"""Writes the settings tables of the README from the settings themselves (`make docs`).

`--check` changes nothing and says whether the README is true.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
sys.path.insert(0, str(ROOT))


def render(readme: str) -> str:
    """The README with every table as the settings are now."""
    for program in ("gateway", "launcher"):
        block = re.compile(rf"(<!-- {program} settings: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        rows = table(program).replace("\\", r"\\")
        readme = block.sub(rf"\g<1>{rows}\g<2>", readme)
    return readme


def table(program: str) -> str:
    rows = importlib.import_module(f"{program}.config").list_settings()
    lines = ["| variable | flag | default | |", "|---|---|---|---|"]
    for variable, flag, default, description in rows:
        shown = f"`{default}`" if default else ""
        lines.append(
            f"| `{variable}` | `{flag}` | {shown} | {description.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is true")
    arguments = parser.parse_args()
    current = README.read_text(encoding="utf-8")
    wanted = render(current)
    if arguments.check:
        print("README.md is true" if wanted == current else "README.md: run `make docs`")
        return int(wanted != current)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
