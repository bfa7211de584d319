"""What a large job costs, stage by stage and on one or many GPUs: the tables of docs/scale.md.

    python benchmarks/scale.py             print them
    python benchmarks/scale.py --write     put them into docs/scale.md
    python benchmarks/scale.py --measure   measure what a part of an index leaves, and what merging two of them costs

Nothing here was run at that size. A stage needs GPU, processor, disk and network for each token; what that costs is
measured (on one core), estimated or assumed, and `COSTS` says which. A fleet is simulated part by part: task r of n
does parts r, r + n, ..., whose times scatter; tasks start slowly, and some are killed and do a part again. The disk is
shared.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MARKS = ("<!-- tables of benchmarks/scale.py -->", "<!-- end -->")

COSTS: dict[str, tuple[float, str, str]] = {
    "gpu": (780e12, "FLOP/s of one GPU in bf16", "an H200's dense product, measured elsewhere"),
    "gpu_share": (0.4, "of it reached by the model's forward pass and the encoder", "assumed"),
    "select": (47e9, "pre-activations/s through `torch.topk` on a GPU", "reported by others"),
    "step": (42e-3, "GPU seconds of a training step of 32,768 tokens, 4,096 to 65,536", "estimated"),
    "cpu": (115e9, "FLOP/s of one core in the encoder's product", "measured, AVX-512, oneDNN"),
    "read": (0.56e-6, "core seconds to read a token of width 4,096", "measured, `benchmarks/activations.py`"),
    "write": (31e-6, "core seconds to write a token of width 4,096", "measured, one run"),
    "index": (23.8e6, "records per core second into the index, with contexts", "measured, `benchmarks/index.py`"),
    "part": (150e6, "bytes that a part of the index leaves", "measured, `--measure`"),
    "merge": (1.1, "core seconds to read and merge one part", "measured, `--measure`"),
    "cores": (16, "cores beside each GPU", "assumed"),
    "disk": (5e9, "bytes/s of the disk that all tasks share", "assumed"),
    "hub": (330e6, "bytes/s between one machine and the Hub, eight connections", "measured at 60 ms, 50 MB/s each"),
    "start": (90, "seconds until a task has its model", "assumed"),
    "scatter": (0.1, "spread of the time of a part (log-normal)", "assumed"),
    "killed": (0.01, "kills per GPU and hour", "assumed"),
}  # fmt: skip
"""Name -> value, what it is, where it is from."""
FILES_PER_REPO, FILES_PER_FOLDER, RESOLVES, API_CALLS = 100_000, 10_000, 5_000, 1_000
"""Limits of the Hub; the last two in five minutes."""


def cost(name: str) -> float:
    """One of the costs."""
    return COSTS[name][0]


@dataclass(frozen=True)
class Work:
    """A release to be made: one hook point of a model, one SAE."""

    name: str
    tokens: float
    chats: float
    epochs: float = 8.18
    parameters: float = 6.95e9
    """Without embeddings; a token costs two FLOP for each."""
    d: int = 4096
    features: int = 65_536
    k: int = 64
    window: int = 1024
    """Chats of a part of the harvest."""
    file_bytes: float = 2**30

    @property
    def row_bytes(self) -> int:
        """A stored token: float16 vector and labels."""
        return 2 * self.d + 21

    @property
    def encoder(self) -> float:
        """FLOP of one token through the encoder."""
        return 2.0 * self.d * self.features


SEED = Work("a release of 280 M tokens", 280_280_758, 978_471)
LARGE = Work("a hundred times larger", 28_028_075_800, 97_847_100, epochs=1, window=8192, file_bytes=2**32)


@dataclass(frozen=True)
class Stage:
    """A stage of a job: what all its tokens need."""

    name: str
    flop: float = 0.0
    gpu_seconds: float = 0.0
    core_seconds: float = 0.0
    disk_bytes: float = 0.0
    hub_bytes: float = 0.0
    parts: int = 1
    last: float = 0.0
    """Core seconds of the last step, which one process does."""

    def seconds(self) -> dict[str, float]:
        """What it takes on one machine with one GPU, by what takes it; they overlap."""
        return {
            "GPU": self.gpu_seconds,
            "cores": self.core_seconds / cost("cores"),
            "network": self.hub_bytes / cost("hub"),
        }


def index_parts(tokens: float) -> int:
    """Parts of an index or an evaluation, as `hubsae.evals.passes.parts_of` cuts them."""
    blocks = math.ceil(tokens / 4096)
    return math.ceil(blocks / max(64, math.ceil(blocks / 512)))


def stages(work: Work) -> list[Stage]:
    """The stages of a job."""
    n, size, parts = work.tokens, work.tokens * work.row_bytes, index_parts(work.tokens)
    rate = cost("gpu") * cost("gpu_share")
    forward, encode = 2 * work.parameters * n, work.encoder * n
    coded = encode / rate + n * work.features / cost("select")  # GPU seconds of encoding and selecting
    read, steps = cost("read") * n, n * work.epochs / 32_768
    table = read + n * work.k / cost("index")
    return [
        Stage("harvest", forward, forward / rate, cost("write") * n, size, 0, math.ceil(work.chats / work.window)),
        Stage("push", 0, 0, 0, size, size, math.ceil(size / work.file_bytes)),
        Stage("train", encode * work.epochs, steps * cost("step"), read * work.epochs, size * work.epochs),
        Stage("evaluate", encode, coded, read, size, 0, parts),
        Stage("index", encode, coded, table, size, 0, parts, parts * cost("merge")),
    ]


def simulate(stage: Stage, gpus: int, seed: int = 0) -> tuple[float, str]:
    """Hours of a stage on a fleet of machines with one GPU each, and what it waits for.

    >>> simulate(Stage("s", gpu_seconds=3600, parts=10), 1)[1]
    'GPU'
    """
    needs = stage.seconds()
    slowest = max(needs, key=lambda name: needs[name])
    shared = stage.disk_bytes / cost("disk")
    fleet = 1 if stage.parts == 1 else min(gpus, stage.parts)
    rng, each = random.Random(seed), needs[slowest] / stage.parts
    if stage.name == "train":  # one job over all GPUs, the data in step
        run = needs[slowest] / gpus
    else:
        ends = []
        for task in range(fleet):
            clock = cost("start")
            for _ in range(task, stage.parts, fleet):
                part = each * rng.lognormvariate(0, cost("scatter"))
                while rng.random() < 1 - math.exp(-cost("killed") * part / 3600):
                    clock += part * rng.random() + cost("start")  # done so far is lost, and the task starts again
                clock += part
            ends.append(clock)
        run = max(ends)
    waits = {slowest: run, "shared disk": shared, "last step": stage.last}
    total = max(run, shared) + stage.last
    return total / 3600, max(waits, key=lambda name: waits[name])


# ---- tables ------------------------------------------------------------------------------------------------------


def amount(value: float, unit: str = "") -> str:
    """Three figures with a prefix.

    >>> amount(2.302e12, "B"), amount(0.0), amount(978471)
    ('2.30 TB', '0', '978 k')
    """
    if not value:
        return "0"
    scales = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    limit, prefix = next((scale for scale in scales if value >= scale[0]), (1.0, ""))
    digits = max(0, 2 - math.floor(math.log10(value / limit) + 1e-9)) if value >= 1 else 3
    return f"{value / limit:.{digits}f} {prefix}{unit}".strip()


def hours(value: float) -> str:
    """Hours, or minutes where they are few, or days where they are many."""
    if value < 1:
        return f"{60 * value:.0f} min"
    return f"{value:.1f} h" if value < 48 else f"{value / 24:.1f} days"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]]


def costs_table() -> list[str]:
    """What the other tables rest on."""
    rows = [[amount(value) if value >= 1e3 else f"{value:.3g}", what, source] for value, what, source in COSTS.values()]
    return table(["cost", "of", "from"], rows)


def needs_table(work: Work) -> list[str]:
    """What each stage computes and reads, and how its work is cut."""
    rows = []
    for stage in stages(work):
        spent = stage.gpu_seconds, stage.flop / cost("cpu"), stage.core_seconds
        taken = [f"{seconds / 3600:,.3g} h" if seconds < 3.6e6 else f"{seconds / 3600:,.0f} h" for seconds in spent]
        parts, last = f"{stage.parts:,}" if stage.parts > 1 else "", hours(stage.last / 3600) if stage.last else ""
        rows.append([stage.name, amount(stage.flop), *taken, amount(stage.disk_bytes, "B"), parts, last])
    heads = ["stage", "FLOP", "GPU", "the same on cores", "cores beside it", "disk traffic", "parts", "last step"]
    return table(heads, rows)


def fleets_table(work: Work, fleets: tuple[int, ...] = (1, 8, 64)) -> list[str]:
    """Hours by number of GPUs, and what each stage waits for."""
    runs = [(stage.name, [simulate(stage, gpus) for gpus in fleets]) for stage in stages(work)]
    rows = [[name, *(f"{hours(took)} ({waits})" for took, waits in run)] for name, run in runs]
    rows.append(["all", *(hours(sum(run[number][0] for _, run in runs)) for number in range(len(fleets)))])
    return table(["stage", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in fleets)], rows)


def hub_table(works: tuple[Work, ...]) -> list[str]:
    """Files and requests against the limits of the Hub."""
    counts: list[tuple[str, Callable[[Work], str]]] = []

    def files(work: Work) -> int:
        per_part = work.tokens * work.row_bytes / math.ceil(work.chats / work.window)
        return math.ceil(work.chats / work.window) * math.ceil(per_part / work.file_bytes)

    def against(value: float, limit: float) -> str:
        return f"{amount(value)} ({'fits' if value <= limit else f'{math.ceil(value / limit)} of them'})"

    size = lambda work: work.tokens * work.row_bytes  # noqa: E731
    counts += [
        ("activations of one hook point", lambda work: amount(size(work), "B")),
        ("files; at most 100,000 in a repo", lambda work: against(files(work), FILES_PER_REPO)),
        ("files; at most 10,000 in a folder", lambda work: against(files(work), FILES_PER_FOLDER)),
        (
            "calls to upload them (256 files a call, one commit); 1,000 in 5 minutes",
            lambda work: against(files(work) / 256 + 3, API_CALLS),
        ),
        ("to upload or fetch it from one machine", lambda work: hours(size(work) / cost("hub") / 3600)),
        (
            "to fetch it whole, file by file, at 5,000 requests in 5 minutes",
            lambda work: hours(files(work) * 2 / RESOLVES * 300 / 3600),
        ),
        (
            "files that the index leaves on the way",
            lambda work: f"{index_parts(work.tokens)}, {amount(index_parts(work.tokens) * cost('part'), 'B')}",
        ),
    ]
    return table(
        ["", *(work.name for work in works)], [[what, *(tell(work) for work in works)] for what, tell in counts]
    )


def page() -> str:
    """The tables, between their marks."""
    lines = [MARKS[0], "", "What a unit costs:", "", *costs_table(), ""]
    for work in (SEED, LARGE):
        what = (
            f"{work.tokens:,.0f} tokens of {work.chats:,.0f} chats, d {work.d:,}, {work.features:,} latents, k {work.k}"
        )
        epochs = f", trained {work.epochs:g} times over" if work.epochs > 1 else ", trained once over"
        lines += [f"### {work.name[0].upper()}{work.name[1:]}", "", f"{what}{epochs}.", "", *needs_table(work), ""]
        lines += ["On machines with one GPU each, simulated:", "", *fleets_table(work), ""]
    lines += ["### Against the limits of the Hub", "", *hub_table((SEED, LARGE)), "", MARKS[1]]
    return "\n".join(lines)


def write(path: Path = PAGE) -> None:
    """Put the tables into the page."""
    text = path.read_text()
    before, _, rest = text.partition(MARKS[0])
    path.write_text(before + page() + rest.partition(MARKS[1])[2])


def measure(tokens: int = 262_144) -> None:
    """Bytes of a part of an index at the smaller size, and core seconds to read one and merge it into another."""
    import tempfile

    import numpy as np
    import torch

    from hubsae.core.codes import SparseCodes
    from hubsae.evals.passes import PassBlock
    from hubsae.index.table import FeatureTable

    def part(number: int) -> FeatureTable:
        rng = np.random.default_rng(number)
        made = FeatureTable("a", SEED.features)
        for start in range(0, tokens, 4096):
            # 45 % of the features fire at all, some a thousand times as often as others
            features = (29_568 * rng.random((4096, SEED.k)) ** 2).astype(np.int64) * 2
            values = rng.lognormal(0, 1, features.shape).astype(np.float32)
            codes = SparseCodes(torch.from_numpy(features), torch.from_numpy(values), SEED.features)
            row = np.arange(start, start + 4096) + number * tokens
            labels = {"sample_id": row // 286, "position": row % 286, "token_id": row % 50_000}
            made.add(PassBlock(torch.zeros(4096, 1), labels, int(row[0]), {"a": codes}))
        return made

    with tempfile.TemporaryDirectory() as folder:
        files = [part(number).save(Path(folder) / f"{number}.safetensors") for number in range(2)]
        whole = FeatureTable.open(files[0])
        start = time.process_time()
        whole.merge(FeatureTable.open(files[1]))
        took = time.process_time() - start
        print(f"a part leaves {files[1].stat().st_size:,} bytes; reading and merging it: {took:.1f} core seconds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--measure", action="store_true", help="measure the index's parts")
    asked = parser.parse_args()
    if asked.measure:
        measure()
    elif asked.write:
        write()
    else:
        print(page())
