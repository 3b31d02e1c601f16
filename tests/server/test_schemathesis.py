"""What the OpenAPI schema says may be sent, made up by schemathesis: no answer is a fault of the server's."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from .conftest import KEY, Server

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install '.[clients]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

EXAMPLES = 60  # of each operation
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


def test_no_answer_is_a_fault_of_the_servers(chat_server: Server) -> None:
    described = schemathesis.openapi.from_url(f"{chat_server.url}/openapi.json", headers=AUTHORIZED)
    operations = [found.ok() for found in described.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"} <= {o.path for o in operations}
    statuses: set[int] = set()
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def answered(case: Any) -> None:
            answer = case.call(headers=AUTHORIZED, timeout=60)
            statuses.add(answer.status_code)
            assert answer.status_code < 500, answer.text

        answered()
    assert {200, 400} <= statuses
