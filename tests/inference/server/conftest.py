"""One server for the tests of a file that share it."""

import pytest

from tests.inference.server.servers import model_of, serve, tokenizer_with, until


@pytest.fixture(scope="module")
def served():
    with serve(model_of("dmc"), tokenizer_with()) as served:
        yield served


@pytest.fixture
def client(served):
    """The official client; what a test leaves behind fails it."""
    with served.client() as client:
        yield client
    until(lambda: served.engine.stats().running == served.engine.stats().queued == 0)
