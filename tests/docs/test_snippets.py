"""Every Python snippet in the README and the docs runs as printed, page by page, against the local hub.

A page is one process: its ```python fences run in order. Fences marked ```py are shown and not run. A comment
`<!-- hidden-python ... -->` holds set-up that a reader does not need to see.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```|^<!-- hidden-python\n(.*?)^-->", re.DOTALL | re.MULTILINE)


def script_of(page: Path) -> str:
    """The page's snippets as one program; each is named in a traceback by its line in the page."""
    text = page.read_text(encoding="utf-8")
    parts = []
    for match in SNIPPET.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        code = match[1] or match[2]
        parts.append(f"exec(compile({code!r}, {f'{page.name}, snippet at line {line}'!r}, 'exec'), globals())")
    return "\n".join(parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_snippets_of_a_page_run(page, tmp_path):
    script = script_of(page)
    if not script:
        pytest.skip("no Python on this page")
    from hubsae.localhub import running

    with running(root=tmp_path / "hub") as hub:
        env = {**os.environ, **hub.env(home=tmp_path / "home"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        work = tmp_path / "work"
        work.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=work, env=env, capture_output=True, text=True, check=False, timeout=300
        )
    assert done.returncode == 0, f"{page.name}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme]
    assert not missing, f"README.md does not link {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
