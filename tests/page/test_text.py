"""The page's own modules: Markdown as elements, Prometheus' text as numbers."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from tests.page.serving import Site
from tests.page.using import visit
from tests.server.running import numbers

if TYPE_CHECKING:
    from playwright.sync_api import Page

RENDER = """async texts => {
    const { render } = await import("/static/markdown.js");
    const element = document.createElement("div");
    for (const text of texts) render(element, text);
    const bare = element.innerHTML.replace(/<figcaption>.*?<\\/figcaption>/g, "");
    return bare.replace(/ (tabindex|target|rel|title)="[^"]*"/g, "");
}"""
BLOCKS = [
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("a **b *c* d** e", "<p>a <strong>b <em>c</em> d</strong> e</p>"),
    ("***both*** and ~~gone~~", "<p><strong><em>both</em></strong> and <s>gone</s></p>"),
    ("__b__ _i_ snake_case_name 2*3*4", "<p><strong>b</strong> <em>i</em> snake_case_name 2<em>3</em>4</p>"),
    ("a * b * c ** d", "<p>a * b * c ** d</p>"),
    ("**open", "<p>**open</p>"),
    (r"\*not\* `a * b` ``a`b``", "<p>*not* <code>a * b</code> <code>a`b</code></p>"),
    ("`open", "<p>`open</p>"),
    ("# One\n#### Four #\n#none", "<h3>One</h3><h6>Four</h6><p>#none</p>"),
    (
        "```py\nx < 1\n\n# no heading\n```\nafter",
        '<figure class="code"><pre><code>x &lt; 1\n\n# no heading</code></pre></figure><p>after</p>',
    ),
    ("~~~\n```\n~~~", '<figure class="code"><pre><code>```</code></pre></figure>'),
    ("text\n```js\nopen", '<p>text</p><figure class="code"><pre><code>open</code></pre></figure>'),
    ("- a\n- b\n  - c\n  - d\n- e", "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>"),
    ("3. x\n4. y", '<ol start="3"><li>x</li><li>y</li></ol>'),
    ("1. x\n\n   more\n2. y\n\nend", "<ol><li>x<p>more</p></li><li>y</li></ol><p>end</p>"),
    (
        "- x\n  ```\n  code\n    in\n  ```",
        '<ul><li>x<figure class="code"><pre><code>code\n  in</code></pre></figure></li></ul>',
    ),
    ("so:\n- a\n- b", "<p>so:</p><ul><li>a</li><li>b</li></ul>"),
    ("> q\n> > r\nno", "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote><p>no</p>"),
    ("---\n***", "<hr><hr>"),
    (
        "| a | b |\n|---|:-:|\n| `1` | x\\|y |",
        '<div class="scroll"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td><code>1</code></td><td>x|y</td></tr></tbody></table></div>",
    ),
    ("[a *b*](https://example.org/x)", '<p><a href="https://example.org/x">a <em>b</em></a></p>'),
    ("see https://example.org/a.", '<p>see <a href="https://example.org/a">https://example.org/a</a>.</p>'),
    ("[a](javascript:alert(1)) [b](data:text/html,x)", "<p>[a](javascript:alert(1)) [b](data:text/html,x)</p>"),
    ("<b>&amp;</b> <!-- x -->", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt; &lt;!-- x --&gt;</p>"),
]


def test_markdown(page: Page, site: Site) -> None:
    visit(page, site.url)
    found = {text: page.evaluate(RENDER, [text]) for text, _ in BLOCKS}
    assert found == dict(BLOCKS)


def test_a_text_that_grows_ends_as_if_it_had_come_at_once(page: Page, site: Site) -> None:
    visit(page, site.url)
    for text in ["\n\n".join(text for text, _ in BLOCKS), *(text for text, _ in BLOCKS)]:
        growing = [text[:end] for end in range(0, len(text) + 1, 1 if len(text) < 100 else 7)] + [text]
        assert page.evaluate(RENDER, growing) == page.evaluate(RENDER, [text])


@pytest.mark.parametrize(
    "text", ["*a " * 20000, "a " + "`" * 30000, "[" * 30000, "> " * 5000 + "x", "- " * 5000, "**_a " * 10000]
)
def test_hostile_text_takes_no_time_and_is_not_lost(page: Page, site: Site, text: str) -> None:
    visit(page, site.url)
    script = RENDER.replace("element.innerHTML", "element.textContent")
    page.set_default_timeout(10_000)
    shown = page.evaluate(script, [text])
    assert len(re.sub(r"[\s>-]", "", shown)) == len(re.sub(r"[\s>-]", "", text))


SCRAPES = """async ([before, now]) => {
    const p = await import("/static/prometheus.js");
    const [a, b] = [p.parse(before), p.parse(now)];
    return {
        numbers: b,
        rose: p.increase(a, b, "things_total"),
        anew: p.increase(b, a, "things_total"),
        mean: p.meanBetween(a, b, "seconds"),
        none: p.meanBetween(b, b, "seconds"),
        quantiles: [0.25, 0.5, 0.95, 1].map(q => p.quantile(b, "seconds", q)),
        empty: p.quantile(p.parse(""), "seconds", 0.5),
    };
}"""


def quantile(bounds: list[float], values: list[float], q: float) -> float:
    """As Prometheus defines histogram_quantile."""
    counts = [sum(value <= bound for value in values) for bound in bounds]
    index = bisect_left(counts, q * len(values))
    if index == len(bounds):
        return bounds[-1]
    low, below = (bounds[index - 1], counts[index - 1]) if index else (0.0, 0)
    return low + (bounds[index] - low) * (q * len(values) - below) / (counts[index] - below)


def test_prometheus(page: Page, site: Site) -> None:
    registry = CollectorRegistry()
    bounds = [0.1, 0.5, 2.0]
    things = Counter("things", "Things", registry=registry)
    times = Histogram("seconds", "Times", registry=registry, buckets=bounds)
    things.inc(3)
    times.observe(0.05)
    before = generate_latest(registry).decode()
    things.inc(4)
    for value in (0.2, 0.3, 1.5, 9.0):
        times.observe(value)
    now = generate_latest(registry).decode()
    visit(page, site.url)
    found: dict[str, Any] = page.evaluate(SCRAPES, [before, now])
    assert found["numbers"] == numbers(now)
    assert (found["rose"], found["anew"], found["none"], found["empty"]) == (4, 3, None, None)
    assert math.isclose(found["mean"], (0.2 + 0.3 + 1.5 + 9) / 4)
    expected = [quantile(bounds, [0.05, 0.2, 0.3, 1.5, 9.0], q) for q in (0.25, 0.5, 0.95, 1)]
    assert all(map(math.isclose, found["quantiles"], expected)), (found["quantiles"], expected)
