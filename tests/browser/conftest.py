"""A browser before a whole ./run, both for all tests of a process; and pages in it that may not complain."""

import re

import pytest

from tests.engines import processes
from tests.running import Running

# What a visitor has unless a test says otherwise.
USUAL = {"viewport": {"width": 1280, "height": 800}, "locale": "en-GB", "timezone_id": "Asia/Bangkok"}


@pytest.fixture(scope="session")
def chromium():
    if why := processes.why_missing("browser"):
        pytest.skip(f"NOT RUN: {processes.NAMES['browser']}: {why}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Without its sandbox, for which containers have no room; what it opens is ours. A process for each site of a
        # context, not for each page: to begin one takes longer than most of what a page does in it.
        browser = driver.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--process-per-site"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def stack(chromium, tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("gallery") / "data", "--no-rate-limit")
    running.leave_alone()
    yield running
    running.stop()


def new_context(chromium, **options):
    context = chromium.new_context(**{**USUAL, **options})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    return context


@pytest.fixture(scope="session")
def usual(stack, chromium):
    """The context of visits that need none of their own; a page that stays open in it keeps its process warm."""
    context = new_context(chromium)
    context.new_page().goto(f"{stack.url}/health")
    yield context
    context.close()


@pytest.fixture
def visit(stack, chromium, usual):
    """
    Opens the page, by default with the key. Whatever the browser complains of there fails the test in the end, but for
    what is `expected` (patterns). It knows nothing of earlier visits: of those before a test where it gets the usual
    context, of any where it gets its `own`, which is for tests that stop the clock or the network, or has options.
    """
    kept, contexts, complaints = usual.pages[0], [], []

    def complain(text, expected):
        if not any(re.search(pattern, text) for pattern in expected):
            complaints.append(text)

    def open_page(query="", *, url=stack.url, key=stack.key, expected=(), own=False, **options):
        context = usual
        if own or options or (url, key) != (stack.url, stack.key):
            context = new_context(chromium, **options)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda line: line.type in ("error", "warning") and complain(line.text, expected))
        page.on("pageerror", lambda error: complain(str(error), expected))
        page.on("dialog", lambda dialog: complain(f"a dialog: {dialog.message}", expected))
        if key:
            page.add_init_script(f"localStorage.getItem('ob.key') ?? localStorage.setItem('ob.key', '{key}')")
        page.goto(f"{url}/{query}")
        return page

    yield open_page
    for page in [page for context in (usual, *contexts) for page in context.pages if page != kept]:
        page.unroute_all(behavior="ignoreErrors")  # an answer may be under way
        page.close()
    for context in contexts:
        context.close()
    kept.evaluate("localStorage.clear()")
    assert complaints == []
