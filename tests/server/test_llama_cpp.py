"""llama.cpp's own endpoints over a fake engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mixbit.server.model import ServedModel
from mixbit.server.presets import FillInMiddle
from mixbit.server.schema.llama import InfillResponse, PropsResponse
from tests.fakes import FakeEngine, Reply, failure, refusal
from tests.server.support import connect, error_of, events, served_model

FIM = FillInMiddle(prefix="<P>", suffix="<S>", middle="<M>", file="<F>")
CODER = served_model(fim=FIM)


async def post(path: str, engine: FakeEngine | None = None, model: ServedModel = CODER, **body: Any) -> Any:
    async with connect(engine or FakeEngine(), model) as client:
        return await client.post(path, json=body)


async def infill(engine: FakeEngine, **body: Any) -> Any:
    response = await post("/infill", engine, **body)
    assert response.status_code == 200, response.text
    return events(response.text) if body.get("stream") else response.json()


async def test_the_gap_stands_between_prefix_and_suffix() -> None:
    engine = FakeEngine(Reply(["mid", "dle\n"], cached_tokens=2))
    answer = await infill(engine, input_prefix="def f", input_suffix="): pass", prompt="(x", n_predict=9, seed=3)
    InfillResponse.model_validate(answer, strict=True)
    assert engine.requests[0].prompt == "<P>def f(x<S>): pass<M>"
    assert engine.requests[0].max_tokens == 9
    assert engine.requests[0].sampling.seed == 3
    assert answer["content"] == "middle\n"
    assert (answer["stop"], answer["stop_type"], answer["stopping_word"]) == (True, "eos", "")
    assert (answer["tokens_predicted"], answer["tokens_evaluated"], answer["tokens_cached"]) == (2, 23, 2)
    assert answer["timings"]["prompt_n"] == 21
    assert answer["timings"]["predicted_n"] == 2
    assert answer["has_new_line"]


async def test_other_files_come_first_under_their_names() -> None:
    engine = FakeEngine()
    extra = [{"filename": "a.py", "text": "A"}, {"text": "B"}]
    await infill(engine, input_prefix="x", input_suffix="y", input_extra=extra)
    assert engine.requests[0].prompt == "<F>a.py\nA\n<F>tmp\nB\n<F><P>x<S>y<M>"
    assert engine.requests[0].max_tokens is None
    plain = FillInMiddle(prefix="<P>", suffix="<S>", middle="<M>")
    assert plain.prompt("x", "y", [("a", "b")]) == "<P>x<S>y<M>"


async def test_a_stream_joins_to_the_whole() -> None:
    reply = Reply(["a", "b"], reason="stop", stop="!")
    *pieces, last = await infill(FakeEngine(reply), input_prefix="x", stream=True)
    assert [piece["content"] for piece in pieces] == ["a", "b"]
    assert [piece["stop"] for piece in pieces] == [False, False]
    assert (last["content"], last["stop"], last["stop_type"], last["stopping_word"]) == ("", True, "word", "!")
    for piece in (*pieces, last):
        InfillResponse.model_validate(piece, strict=True)


async def test_zero_tokens_compute_the_prompt_alone() -> None:
    engine = FakeEngine()
    answer = await infill(engine, input_prefix="x", n_predict=0)
    assert engine.requests[0].max_tokens == 1
    assert (answer["content"], answer["tokens_predicted"]) == ("", 0)


async def test_time_is_up_after_the_first_line() -> None:
    engine = FakeEngine(Reply(["a", "b\n", "c", "d"], delay=0.03))
    answer = await infill(engine, input_prefix="x", t_max_predict_ms=1)
    assert answer["content"] == "ab\n"
    assert answer["stop_type"] == "limit"
    assert answer["tokens_predicted"] == 2
    assert not engine.running


async def test_fields_are_selected() -> None:
    answer = await infill(FakeEngine(), input_prefix="x", response_fields=["content", "timings/predicted_n", "a/b"])
    assert answer == {"content": "Hello world", "timings/predicted_n": 2}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n_predict": -2}, "n_predict"),
        ({"grammar": "root"}, "grammar"),
        ({"input_prefix": 5}, "input_prefix"),
        ({"input_extra": [{"filename": "x"}]}, "input_extra[0].text"),
        ({"temperature": 1e9}, "temperature"),
        ({"seed": 2**70}, "seed"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    response = await post("/infill", **body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_models_without_the_tokens_say_so() -> None:
    response = await post("/infill", model=served_model(), input_prefix="x")
    assert (response.status_code, error_of(response)["param"]) == (400, "input_suffix")


@pytest.mark.parametrize("stream", [False, True])
async def test_failures_are_told(stream: bool) -> None:
    engine = FakeEngine(refusal("context_length_exceeded"))
    response = await post("/infill", engine, input_prefix="x", stream=stream)
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
    response = await post("/infill", FakeEngine(failure("worker_died")), input_prefix="x", stream=stream)
    if stream:
        assert events(response.text)[-1]["error"]["code"] == "worker_died"
    else:
        assert (response.status_code, error_of(response)["code"]) == (503, "worker_died")


async def test_tokens_and_back() -> None:
    tokens = (await post("/tokenize", content="hé")).json()
    assert tokens == {"tokens": [104, 233]}
    assert (await post("/detokenize", **tokens)).json() == {"content": "hé"}
    pieces = (await post("/tokenize", content="hé", with_pieces=True)).json()
    assert pieces == {"tokens": [{"id": 104, "piece": "h"}, {"id": 233, "piece": "é"}]}
    response = await post("/detokenize", tokens=[0x110000])
    assert (response.status_code, error_of(response)["param"]) == (400, "tokens")
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "x", "with_pieces": 1}, "with_pieces"),
        ("/tokenize", {"content": "x", "parse_special": False}, "parse_special"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**40]}, "tokens[0]"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ]
    for path, body, param in wrong:
        response = await post(path, **body)
        assert (response.status_code, error_of(response)["param"]) == (400, param), body


async def test_props_say_what_is_served_and_no_path() -> None:
    async with connect(FakeEngine()) as client:
        answer = (await client.get("/props")).json()
        PropsResponse.model_validate(answer, strict=True)
        assert answer["default_generation_settings"]["n_ctx"] == 4096
        assert answer["default_generation_settings"]["params"]["temperature"] == 1.0
        assert (answer["model_alias"], answer["bos_token"]) == ("org/tiny", "<s>")
        assert "message.role" in answer["chat_template"]
    async with connect(FakeEngine(ready=None), served_model(None)) as client:
        answer = (await client.get("/props")).json()
        assert answer["default_generation_settings"]["n_ctx"] is None
        assert answer["chat_template"] == ""


async def test_the_docs_page_needs_no_network() -> None:
    async with connect(FakeEngine()) as client:
        page = await client.get("/docs")
        assert page.status_code == 200
        assert "http" not in page.text.replace("http-equiv", "")
        for name, kind in (("swagger-ui-bundle.js", "text/javascript"), ("swagger-ui.css", "text/css")):
            assert f"/docs/{name}" in page.text
            asset = await client.get(f"/docs/{name}")
            assert asset.status_code == 200
            assert asset.headers["content-type"].startswith(kind)
            assert len(asset.content) > 100_000
        for name in ("nothing.js", "..%2fconsts.py", "%2e%2e/core.py", "redoc.standalone.js"):
            assert (await client.get(f"/docs/{name}")).status_code == 404


async def test_every_endpoint_is_described() -> None:
    async with connect(FakeEngine()) as client:
        document = (await client.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            assert "HTTPValidationError" not in json.dumps(operation), path
