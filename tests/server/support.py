"""The application over a fake engine, and readers of what it answers."""

from __future__ import annotations

import json
from typing import Any

import httpx

from mixbit.server.app import create_app
from mixbit.server.model import ServedModel
from mixbit.server.presets import FillInMiddle, SamplingDefaults
from mixbit.server.service import Service, Services
from mixbit.server.settings import LOOPBACK_HOSTS, Access
from mixbit.server.templates import ChatTemplate
from tests.fakes import FakeEngine

TEMPLATE = (
    "{% if tools %}[tools {{ tools | tojson }}]{% endif %}"
    "{% for message in messages %}"
    "{% if message.content == 'refuse me' %}{{ raise_exception('I will not read this') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}</>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LOCAL = Access(hosts=LOOPBACK_HOSTS)
HELLO = [{"role": "user", "content": "hi"}]


def served_model(
    template: str | None = TEMPLATE,
    defaults: SamplingDefaults | None = None,
    fim: FillInMiddle | None = None,
) -> ServedModel:
    return ServedModel(
        names=("org/tiny", "tiny"),
        created=1700000000,
        defaults=defaults or SamplingDefaults(),
        template=None if template is None else ChatTemplate({"default": template}, {"bos_token": "<s>"}),
        template_problem="the model has no chat template",
        fim=fim,
        quantization="4-bit",
    )


def connect(engine: FakeEngine, model: ServedModel | None = None, access: Access = LOCAL) -> httpx.AsyncClient:
    """A client whose requests go straight into the application."""
    app = create_app(Services((Service(engine, model or served_model()),)), access)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080")


def events(text: str) -> list[Any]:
    """The events of a stream: parsed JSON, and "[DONE]". Comments are left out."""
    assert text.endswith("\n\n")
    blocks = [block for block in text.split("\n\n")[:-1] if not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [data if (data := block[6:]) == "[DONE]" else json.loads(data) for block in blocks]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, checked for its form."""
    body = response.json()
    assert list(body) == ["error"], body
    error: dict[str, Any] = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error
