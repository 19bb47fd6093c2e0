"""What a sweep has measured: kept as it grows, as a table, as a page with a plot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.files import read_text
from lab.records.record import take_facts
from lab.reports.output_files import write_file, write_json
from lab.reports.pages import render_page
from lab.reports.plots import NamedBar, draw_bars

_SHIPPED = ("", "one-line")
# Of combinations that score so nearly the same, the faster is the better.
_SAME_SCORE = 0.002


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest_system_prompt(system: str) -> str:
    return "" if system in _SHIPPED else digest_text(read_text(Path(system)))


@dataclass(frozen=True)
class SweepArm:
    """One way of asking. `system` is empty, a shipped prompt's name, or a file: with another text
    it is another arm.
    """

    style: str
    system: str
    max_tokens: int
    single_line: bool
    system_digest: str = ""

    @property
    def name(self) -> str:
        line = ", one line" if self.single_line else ""
        return f"{self.style}, system {self.system or 'none'}, {self.max_tokens} tokens{line}"

    def settings(self) -> dict[str, Any]:
        """As course.toml has them: the text of a file, for the file itself does not travel."""
        is_shipped = self.system in _SHIPPED
        return {
            "prompt_style": self.style,
            "system_prompt": "" if is_shipped else read_text(Path(self.system)).strip(),
            "system_prompt_file": self.system if is_shipped else "",
            "max_tokens": self.max_tokens,
            "single_line": self.single_line,
        }

    def flags(self) -> list[str]:
        """Of a gateway: they win over whatever a file or the environment says."""
        words = []
        for name, value in self.settings().items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words.append(f"--{flag}={value}")
        return words


@dataclass(frozen=True)
class SweptArm:
    """What came of it, or why nothing did."""

    arm: SweepArm
    rouge_course: float = 0.0
    rouge_whitespace: float = 0.0
    seconds: float = 0.0
    characters_per_s: float = 0.0
    answered: int = 0
    asked: int = 0
    failure: str = ""

    def describe(self) -> str:
        if self.failure:
            return self.failure
        return (
            f"ROUGE-L {self.rouge_course:.4f} ({self.rouge_whitespace:.4f} all tokens), "
            f"{self.seconds:.1f} s, {self.characters_per_s:,.0f} characters/s"
        )


@dataclass
class SweepResult:
    """`context` is what must be the same for an earlier result to count: model, questions, the rest
    of the settings.
    """

    context: str
    swept: list[SweptArm] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, context: str) -> SweepResult | None:
        """None of another context, and of what is no result. What failed is tried again."""
        try:
            packed = json.loads(read_text(path))
            rows = [SweptArm(**{**row, "arm": SweepArm(**row["arm"])}) for row in packed["swept"]]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        rows = [row for row in rows if not row.failure]
        return cls(context, rows) if context and packed.get("context") == context else None

    def add(self, swept: SweptArm) -> None:
        self.swept = [one for one in self.swept if one.arm.name != swept.arm.name] + [swept]

    def find(self, arm: SweepArm) -> SweptArm | None:
        return next((one for one in self.swept if one.arm == arm), None)

    def rank(self, arms: Sequence[SweepArm]) -> list[SweptArm]:
        """The asked ones, best score first; what does not work comes last."""
        found = [one for one in self.swept if one.arm in arms]
        return sorted(found, key=lambda one: (bool(one.failure), -one.rouge_course))

    def find_best(self, arms: Sequence[SweepArm]) -> SweptArm | None:
        ranked = [one for one in self.rank(arms) if not one.failure]
        near = [one for one in ranked if ranked[0].rouge_course - one.rouge_course <= _SAME_SCORE]
        return max(near, key=lambda one: one.characters_per_s, default=None)

    def describe(self, arms: Sequence[SweepArm]) -> Iterator[str]:
        ranked, best = self.rank(arms), self.find_best(arms)
        width = max((len(one.arm.name) for one in ranked), default=0)
        for one in ranked:
            yield f"{'*' if one is best else ' '} {one.arm.name:<{width}}  {one.describe()}"
        if best:
            yield f"* the best: of those within {_SAME_SCORE:g} of the highest score, the fastest"

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))
        every = [one.arm for one in self.swept]
        ranked, best = self.rank(every), self.find_best(every)
        bars = [
            NamedBar(
                one.arm.name,
                one.rouge_course,
                "a" if one is best else "b",
                f"{one.characters_per_s:,.0f}/s",
            )
            for one in ranked
            if not one.failure
        ]
        facts = {**take_facts(), "model and questions": self.context}
        page = render_page(
            "sweep.html",
            title="Sweep",
            has_findings=False,
            ranked=ranked,
            best=best,
            plot_bars=draw_bars(bars, unit="", label="score") if bars else "",
            facts=facts,
            hidden=(),
        )
        write_file(path.with_suffix(".html"), page)
