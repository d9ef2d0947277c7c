"""Weights quantized by torchao, the head's among them."""

import pytest
import torch
from torch.nn import functional

import kvtrain
from tests.hosts import make_host, random_ids

torchao = pytest.importorskip("torchao")
pytestmark = pytest.mark.roads


@pytest.mark.parametrize("method", [kvtrain.Full(), kvtrain.DMC(init_bias=0.0)], ids=lambda m: m.name)
def test_everything_quantized(method):
    """The loss is that of the model's own logits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = kvtrain.retrofit(make_host(dtype=torch.float32), method)
    exact = model(random_ids(2, 12)).logits
    quantize_(model, Int8WeightOnlyConfig())
    ids = random_ids(2, 12)
    with torch.no_grad():
        output = model(ids, labels=ids)
        logits = model(ids).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    assert 0 < (logits - exact).abs().max() < 1.0
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 16)


def test_a_quantized_host_is_retrofitted():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    host, ids = make_host(dtype=torch.float32), random_ids(2, 12)
    quantize_(host, Int8WeightOnlyConfig())
    with torch.no_grad():
        expected = host(ids).logits
        torch.testing.assert_close(kvtrain.retrofit(host, kvtrain.Full())(ids).logits, expected, atol=1e-4, rtol=1e-4)
