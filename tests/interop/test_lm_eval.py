"""lm-eval's own model class around ours: the numbers that ``kvtrain eval`` gives, quantized caches included."""

import pytest
import torch
from torch.nn import functional

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.roads

TEXT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n" * 3


def lm_eval_loss(model, tokenizer):
    """Summed log-likelihood of the text, as lm-eval finds it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=512, device="cpu")
    request = Instance("loglikelihood_rolling", {}, (TEXT,), 0)
    return runner.loglikelihood_rolling([request], disable_tqdm=True)[0]


def own_loss(model, tokenizer, **told):
    """The same, from the model's logits; lm-eval begins with the end of another text."""
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        logits = model(ids, **told).logits[0, :-1].float()
    return -functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


@pytest.mark.parametrize(
    "method",
    [
        kvtrain.Full(),
        kvtrain.DMC(init_bias=0.0),
        kvtrain.LCKV(kv_map="cla2", init="mean"),
        kvtrain.Full(kv_bits=4),
    ],
    ids=["full", "dmc", "cla2", "full at 4 bits"],
)
def test_lm_eval_measures_the_served_form(method, capsys):
    tokenizer = load_tokenizer("kvtrain:tiny")
    model = kvtrain.retrofit(kvtrain.load("kvtrain:tiny", dtype=torch.float32), method).eval()
    found = lm_eval_loss(model, tokenizer)
    assert found == pytest.approx(own_loss(model, tokenizer), rel=1e-4)
    if method == kvtrain.Full(kv_bits=4):
        exact = own_loss(kvtrain.load("kvtrain:tiny", dtype=torch.float32), tokenizer)
        assert abs(found - exact) > 0.1
