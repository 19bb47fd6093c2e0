"""Where the lab finds what travels with it, and where it leaves what it makes."""

from __future__ import annotations

from pathlib import Path

# The checkout, or the folder that an installed wheel lies in.
ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out")
