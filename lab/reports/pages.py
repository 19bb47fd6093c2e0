"""HTML pages from the templates beside this module; every text in them is escaped."""

from __future__ import annotations

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
