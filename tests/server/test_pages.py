"""The pages' files and the numbers behind them, without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import msgspec
import pytest

from mixbit.engine.client import EngineState
from mixbit.engine.inspection import describe, inspect_model
from mixbit.engine.loader import load
from tests.checkpoints import write_checkpoint
from tests.fakes import FAKE_READY, FakeEngine
from tests.server.running import RunningServer
from tests.server.support import connect, error_of

FOLDER = Path(__file__).parents[2] / "server" / "static"
FILES = sorted(path.name for path in FOLDER.iterdir())


async def get(path: str, **options: dict[str, str]) -> httpx.Response:
    async with connect(FakeEngine()) as client:
        return await client.get(path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/", "/docs", *(f"/static/{name}" for name in FILES)])
async def test_pages_may_do_little(path: str) -> None:
    response = await get(path)
    assert response.status_code == 200
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert (policy.get("require-trusted-types-for") == "'script'") == (path not in {"/docs", "/static/docs.html"})
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}.get(
        path.rpartition(".")[2], "text/html"
    )
    assert response.headers["content-type"] == f"{kind}; charset=utf-8"
    again = await get(path, headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await get(path, headers={"if-none-match": '"other"'})).content == response.content


@pytest.mark.parametrize("name", FILES)
def test_files_refer_to_nothing_outside_and_to_what_there_is(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert not re.search(
        r"\bon\w+=[\"']|<style|style=|javascript:|innerHTML|insertAdjacentHTML|\beval\(|https?://(?!www\.w3\.org)",
        re.sub(r"https\?:.*", "", text),
    )
    assert not re.search(r"<script(?![^>]*\bsrc=)", text)
    for reference in re.findall(r"(?:src|href)=\"/static/([^\"]+)\"|from \"\./([^\"]+)\"", text):
        assert "".join(reference) in FILES


@pytest.mark.parametrize(
    "path", ["/static/none.js", "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py"]
)
async def test_nothing_else_is_there(path: str) -> None:
    response = await get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


async def test_tensors_as_inspect_has_them(tmp_path: Path) -> None:
    overrides = {"*.mlp.gate": (8, 64), "*.1.mlp.switch_mlp.*": (3, 32), "*.q_proj": None}
    path = write_checkpoint(tmp_path / "model", "qwen3_next", overrides=overrides)
    engine = FakeEngine(ready=msgspec.structs.replace(FAKE_READY, model=describe(load(path))))
    async with connect(engine) as client:
        found = (await client.get("/v1/models/org%2Ftiny/tensors")).json()
        assert (await client.get("/v1/models/org/tiny/tensors")).json() == found
        assert error_of(await client.get("/v1/models/other/tensors"))["code"] == "model_not_found"
        engine.state = EngineState.LOADING
        refused = await client.get("/v1/models/tiny/tensors")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "model_loading")
    report = json.loads(json.dumps(inspect_model(path, available=0).as_json()))
    for name in ("model_type", "layers", "experts", "parameters", "size", "token_bytes", "bits_per_weight", "classes"):
        assert found[name] == report[name], name
    assert found["id"] == "org/tiny"
    routers = [each for each in found["classes"] if each["role"] == "router"]
    assert [(each["bits"], each["layers"]) for each in routers] == [(8, [0, 1, 2, 3])]


def test_a_real_worker_tells_of_its_model(tiny_server: RunningServer, tiny_checkpoint: Path) -> None:
    with tiny_server.client() as client:
        found = client.get("/v1/models/tiny-llama/tensors").json()
    expected = inspect_model(tiny_checkpoint, available=0).classes
    assert found["classes"] == json.loads(msgspec.json.encode(expected))
    assert {(each["role"], each["bits"]) for each in found["classes"]} >= {("mlp down", 8), ("mlp gate/up", 4)}
    assert (found["backend"], found["context_length"]) == ("cpu", 4096)


async def test_the_document_tells_of_the_key() -> None:
    document = (await get("/openapi.json")).json()
    (scheme,) = document["components"]["securitySchemes"].items()
    assert (scheme[0], scheme[1]["type"], scheme[1]["scheme"]) == ("key", "http", "bearer")
    open_ones = {path for path, item in document["paths"].items() for each in item.values() if not each.get("security")}
    assert open_ones == {"/health"}
    assert all(each.get("summary") for item in document["paths"].values() for each in item.values())
