"""The chat in a browser, over a fake engine: what is typed arrives, what arrives is shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from mixbit.engine.client import EngineState
from mixbit.engine.protocol import Generate
from mixbit.server.parsing.machine import ReasoningMarkers
from mixbit.server.presets import SamplingDefaults
from tests.fakes import FakeEngine, Reply, failure, refusal
from tests.page.serving import Site, serve
from tests.page.using import answer, ask, said, say, text_of, visit
from tests.server.running import until
from tests.server.support import served_model

if TYPE_CHECKING:
    from playwright.sync_api import Page

WORDS = [f"word{number} " for number in range(30)]
EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script>[x](javascript:window.evil=1)<b>&amp;</b>'
THINKING = replace(served_model(), reasoning=ReasoningMarkers("<think>", "</think>"))
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_an_answer_streams_and_is_measured(page: Page, site: Site) -> None:
    site.engine.reply = Reply(WORDS, delay=0.03, cached_tokens=7, prompt_tokens=1234)
    visit(page, site.url)
    say(page, "count\nplease")
    busy = page.locator("article.assistant[aria-busy=true]")
    busy.get_by_text("word3").wait_for()
    assert "word29" not in busy.inner_text()
    assert page.locator("#send").is_hidden()
    done = answer(page)
    assert text_of(done).split() == [word.strip() for word in WORDS]
    assert page.locator("article.user .bubble").inner_text() == "count\nplease"
    assert page.locator("#input").input_value() == ""
    stats = done.locator(".stats").inner_text()
    assert stats.startswith("30 tokens · ")
    assert stats.endswith(" · prompt 1,234, 7 cached")
    first, speed = re.search(r"first after (\d+) ms", stats), re.search(r"([\d.]+) tok/s", stats)
    assert first is not None
    assert 30 <= int(first[1]) < 1000
    assert speed is not None
    assert 1 < float(speed[1]) < 34  # no faster than the script
    assert page.locator("#context").inner_text() == "1,264 of 4,096"
    assert page.locator("#announce").inner_text().split() == [word.strip() for word in WORDS]
    assert site.last_request().prompt == "<user>count\nplease</><assistant>"


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_then_continue(page: Page, site: Site, way: str) -> None:
    site.engine.reply = Reply(["one ", "two "], hang=True)
    visit(page, site.url)
    say(page, "go")
    said(page, "one two").wait_for()
    if way == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    stopped = answer(page)
    until(lambda: site.engine.aborted == [site.last_request().request_id])
    assert text_of(stopped) == "one two"
    assert "~2 tokens" in stopped.locator(".stats").inner_text()
    assert "stopped" in stopped.locator(".stats").inner_text()
    assert page.locator("#send").is_visible()
    site.engine.reply = Reply(["three"])
    stopped.get_by_role("button", name="Continue").click()
    said(page, "one two three").wait_for()
    assert site.last_request().prompt == "<user>go</><assistant>one two "
    assert page.locator("article").count() == 2


def test_regenerate_and_edit(page: Page, site: Site) -> None:
    def reply(request: Generate) -> Reply:
        return Reply([f"answer {len(site.engine.requests)}"])

    site.engine.reply = reply
    visit(page, site.url)
    ask(page, "first")
    ask(page, "second")
    page.get_by_role("button", name="Regenerate").last.click()
    said(page, "answer 3").wait_for()
    assert page.locator("article").all_inner_texts()[2].startswith("second")
    assert page.locator("article").count() == 4
    assert site.last_request().prompt == "<user>first</><assistant>answer 1</><user>second</><assistant>"
    page.locator("article.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    editor = page.get_by_label("Change the message")
    assert editor.input_value() == "first"
    editor.fill("changed")
    editor.press("Enter")
    said(page, "answer 4").wait_for()
    assert page.locator("article").count() == 2
    assert site.last_request().prompt == "<user>changed</><assistant>"


def test_settings_reach_the_request(page: Page) -> None:
    defaults = SamplingDefaults(temperature=0.7, top_p=0.9, top_k=20)
    with serve(FakeEngine(), served_model(defaults=defaults)) as site:
        visit(page, site.url)
        ask(page, "plain")
        plain = site.last_request()
        assert (plain.sampling.temperature, plain.sampling.top_k, plain.max_tokens) == (0.7, 20, None)
        page.locator("#settings-toggle").click()
        assert page.locator("[name=temperature]").get_attribute("placeholder") == "0.7"
        assert page.locator("[name=top_k]").get_attribute("placeholder") == "20"
        values = {"temperature": "0.25", "top_p": "0.5", "top_k": "0", "min_p": "0.05", "max_tokens": "1", "seed": "42"}
        for name, value in values.items():
            page.locator(f"[name={name}]").fill(value)
        page.locator("[name=system]").fill("Be short.")
        page.locator("#clear").click()
        cut = ask(page, "set")
        assert "cut off at the limit" in cut.locator(".stats").inner_text()
        request = site.last_request()
        sampling = request.sampling
        assert request.prompt == "<system>Be short.</><user>set</><assistant>"
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 0, 0.05)
        assert (sampling.seed, request.max_tokens) == (42, 1)
        page.reload()
        page.locator(".status[data-state=ok]").wait_for()
        assert page.locator("[name=seed]").input_value() == "42"  # kept
        page.locator("[name=temperature]").fill("3")
        count = len(site.engine.requests)
        say(page, "too hot")
        assert page.locator("[name=temperature]").evaluate("field => document.activeElement === field")
        assert len(site.engine.requests) == count
        assert page.locator("article.user").count() == 1


def test_the_chosen_name_is_asked_for(page: Page, site: Site) -> None:
    visit(page, site.url)
    assert page.locator("#model-name").input_value() == "org/tiny"
    page.locator("#model-name").select_option("tiny")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "hi")
    body: Any = sent.value.post_data_json
    assert body["model"] == "tiny"


def test_thoughts_are_folded(page: Page) -> None:
    with serve(FakeEngine(Reply(["<think>", "let me ", "see", "</think>", "Paris"])), THINKING) as site:
        visit(page, site.url)
        done = ask(page, "capital?")
        assert text_of(done) == "Paris"
        summary = done.locator(".thinking summary")
        assert summary.inner_text().startswith("Thought for")
        assert not done.get_by_text("let me see").is_visible()
        summary.focus()
        page.keyboard.press("Enter")
        assert done.get_by_text("let me see").is_visible()


def test_thoughts_may_take_less_than_the_clock_shows(page: Page) -> None:
    page.add_init_script("performance.now = () => 1000")
    with serve(FakeEngine(Reply(["<think>let me see</think>Paris"])), THINKING) as site:
        visit(page, site.url)
        done = ask(page, "capital?")
        assert text_of(done) == "Paris"
        assert done.locator(".thinking summary").inner_text() == "Thought for 0.0 ms"


def test_thinking_can_be_turned_off_where_the_template_can(page: Page) -> None:
    template = "{% if enable_thinking is defined and not enable_thinking %}[quiet]{% endif %}{{ messages[0].content }}"
    with serve(FakeEngine(), served_model(template)) as site:
        visit(page, site.url)
        page.locator("#settings-toggle").click()
        page.get_by_label("Thinking").select_option("false")
        ask(page, "hi")
        assert site.last_request().prompt == "[quiet]hi"


def test_a_tool_call_is_shown_and_answered(page: Page, site: Site) -> None:
    call = json.dumps({"name": "weather", "arguments": {"city": "Zürich", "days": 3}})
    site.engine.reply = Reply(["<tool_call>\n", call[:20], call[20:], "\n</tool_call>"])
    visit(page, site.url)
    page.locator("#settings-toggle").click()
    page.get_by_text("Tools", exact=True).click()
    page.locator("[name=tools]").fill("[{")
    say(page, "weather?")
    assert site.engine.requests == []  # no JSON: nothing is sent
    page.locator("[name=tools]").fill(json.dumps(TOOLS))
    page.locator("#input").press("Enter")  # the message is still there
    page.locator("article.assistant").wait_for()
    done = answer(page)
    card = done.get_by_label("Tool call weather")
    assert json.loads(card.locator("pre").inner_text()) == {"city": "Zürich", "days": 3}
    site.engine.reply = Reply(["It rains."])
    done.get_by_label("Result of weather").fill("rain")
    done.get_by_role("button", name="Send result").click()
    said(page, "It rains.").wait_for()
    prompt = str(site.last_request().prompt)
    assert prompt.endswith("\n</tool_call></><user><tool_response>\nrain\n</tool_response></><assistant>")
    assert prompt.startswith("[tools")


@pytest.mark.parametrize(
    ("reply", "title", "text"),
    [
        (refusal("queue_full", "300 requests wait"), "The server is busy", "300 requests wait Try again in 1 second."),
        (refusal("context_length_exceeded", "4,096 tokens at most"), "The request was refused", "4,096 tokens at most"),
        (failure("worker_died", "the worker died"), "The answer broke off", "the worker died"),
    ],
)
def test_errors_are_told_and_tried_again(page: Page, site: Site, reply: Reply, title: str, text: str) -> None:
    site.engine.reply = reply
    visit(page, site.url)
    failed = ask(page, "hi")
    alert = failed.get_by_role("alert")
    assert alert.locator("b").inner_text() == title
    assert alert.locator("p").inner_text() == text
    assert text_of(failed) == ("Hel" if reply.fail else "")  # what had come is kept
    site.engine.reply = Reply()
    alert.get_by_role("button", name="Try again").click()
    said(page, "Hello world").wait_for()
    assert page.get_by_role("alert").count() == 0
    assert site.last_request().prompt == "<user>hi</><assistant>"


def test_a_server_that_is_not_ready_or_gone(page: Page) -> None:
    with serve(FakeEngine()) as site:
        visit(page, site.url)
        site.engine.state = EngineState.RESTARTING
        assert "The model is not ready" in ask(page, "hi").inner_text()
        page.locator(".status[data-state=restarting]").wait_for()
        site.engine.state = EngineState.READY
        page.locator(".status[data-state=ok]").wait_for()
        site.engine.reply = Reply(["some"], hang=True)
        say(page, "again")
        said(page, "some").wait_for()
    broken = answer(page)
    assert "The answer broke off" in broken.inner_text()
    assert "No connection" in ask(page, "anyone?").inner_text()
    page.locator(".status[data-state=unreachable]").wait_for()


def test_text_of_a_model_is_never_markup(page: Page) -> None:
    def reply(request: Generate) -> Reply:
        if "fail" in str(request.prompt):
            return failure("internal_error", EVIL, [EVIL])
        call = json.dumps({"name": "weather", "arguments": {"city": EVIL}})
        return Reply(
            [f"<think>{EVIL}</think>", EVIL, f"\n# {EVIL}\n```{EVIL}\n{EVIL}\n```\n", f"<tool_call>{call}</tool_call>"]
        )

    model = replace(THINKING, names=(f"m{EVIL}",))
    with serve(FakeEngine(reply), model) as site:
        visit(page, site.url)
        page.locator("#settings-toggle").click()
        page.get_by_text("Tools", exact=True).click()
        page.locator("[name=tools]").fill(json.dumps(TOOLS))
        done = ask(page, EVIL)
        done.locator("summary").click()
        assert ask(page, f"fail {EVIL}").get_by_role("alert").locator("p").inner_text() == EVIL
        page.reload()  # and from what is kept
        page.locator("article.assistant").nth(1).wait_for()
        assert page.evaluate("window.evil") is None
        assert page.locator("#log :is(script, img, a, b:not(header b, .error b))").count() == 0
        assert EVIL in page.locator("#log").inner_text()
        assert page.locator("article.user .bubble").first.inner_text() == EVIL


def test_keyboard(page: Page, site: Site) -> None:
    visit(page, site.url)
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert site.engine.requests == []
    page.keyboard.press("Enter")
    answer(page)
    assert site.last_request().prompt == "<user>one\ntwo</><assistant>"
    page.keyboard.press("Tab")  # nothing to send: the button is still there to be reached
    assert page.evaluate("document.activeElement.id") == "send"
    page.locator("#chat-tab").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#model-tab").get_attribute("aria-selected") == "true"
    assert page.locator("#chat").is_hidden()
    assert page.evaluate("document.activeElement.id") == "model-tab"
    assert page.url.endswith("#model")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#chat").is_visible()
    page.locator(".skip").focus()
    assert page.locator(".skip").evaluate("link => link.getBoundingClientRect().top") >= 0  # it comes into view
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "input"


def test_every_control_has_a_name(page: Page, site: Site) -> None:
    visit(page, site.url)
    page.locator("#settings-toggle").click()
    ask(page, "hi")
    for control in page.locator("button, input, select, textarea, a[href]").all():
        if control.is_visible():
            named = control.evaluate(
                "e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim()"
            )
            assert named, control.evaluate("e => e.outerHTML")


def test_the_conversation_is_kept_until_it_is_cleared(page: Page, site: Site) -> None:
    visit(page, site.url)
    ask(page, "remember me")
    page.reload()
    assert text_of(answer(page)) == "Hello world"
    ask(page, "more")
    assert site.last_request().prompt == "<user>remember me</><assistant>Hello world</><user>more</><assistant>"
    page.locator("#clear").click()
    assert page.locator("article").count() == 0
    page.reload()
    page.get_by_text("What is on your mind?").wait_for()
    assert page.locator("article").count() == 0


def test_colours_follow_the_system_until_told(page: Page, site: Site) -> None:
    def lightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) // 3

    visit(page, site.url)
    assert lightness() > 200
    page.emulate_media(color_scheme="dark")
    assert lightness() < 50
    theme = page.locator("#theme")
    theme.click()
    assert theme.get_attribute("aria-label") == "Colours: light"
    assert lightness() > 200
    page.reload()
    assert lightness() > 200
    theme.click()
    page.emulate_media(color_scheme="light")
    assert lightness() < 50
    theme.click()
    assert lightness() > 200


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_sticks_out_on_small_screens(page: Page, site: Site, width: int) -> None:
    site.engine.reply = Reply(
        ["a" * 300, "\n```\n", "long line " * 40, "\n```\n| a | b |\n|---|---|\n| ", "x" * 200, " | y |"]
    )
    page.set_viewport_size({"width": width, "height": 700})
    visit(page, site.url)
    ask(page, "u" * 200)
    for tab in ("#chat-tab", "#model-tab"):
        page.locator(tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.evaluate(
            "() => [...document.querySelectorAll('header, form.composer, article, .card')]"
            ".filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
        )
        assert wide == []
