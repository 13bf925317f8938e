"""Our own OpenAPI document, held against the server by schemathesis: whatever fits the document, no 500."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

from mixbit.server.app import create_app
from mixbit.server.presets import FillInMiddle
from mixbit.server.service import Service, Services
from mixbit.server.settings import Access
from tests.fakes import FakeEngine, Reply
from tests.server.support import served_model

FIM = FillInMiddle(prefix="<P>", suffix="<S>", middle="<M>", file="<F>")
app = create_app(Services((Service(FakeEngine(Reply(["a", "b"])), served_model(fim=FIM)),)), Access())
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


@schema.parametrize()
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@pytest.mark.filterwarnings("default")
def test_nothing_that_fits_the_document_is_a_server_error(case: Any) -> None:
    response = case.call()
    case.validate_response(response, checks=[not_a_server_error])
    assert response.status_code != 500
