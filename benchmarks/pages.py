"""How fast the feature pages are in a real Chromium, and whether they keep to themselves.

A made-up index of 65,536 features and 150,000 examples is served on loopback and looked at cold, five times:
until the table can be used, then features at random from it: time, requests and bytes each. With `--latency MS` the
browser's network is slowed down. Fails when a request leaves the origin or anything is said on the console.

    pip install playwright                     # the driver; Chromium itself is Debian's: apt install chromium
    python benchmarks/pages.py --screenshots /tmp/shots
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from hubsae.index.serve import serve
from tests.index import synthetic

FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
MBIT = 100


def slow_down(page: Page, latency: float) -> None:
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    speed = MBIT * 1e6 / 8
    conditions = {"offline": False, "latency": latency, "downloadThroughput": speed, "uploadThroughput": speed}
    session.send("Network.emulateNetworkConditions", conditions)


def watch(page: Page, url: str) -> tuple[list[str], list[str]]:
    """What the console says, and what is asked of other origins."""
    said: list[str] = []
    left: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda r: left.append(r.url) if not r.url.startswith((url, "data:")) else None)
    return said, left


def ready(page: Page, what: str) -> None:
    page.wait_for_selector(f"body[data-ready='{what}']", timeout=30_000)


def timed(browser: Any, url: str, asked: list[tuple[str, str | None]], latency: float) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"table s": [], "feature s": [], "requests": [], "kB": [], "permalink s": []}
    features = [0, 77, 12_345, 40_000, 65_535]
    for turn in range(5):
        page = browser.new_context().new_page()
        said, left = watch(page, url)
        if latency:
            slow_down(page, latency)
        start = time.perf_counter()
        page.goto(url)
        ready(page, "table")
        found["table s"].append(time.perf_counter() - start)
        page.wait_for_timeout(1500)
        asked.clear()
        number = features[turn]
        start = time.perf_counter()
        page.evaluate(f"location.hash = '#/sae/saes_k64%2Flayer18/feature/{number}'")
        ready(page, f"feature {number}")
        found["feature s"].append(time.perf_counter() - start)
        found["requests"].append(len(asked))
        ranges = [r.removeprefix("bytes=").split("-") for _, r in asked if r]
        found["kB"].append(sum(int(end) - int(begin) + 1 for begin, end in ranges) / 1000)
        page.context.close()
        page = browser.new_context().new_page()
        if latency:
            slow_down(page, latency)
        start = time.perf_counter()
        page.goto(f"{url}/#/sae/saes_k64%2Flayer18/feature/{number}")
        ready(page, f"feature {number}")
        found["permalink s"].append(time.perf_counter() - start)
        page.context.close()
        if said or left:
            raise SystemExit(f"console: {said}; other origins: {left}")
    return found


def shoot(browser: Any, url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        for size, (width, height) in {"wide": (1440, 900), "narrow": (390, 844)}.items():
            viewport = {"width": width, "height": height}
            page = browser.new_context(color_scheme=scheme, viewport=viewport).new_page()
            for name, place in (("table", ""), ("feature", "#/sae/saes_k64%2Flayer18/feature/0")):
                page.goto(f"{url}/{place}")
                ready(page, "table" if name == "table" else "feature 0")
                page.wait_for_timeout(500)
                page.screenshot(path=folder / f"{scheme}-{size}-{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--latency", type=float, default=0, help="added to every answer, in ms; with it 100 Mbit/s")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--screenshots", type=Path)
    args = parser.parse_args()
    asked: list[tuple[str, str | None]] = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        made = synthetic.write(Path(folder))
        for path in sorted(made.iterdir()):
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
        browser = driver.chromium.launch(executable_path=args.chromium, args=FLAGS)
        with serve(folder, notify=lambda path, wanted: asked.append((path, wanted))) as url:
            for name, values in timed(browser, url, asked, args.latency).items():
                shown = f"median {statistics.median(values):.3g}, max {max(values):.3g}"
                print(f"{name:12}{shown}")
            if args.screenshots:
                shoot(browser, url, args.screenshots)
        browser.close()


if __name__ == "__main__":
    main()
