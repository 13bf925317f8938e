"""A headless Chromium for the page. Without playwright or a Chromium these tests are skipped and say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from tests.fakes import FakeEngine
from tests.page.serving import Site, serve

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has no sandbox


# Of one module: playwright keeps an event loop in this thread, and other tests want their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_spec("playwright") is None:
        pytest.skip("playwright is not installed: `make test-page` installs it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = next((path for name in NAMES if (path := shutil.which(name))), playwright.chromium.executable_path)
        if not os.path.exists(program):
            pytest.skip("no Chromium is found: apt install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own storage. Fails if a script fails or something is against the content policy."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, color_scheme="light", locale="en-GB")
    context.set_default_timeout(15_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    # A refusal by the server, which a test may want, is among the console's errors.
    assert [text for text in problems if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(FakeEngine()) as site:
        yield site
