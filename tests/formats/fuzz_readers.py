"""Coverage-guided fuzzing of every reader: it returns or raises HubSAEError, within two seconds, whatever a file holds.

    pip install atheris
    python tests/formats/fuzz_readers.py -runs=100000

An input is one file of one example: two bytes choose it, the rest is its content. Seeds are the right files.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hubsae"]):
    from hubsae.core.errors import HubSAEError
    from hubsae.formats import read

sys.path.insert(0, str(Path(__file__).parent))
from test_fuzz_readers import SECONDS, corpus

ROOT = Path(tempfile.mkdtemp(prefix="hubsae-fuzz-"))
EXAMPLES = corpus(ROOT / "examples") if (ROOT / "examples").mkdir() is None else []
FILES = [sorted(p for p in e.rglob("*") if p.is_file()) if e.is_dir() else [e] for e in EXAMPLES]
RIGHT = {file: file.read_bytes() for files in FILES for file in files}


def one(data: bytes) -> None:
    """Read an example with one of its files replaced."""
    if len(data) < 2:
        return
    example = data[0] % len(EXAMPLES)
    file = FILES[example][data[1] % len(FILES[example])]
    file.write_bytes(data[2:])
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(EXAMPLES[example], architecture="topk", k=2, apply_b_dec_to_input=True)
    except HubSAEError:
        pass
    finally:
        file.write_bytes(RIGHT[file])
    spent = time.process_time() - start
    if spent > SECONDS:
        raise AssertionError(f"{file} took {spent:.1f} s")


def main() -> None:
    """Fuzz; libFuzzer's options are those of the command line."""
    seeds = ROOT / "seeds"
    seeds.mkdir()
    for number, files in enumerate(FILES):
        for place, file in enumerate(files):
            (seeds / f"{number}-{place}").write_bytes(bytes([number, place]) + RIGHT[file])
    atheris.Setup([*sys.argv, str(seeds), "-max_len=8192", "-rss_limit_mb=6000"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
