"""What every supported version of transformers must get right; `make test-versions` runs this under all of them."""

import pytest
import torch

import kvtrain
from kvtrain.models.compat import CACHE, NEWEST_TESTED, OLDEST_TESTED
from tests.caches import CACHES
from tests.hosts import make_host, random_ids

NAMES = ["full", "dmc", "lckv", "duo", "transnormer_t2"]


@pytest.fixture(params=NAMES)
def model(request):
    entry = CACHES[request.param]
    host = make_host(layers=entry.layers)
    if request.param == "dmc":  # about half of the tokens merge; the folder says so, too
        return kvtrain.retrofit(host, kvtrain.DMC(init_bias=0.0, page_size=4, window=5))
    return entry.retrofit(host)


def test_chunks_are_the_parallel_form(model):
    ids, cache = random_ids(2, 13), model.make_cache()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-9, rtol=0)
    assert cache.tokens.tolist() == [13, 13]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5, "num_return_sequences": 2}])
def test_generating_with_the_cache_is_generating_without(model, options):
    """The cache comes by itself, and holds what it should."""
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(
            model.generate(ids, attention_mask=mask, use_cache=use_cache, return_dict_in_generate=True, **asked)
        )
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    rows, cache = len(texts[0].sequences), texts[0][CACHE]
    if "num_beams" not in options:
        each = rows // 2
        assert cache.tokens.tolist() == [12] * each + [9] * each
        again = model.make_cache()
        model(texts[0].sequences[:1, :12], past_key_values=again)
        assert torch.equal(cache.kv_tokens()[:, :1], again.kv_tokens())


def test_a_folder_opens_again(model, tmp_path):
    model = model.float()
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 12)
    opened = kvtrain.load(str(tmp_path), dtype=torch.float32)
    torch.testing.assert_close(opened(ids).logits, model(ids).logits)


def test_a_step_of_training(model):
    """Checkpointed activations change nothing; the loss goes down."""
    ids = random_ids(2, 20)
    model.train()
    if hasattr(model.config, "hidden_dropout"):
        model.config.hidden_dropout = 0.0
        for module in model.modules():
            module.dropout = 0.0
    losses = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append((loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-12)
    for one, other in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert model(ids, labels=ids).loss.item() < losses[0][0]


def test_this_version_is_between_the_tested_ones():
    import transformers
    from packaging.version import Version

    found = Version(transformers.__version__).release[:2]
    assert Version(OLDEST_TESTED).release <= found
    if found > Version(NEWEST_TESTED).release:
        pytest.skip(f"newer than any tested version: {transformers.__version__}")
