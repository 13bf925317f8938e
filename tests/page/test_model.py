"""The picture of the model: the widths of the checkpoint, and numbers that move."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from mixbit.engine.client import EngineState
from mixbit.engine.inspection import describe
from mixbit.engine.loader import load
from mixbit.engine.protocol import Stats
from tests.checkpoints import write_checkpoint
from tests.fakes import FAKE_READY, FakeEngine
from tests.page.serving import Site, serve
from tests.page.using import ask, text_of, visit
from tests.server.conftest import tiny_checkpoint  # noqa: F401
from tests.server.running import start

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROLES = {
    "q_proj": "attention q",
    "k_proj": "attention k",
    "v_proj": "attention v",
    "o_proj": "attention o",
    "in_proj_qkvz": "delta net qkvz",
    "in_proj_ba": "delta net ba",
    "out_proj": "delta net out",
    "mlp.gate": "router",
    "mlp.shared_expert_gate": "shared gate",
    "shared_expert.gate_proj": "shared expert gate/up",
    "shared_expert.up_proj": "shared expert gate/up",
    "shared_expert.down_proj": "shared expert down",
    "switch_mlp.gate_proj": "experts gate/up",
    "switch_mlp.up_proj": "experts gate/up",
    "switch_mlp.down_proj": "experts down",
    "embed_tokens": "embedding",
    "lm_head": "head",
}
OVERRIDES = {
    "*.mlp.gate": (8, 64),
    "*.switch_mlp.*": (2, 32),
    "*.1.mlp.switch_mlp.up_proj": (3, 32),  # two widths in one cell
    "*.3.self_attn.q_proj": None,
    "*.o_proj": (5, 64),
    "model.embed_tokens": (6, 64),
}


def test_the_map_shows_the_widths_of_the_checkpoint(page: Page, tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "model", "qwen3_next", overrides=OVERRIDES))
    expected = set()
    for name, binding in model.bindings.items():
        role = next(role for end, role in ROLES.items() if name.endswith(end))
        layer = re.search(r"\.layers\.(\d+)\.", name)
        width = "float32" if binding.scheme is None else str(binding.scheme.bits)
        expected.add((role, f"layer {layer[1]}" if layer else "outside the layers", width))
    assert ("experts gate/up", "layer 1", "2") in expected
    assert ("experts gate/up", "layer 1", "3") in expected
    engine = FakeEngine(ready=msgspec.structs.replace(FAKE_READY, model=describe(model)))
    with serve(engine) as site:
        visit(page, f"{site.url}/#model")
        page.locator("g.cell").first.wait_for()
        cells = page.locator("g.cell").evaluate_all("all => all.map(({dataset: d}) => [d.role, d.where, d.bits])")
        found = Counter(map(tuple, cells))
        assert max(found.values()) == 1
        assert {cell for cell in found if cell[0] in ROLES.values()} == expected
        # The colour is that of the width, and no two widths have the same.
        colours = page.locator("g.cell").evaluate_all(
            "all => all.map(g => [g.dataset.bits, getComputedStyle(g.querySelector('rect')).fill])"
        )
        assert (
            len({bits for bits, _ in colours})
            == len({colour for _, colour in colours})
            == len(set(map(tuple, colours)))
        )
        page.locator('g.cell[data-role="router"][data-where="layer 2"]').hover()
        assert page.locator(".readout").inner_text() == "router, layer 2: 8 bits, group 64, affine, 8x128"
        page.get_by_text("As a table").click()
        rows = page.locator(".numbers tbody tr").all_inner_texts()
        assert len(rows) == len(engine.ready.model.classes if engine.ready else ())
        experts = next(row.split("\t") for row in rows if row.startswith("experts gate/up\t1\t1\t8x64x128\t3"))
        assert experts[-1] == "model.layers.1.mlp.switch_mlp.up_proj"
        assert "experts gate/up\t0-3\t7\t8x64x128\t2\t32" in "\n".join(rows)
        tokens = sum(each.token_bytes for each in describe(model).classes)
        (read,) = page.locator(".facts div", has_text="Read for a token").all_inner_texts()
        assert f"{tokens / 1000:.1f} kB" in read or f"{tokens / 1000:.0f} kB" in read
        widths = page.locator(".bars li").evaluate_all(
            "all => all.map(li => [...li.querySelectorAll('i')].reduce((sum, i) => sum + parseFloat(i.style.width), 0))"
        )
        assert max(widths) == pytest.approx(100, abs=0.1)
        assert widths == sorted(widths, reverse=True)


def test_a_model_that_is_being_loaded(page: Page) -> None:
    with serve(FakeEngine(state=EngineState.LOADING, ready=None)) as site:
        page.goto(f"{site.url}/#model")
        page.locator(".status[data-state=loading]").wait_for()
        page.get_by_text("The model is being loaded.").wait_for()
        site.engine.ready, site.engine.state = FAKE_READY, EngineState.READY
        page.get_by_text("Bits of every tensor").wait_for()
        page.locator(".status[data-state=ok]").wait_for()


def value(page: Page, title: str) -> str:
    return str(page.locator(f"section.chart[aria-label='{title}'] .value").inner_text())


def note(page: Page, title: str) -> str:
    return str(page.locator(f"section.chart[aria-label='{title}'] .note").inner_text())


def test_the_queue_and_the_cache_as_the_engine_tells(page: Page, site: Site) -> None:
    site.engine.ready = msgspec.structs.replace(FAKE_READY, cache_bytes=100_000_000, block_bytes=1_000_000)
    site.engine.stats = Stats(running=3, waiting=5, blocks_used=20, blocks_cached=30)
    visit(page, f"{site.url}/#model")
    page.get_by_text("3 running").wait_for()
    assert note(page, "Requests").startswith("5 waiting")
    assert value(page, "KV cache") == "50.0 MB"
    assert note(page, "KV cache") == "20.0 MB in use, 30.0 MB kept, of 100 MB"
    assert value(page, "Prompt tokens from the cache") == "-"
    site.engine.stats = Stats(running=1)
    page.get_by_text("1 running").wait_for()
    curve = page.locator("section.chart[aria-label=Requests] path.c1")
    assert len(re.findall("L", curve.get_attribute("d") or "")) >= 3


def test_a_real_server_moves_the_charts(page: Page, tiny_checkpoint: Path) -> None:  # noqa: F811
    with start("--model", str(tiny_checkpoint), "--threads", "1") as server:
        visit(page, f"{server.url}/#model")
        page.get_by_text("0 tokens since the start").wait_for()
        bits = page.locator('g.cell[data-role="mlp down"]').evaluate_all("all => all.map(g => g.dataset.bits)")
        assert bits == ["8", "8", "8"]
        with server.client() as client:
            for _ in range(3):
                body = {"prompt": [5, 6, 7] * 20, "max_tokens": 60, "ignore_eos": True}
                assert client.post("/v1/completions", json=body).status_code == 200
        found = server.settled()
        generated, cached = found["mixbit_completion_tokens_total"], found["mixbit_cached_tokens_total"]
        page.get_by_text(f"{generated:.0f} tokens since the start").wait_for()
        page.get_by_text(f"{cached:.0f} of 180 tokens were not computed again").wait_for()
        assert generated == 180
        assert cached > 0
        assert value(page, "Prompt tokens from the cache") == f"{100 * cached / 180:.0f} %"
        assert "since the start: half under" in note(page, "Time to first token")
        dots = page.locator("section.chart[aria-label='Time to first token'] path.c1").get_attribute("d")
        assert dots is not None
        assert re.search(r"M[\d.]+ [\d.]+h0", dots)
        requests = len(re.findall("GET /metrics", server.text()))
        page.locator("#chat-tab").click()
        page.wait_for_timeout(2500)
        assert len(re.findall("GET /metrics", server.text())) == requests


def test_the_demo_model_answers(page: Page, demo_checkpoint: Path) -> None:
    with start("--model", str(demo_checkpoint), "--precision", "exact") as server:
        visit(page, server.url)
        page.locator("#settings-toggle").click()
        page.locator("[name=temperature]").fill("0")
        page.locator("[name=max_tokens]").fill("40")
        done = ask(page, "What is the capital of France?")
        assert "Paris" in text_of(done)
        assert " tok/s · first after " in done.locator(".stats").inner_text()
        page.locator("#model-tab").click()
        page.locator("g.cell").first.wait_for()
        assert page.locator('g.cell[data-role="embedding and head"]').get_attribute("data-bits") == "8"
        assert page.locator('g.cell[data-role="attention q"][data-bits="4"]').count() == 30
