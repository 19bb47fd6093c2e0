"""The OpenAPI document as a page for people: no script, nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
summary{cursor:pointer;padding:.3rem 0}
code{font-family:ui-monospace,monospace}
.method{display:inline-block;width:4rem;font-weight:600}
table{border-collapse:collapse;margin:.3rem 0 1rem;width:100%}
td,th{border-bottom:1px solid #8886;padding:.2rem .6rem .2rem 0;text-align:left;vertical-align:top}
"""
_MOST_CHARACTERS = 200


def render_docs(document: Mapping[str, Any]) -> bytes:
    """Relative addresses alone, so that it works below a proxy's prefix."""
    info = document["info"]
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{escape(info['title'])}: its API</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
            "<main><p>What this gateway serves now, with the model behind it. For machines: ",
            '<a href="openapi.json"><code>openapi.json</code></a>.</p>',
            *_render_groups(document),
            "</main></body></html>\n",
        )
    ).encode()


def _render_groups(document: Mapping[str, Any]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            part = _render_operation(document, method.upper(), path, operation)
            groups.setdefault(operation["tags"][0], []).append(part)
    for tag, parts in groups.items():
        yield f"<h2>{escape(tag)}</h2>"
        yield from parts


def _render_operation(
    document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> str:
    title = (
        f'<span class="method">{method}</span><code>{escape(path)}</code> '
        f"{escape(operation['summary'])}"
    )
    rows = [
        _render_field(name, field, name in required)
        for part, required in _find_objects(document, _read_body(operation))
        for name, field in part.items()
    ]
    if not rows:
        return f"<p>{title}</p>"
    head = "<tr><th>field</th><th>type</th><th></th></tr>"
    rows = list(dict.fromkeys(rows))
    return f"<details><summary>{title}</summary><table>{head}{''.join(rows)}</table></details>"


def _read_body(operation: Mapping[str, Any]) -> Mapping[str, Any]:
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema: Mapping[str, Any] = content.get("schema", {})
        return schema
    return {}


def _find_objects(
    document: Mapping[str, Any], schema: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
    """The fields of a body, of each kind that it may be; and which of them must be there."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from _find_objects(document, document["components"]["schemas"].get(name, {}))
    for word in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(word, ()):
            yield from _find_objects(document, part)
    if "properties" in schema:
        yield schema["properties"], schema.get("required", [])


def _render_field(name: str, field: Mapping[str, Any], is_required: bool) -> str:
    said = [field.get("description", "")]
    if is_required:
        said.insert(0, "Required.")
    if field.get("default") is not None:
        said.append(f"Default {json.dumps(field['default'], ensure_ascii=False)}.")
    text = " ".join(" ".join(filter(None, said)).split())
    if len(text) > _MOST_CHARACTERS:
        text = text[:_MOST_CHARACTERS].rsplit(" ", 1)[0] + " …"
    kind = escape(_name_type(field))
    return f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{escape(text)}</td></tr>"


def _name_type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    kinds = [_name_type(part) for part in field.get("anyOf", field.get("oneOf", ()))]
    if kinds:
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "enum" in field:
        return " or ".join(json.dumps(one, ensure_ascii=False) for one in field["enum"])
    kind = field.get("type", "anything")
    if kind == "array":
        return f"list of {_name_type(field.get('items', {}))}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
