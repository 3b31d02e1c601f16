"""What the OpenAPI schema says may be sent, made up by schemathesis: no answer is a fault of the server's."""

import pytest
from hypothesis import HealthCheck, settings

from .conftest import KEY, Server

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install '.[clients]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def described(chat_server: Server):
    return schemathesis.openapi.from_url(f"{chat_server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_answer_is_a_fault_of_the_servers(case) -> None:
    answer = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code < 500, answer.text
