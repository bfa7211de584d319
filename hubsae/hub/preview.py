"""A card as one HTML page, close to how the Hub shows it: for a look before publishing."""

from __future__ import annotations

import os
import re
from html import escape
from pathlib import Path

from hubsae.core import readme
from hubsae.core.extras import require
from hubsae.core.files import write_text_atomic

_STYLE = """
body{font:16px/1.6 -apple-system,'Segoe UI',Helvetica,Arial,sans-serif;max-width:60rem;margin:2rem auto;
padding:0 1rem;color:#1f2328}
h1,h2{border-bottom:1px solid #d1d9e0;padding-bottom:.3em}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}
td,th{border:1px solid #d1d9e0;padding:.3em .8em} tr:nth-child(2n){background:#f6f8fa} th:empty{padding:0}
pre{background:#f6f8fa;padding:1em;overflow:auto;border-radius:6px} code{font:85% ui-monospace,Menlo,Consolas,monospace}
:not(pre)>code{background:#eff1f3;padding:.2em .4em;border-radius:4px} img{max-width:100%}
.meta{background:#fff8e6;border:1px solid #e8d9a8;border-radius:6px;padding:.6em 1em;font-size:85%;margin-bottom:2em}
.tag{display:inline-block;background:#eef;border-radius:1em;padding:0 .7em;margin:.1em}
blockquote{border-left:4px solid #d1d9e0;margin:0;padding-left:1em;color:#59636e}
"""
# the only markup of its own a card uses; everything else in angle brackets is shown as text
_ALLOWED = re.compile(r"&lt;(/?)(details|summary)&gt;")


def to_html(text: str) -> str:
    """A README as a page; raw HTML in it is shown as text, so nothing in a card can run."""
    markdown_it = require("markdown_it", extra="hub")
    parsed = readme.parse(text)
    body = re.sub(r"<!--.*?-->\n?", "", parsed.body, flags=re.S)
    html = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table").render(body)
    html = _ALLOWED.sub(r"<\1\2>", html)
    html = re.sub(r"<p>(\s*<details>)", r"\1", html).replace("</summary></p>", "</summary>")
    html = html.replace("<p></details></p>", "</details>")
    rows = []
    for key, value in parsed.front.items():
        values = value if isinstance(value, list) else [value]
        shown = " ".join(f'<span class="tag">{escape(str(item))}</span>' for item in values)
        rows.append(f"<div><b>{escape(str(key))}</b>: {shown}</div>")
    meta = f'<div class="meta">{"".join(rows)}</div>' if rows else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Card preview</title>'
        f"<style>{_STYLE}</style></head><body>{meta}{html}</body></html>"
    )


def write_preview(text: str, folder: str | os.PathLike[str]) -> Path:
    """Write `.card-preview.html` into the release folder, where its pictures are found; pushes leave it out."""
    return write_text_atomic(Path(folder) / ".card-preview.html", to_html(text))
