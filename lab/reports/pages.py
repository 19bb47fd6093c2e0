"""HTML pages from the templates beside this module; every text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("lab.reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)


def load_macros(template: str, **names: Any) -> Any:
    """A template's macros as functions; `names` is what they may use beside their arguments."""
    return _TEMPLATES.get_template(template).make_module(names)


def render_page(template: str, **parts: Any) -> str:
    return _TEMPLATES.get_template(template).render(**parts)


def list_facts(
    facts: Mapping[str, object], nested: Mapping[str, Mapping[str, object]]
) -> Iterator[tuple[str, str]]:
    """Rows for a page: what is known, and under its name what belongs together."""
    for key, value in facts.items():
        if key not in nested and value not in ("", None, (), {}):
            yield key.replace("_", " "), _format(value)
    for name, values in nested.items():
        for key, value in values.items():
            yield f"{name}: {key.replace('_', ' ')}", _format(value)


def _format(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
