"""A server with a key: the page asks for it, keeps it in its tab, and the documentation uses it too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from mixbit.server.settings import LOOPBACK_HOSTS, Access
from tests.fakes import FakeEngine
from tests.page.serving import Site, serve
from tests.page.using import ask, said, text_of

if TYPE_CHECKING:
    from playwright.sync_api import Page

KEY = "open sesame"


@pytest.fixture
def keyed() -> Iterator[Site]:
    with serve(FakeEngine(), access=Access(keys=(KEY,), hosts=LOOPBACK_HOSTS)) as site:
        yield site


def give(page: Page, key: str) -> None:
    page.locator("#key-input").fill(key)
    page.locator("#key-input").press("Enter")


def test_the_key_is_asked_for_and_kept_in_the_tab(page: Page, keyed: Site) -> None:
    page.goto(keyed.url)
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    assert page.locator("#key-problem").is_hidden()
    give(page, "wrong")
    page.get_by_text("The API key is wrong.").wait_for()
    give(page, KEY)
    dialog.wait_for(state="hidden")
    assert text_of(ask(page, "hi")) == "Hello world"
    page.locator("#model-tab").click()
    page.locator(".chart .value").first.wait_for()
    page.reload()
    page.locator("#model-name option").first.wait_for(state="attached")
    page.locator("#chat-tab").click()
    assert text_of(ask(page, "again")) == "Hello world"
    assert dialog.is_hidden()
    assert page.evaluate("JSON.stringify({...localStorage})").find("sesame") == -1
    other = page.context.new_page()  # another tab does not know it
    other.goto(keyed.url)
    other.get_by_role("dialog").wait_for()
    other.get_by_role("button", name="Cancel").click()
    other.get_by_role("dialog").wait_for(state="hidden")


def test_a_key_that_has_changed_is_asked_for_again(page: Page, keyed: Site) -> None:
    page.goto(keyed.url)
    give(page, KEY)
    page.get_by_role("dialog").wait_for(state="hidden")
    page.evaluate("sessionStorage.setItem('mixbit.key', 'old')")
    assert "The key is missing or wrong" in ask(page, "hi").inner_text()
    give(page, KEY)
    page.get_by_role("dialog").wait_for(state="hidden")
    page.get_by_role("button", name="Try again").click()
    said(page, "Hello world").wait_for()


def test_the_documentation_works_with_a_key(page: Page, keyed: Site) -> None:
    page.goto(keyed.url)
    give(page, KEY)
    page.get_by_role("dialog").wait_for(state="hidden")
    page.goto(f"{keyed.url}/docs")
    page.locator(".opblock").first.wait_for()
    paths = httpx.get(f"{keyed.url}/openapi.json").json()["paths"]
    shown = page.locator(".opblock-summary-path").all_inner_texts()
    operations = [path for path, item in paths.items() for _ in item]
    assert sorted(text.replace("\u200b", "") for text in shown) == sorted(operations)
    page.locator("#operations-models-list_models_v1_models_get .opblock-summary-control").click()
    page.get_by_role("button", name="Execute").click()
    result = page.locator(".live-responses-table .response-col_description pre").first
    assert json.loads(result.inner_text())["data"][0]["id"] == "org/tiny"


def test_the_documentation_without_a_key(page: Page, keyed: Site) -> None:
    page.goto(f"{keyed.url}/docs")
    page.locator(".opblock").first.wait_for()
    page.get_by_role("button", name="Authorize").first.click()
    page.get_by_label("Value").first.fill(KEY)
    page.locator(".auth-btn-wrapper .authorize").first.click()
    page.locator(".btn-done").first.click()
    page.locator("#operations-models-list_models_v1_models_get .opblock-summary-control").click()
    page.get_by_role("button", name="Execute").click()
    assert "org/tiny" in page.locator(".live-responses-table .response-col_description pre").first.inner_text()
