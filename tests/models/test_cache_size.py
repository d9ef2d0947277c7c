"""From which length on a method's cache takes no more than its host's."""

import pytest

import kvtrain
from kvtrain.models.cache_size import break_even, cache_bytes, kv_bytes_per_token
from tests.hosts import make_host


@pytest.mark.parametrize("method", [kvtrain.DMC(compression=4.0), kvtrain.Full(kv_bits=8)])
def test_from_its_break_even_on_a_row_never_takes_more(method):
    config = make_host(layers=3).config
    per_token = kv_bytes_per_token(config)
    more = [tokens for tokens in range(1, 1500) if cache_bytes(config, method, tokens) > per_token * tokens]
    assert more and break_even(config, method, 4096) == more[-1] + 1
    assert break_even(config, method, more[-1]) is None


def test_a_full_cache_in_pages_never_breaks_even():
    config = make_host(layers=3).config
    assert break_even(config, kvtrain.Full(), 2048) is None
    assert cache_bytes(config, kvtrain.Full(), 2048) > 2048 * kv_bytes_per_token(config)
