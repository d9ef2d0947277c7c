"""What tests of every cache share."""

import pytest
import torch

from tests.caches import CACHES, SOME_CACHES
from tests.thinning import thinned


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=thinned(CACHES, SOME_CACHES))
def method(request):
    return request.param
