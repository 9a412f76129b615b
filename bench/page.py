"""
What the gallery page weighs, and how soon its first picture is there: `.venv/bin/python -m bench.page`.

A whole ./run with 60 jobs is looked at in Debian's chromium, as ./test installs both. API Gateway compresses what it
answers, which Chalice's server does not: so a relay before it does. It also keeps each request back for as long as a
way there and back takes. With --pictures the views are also saved as PNG, each at 360 and 1280 px, light and dark.
"""

import argparse
import contextlib
import gzip
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import requests
from playwright.sync_api import Browser, Page, sync_playwright

from chalicelib import page
from tests.browser import test_gallery as tests
from tests.running import Running

JOBS = 60
WAYS = {"this machine": 0.0, "50 ms there and back": 0.05, "150 ms there and back": 0.15}  # seconds
RUNS = 7
COMPRESSED_FROM = 1000  # bytes, as .chalice/config.json has it


def gateway(url: str, way: float) -> AbstractContextManager[str]:
    """A relay before the API that answers as late and as small as API Gateway does from afar; yields its URL."""

    class Relay(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(way)
            answer = requests.get(url + self.path, headers={**self.headers, "Accept-Encoding": "identity"}, timeout=30)
            body, kept = answer.content, ("Content-Type", "ETag", "Cache-Control", "Content-Security-Policy", "Date")
            headers = {name: answer.headers[name] for name in kept if name in answer.headers}
            if len(body) >= COMPRESSED_FROM:
                body, headers = gzip.compress(body), {**headers, "Content-Encoding": "gzip"}
            self.send_response_only(answer.status_code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            with contextlib.suppress(ConnectionError):  # the visit is over: its picture is there
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    return tests.serving(Relay)


def first_picture(browser: Browser, url: str, key: str, *, again: bool) -> tuple[int, int, float]:
    """Requests and bytes before the first picture is shown, without pictures, and milliseconds until then."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    tab.add_init_script(f"localStorage.setItem('ob.key', '{key}')")
    if again:
        tab.goto(url)
        tests.shown(tab.locator(".card img").first)
    seen: list[Any] = []
    tab.on("requestfinished", lambda request: seen.append(request))
    begun = time.perf_counter()
    tab.goto(url)
    tests.shown(tab.locator(".card img").first)
    taken = (time.perf_counter() - begun) * 1000
    own = [request for request in seen if request.url.startswith(url)]
    sizes = [request.sizes() for request in own]
    context.close()
    return len(own), sum(size["responseBodySize"] + size["responseHeadersSize"] for size in sizes), taken


def measure(browser: Browser, stack: Running) -> None:
    """Print the figures."""
    files = sorted(page.FOLDER.iterdir())
    whole, packed = (
        sum(len(pack(file.read_bytes())) for file in files) for pack in (bytes, lambda text: gzip.compress(text))
    )
    print(f"{len(files)} files, {whole:,} bytes, {packed:,} compressed\n")
    print("| way | visit | requests | bytes | first picture, ms |\n|---|---|---|---|---|")
    for name, way in WAYS.items():
        with gateway(stack.url, way) as url:
            for again in (False, True):
                runs = [first_picture(browser, url, stack.key, again=again) for _ in range(RUNS)]
                requests_, sizes, taken = (statistics.median(each) for each in zip(*runs, strict=True))
                visit = "second" if again else "first"
                print(f"| {name} | {visit} | {requests_:.0f} | {sizes:,.0f} | {taken:.0f} |", flush=True)


def fill(stack: Running) -> None:
    """Jobs of all kinds."""
    prompts = ("a lighthouse in a storm", "แมวสีส้มนั่งบนดวงจันทร์", "a paper boat on a green river", "ตลาดน้ำยามเช้า")
    ids = [tests.create(stack, f"{prompts[number % 4]}, {number + 1}") for number in range(JOBS)]
    tests.bury(stack, "a glass bridge over clouds")
    tests.bury(stack, "บ้านต้นไม้ในป่าฝน")
    ids.append(tests.create(stack, "a city of mirrors", simulate={"status": "FAILED", "error": "CUDA out of memory"}))
    for job_id in ids:
        tests.ended(stack, job_id)
    tests.create(stack, "a whale made of stars", simulate={"progress": 8, "run_seconds": 240})
    tests.create(stack, "a garden seen from above", simulate={"queue_seconds": 900})


def views(tab: Page, url: str) -> Iterator[str]:
    """Go through the views, and name each when it is there."""
    tab.goto(url)
    tests.shown(tab.locator(".card img").first)
    yield "gallery"
    tab.locator(".card", has_text="whale").locator("a").click()
    tab.locator("#job dl").wait_for()
    yield "progress"
    tab.keyboard.press("Escape")
    tab.locator(".card", has_text="lighthouse").first.locator("a").click()
    tests.shown(tab.locator("#job .large img"))
    yield "job"
    tab.goto(f"{url}/?view=dead")
    tab.locator(".letter").first.wait_for()
    yield "dead"
    tab.goto(f"{url}/?view=figures")
    tab.locator(".tile").first.wait_for()
    yield "figures"


def save_pictures(browser: Browser, stack: Running, folder: Path) -> None:
    """Save each view."""
    folder.mkdir(parents=True, exist_ok=True)
    for width, height in ((360, 740), (1280, 800)):
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, locale="en-GB"
            )
            tab = context.new_page()
            tab.add_init_script(f"localStorage.setItem('ob.key', '{stack.key}')")
            for name in views(tab, stack.url):
                tab.wait_for_timeout(600)
                tab.screenshot(path=folder / f"{name}-{width}-{scheme}.png")
            context.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="save the views there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        stack = Running(folder, "--no-rate-limit")
        stack.leave_alone()
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        try:
            fill(stack)
            measure(browser, stack)
            if options.pictures:
                save_pictures(browser, stack, options.pictures)
        finally:
            browser.close()
            stack.stop()


if __name__ == "__main__":
    main()
