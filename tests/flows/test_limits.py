from collections.abc import Iterator

import pytest
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.limits import create_limit
from flows.pipeline import _accelerator
from tests.flows.conftest import Server

pytestmark = pytest.mark.pipeline


@pytest.fixture(autouse=True)
def _settings(prefect_server: Server) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: prefect_server.url}):
        yield


def occupied(name: str) -> tuple[int, int]:
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(name)
    return limit.active_slots, limit.limit


def test_stages_that_run_a_model_take_a_slot() -> None:
    create_limit("accelerator", 2)
    create_limit("accelerator", 1)  # Deployed again, with another number.
    with _accelerator("evaluate@model-0.2", "accelerator"):
        assert occupied("accelerator") == (1, 1)
        with _accelerator("corpus", "accelerator"), _accelerator("evaluate@model-0.2", None):
            assert occupied("accelerator") == (1, 1)
    assert occupied("accelerator") == (0, 1)


def test_limit_that_was_never_created_is_an_error() -> None:
    with pytest.raises(ConcurrencySlotAcquisitionError), _accelerator("evaluate@model-0.2", "absent"):
        pytest.fail("The stage ran without a slot.")
