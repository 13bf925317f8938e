"""What a user does on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def visit(page: Page, url: str) -> None:
    """Open the page and wait until it is ready."""
    page.goto(url)
    page.locator(".status[data-state=ok]").wait_for()
    page.locator("#model-name option").first.wait_for(state="attached")


def say(page: Page, text: str) -> None:
    """Send a message."""
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")


def answer(page: Page) -> Locator:
    """The newest answer, once it is complete."""
    last = page.locator("article.assistant").last
    last.and_(page.locator("[aria-busy=false]")).wait_for()
    return last


def ask(page: Page, text: str) -> Locator:
    """Send a message and wait for the answer."""
    before = page.locator("article.assistant").count()
    say(page, text)
    page.locator("article.assistant").nth(before).wait_for()
    return answer(page)


def text_of(answer: Locator) -> str:
    """The answer itself, without thoughts and figures."""
    return str(answer.locator("> .prose").inner_text())


def said(page: Page, text: str) -> Locator:
    """A text in the conversation."""
    return page.locator("#log").get_by_text(text)
