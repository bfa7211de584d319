"""`hubsae formats`: every on-disk format, and whether it is read and written."""

from __future__ import annotations

from hubsae.cli import _options as options
from hubsae.cli._common import print_json, print_table

PANEL = "Publish and load"


def command(as_json: options.Json = False) -> None:
    """List the formats hubsae reads and writes, by the names that --format and --to take."""
    from hubsae.formats import FORMATS

    rows = [
        {"name": f.name, "what": f.title, "read": f.read is not None, "write": f.write is not None, "files": f.layout}
        for f in FORMATS.values()
    ]
    if as_json:
        print_json(rows)
        return
    shown = [
        ["yes" * cell if isinstance(cell, bool) else cell.replace("`", "") for cell in row.values()] for row in rows
    ]
    print_table("", list(rows[0]), shown)
