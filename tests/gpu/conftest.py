"""Where the tests of this folder run."""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU anywhere, so that bodies are known to work, and a GPU where there is one."""
    name: str = request.param
    return name
