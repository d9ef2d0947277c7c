"""What tests of every cache share."""

import pytest
import torch

from tests.caches import CACHES


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=list(CACHES))
def method(request):
    return request.param
