"""Layers of a host that slide stay as they are: windows of real bytes, beside whatever a method does."""

import pytest
import torch

import kvtrain
from kvtrain.models.cache_size import cache_bytes, host_kv_bytes
from kvtrain.models.duo.gates import pattern_of
from kvtrain.models.sliding import SlidingAttention
from tests.hosts import SLIDING, dmc_at_rate, make_host, random_ids, whole_attention

WINDOW, LENGTH = 6, 50  # windows are crossed many times
WHOLE = {"mistral": {}, "mixtral": {}, "qwen3_moe": {"use_sliding_window": True}}  # families of which all layers slide
LAYERS = 4


def packed():
    """Documents longer and shorter than the window, and padding."""
    return torch.tensor([[1] * 23 + [2] * 4 + [3] * 20 + [0] * 3, [1] * 5 + [2] * 45])


def read_alone(model, ids, documents):
    """Logits of every document read alone."""
    logits = torch.zeros(*ids.shape, model.config.vocab_size, dtype=torch.float64)
    for row in range(len(ids)):
        for document in documents[row].unique():
            there = documents[row] == document
            logits[row, there] = model(ids[row, there][None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("family", WHOLE)
def test_families_of_which_all_layers_slide_are_served_in_windows(family):
    host = make_host(family, dtype=torch.float32, sliding_window=WINDOW, **WHOLE[family])
    model, ids = kvtrain.retrofit(host, kvtrain.Full()), random_ids(2, LENGTH)
    with torch.no_grad():
        expected = host(ids).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-5, rtol=1e-4)
        cache = model.make_cache()
        chunks = [model(part, past_key_values=cache).logits for part in ids.split([19, 1, 17, 1, 1, 11], 1)]
    torch.testing.assert_close(torch.cat(chunks, 1), expected, atol=2e-5, rtol=1e-4)
    assert all(bool((layer.kv_tokens() == WINDOW).all()) for layer in cache.layers)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids[:, :9], **options), host.generate(ids[:, :9], **options))
    with pytest.raises(ValueError, match=r"sees a window of 6 tokens.*sliding_window=None.*Full"):
        kvtrain.retrofit(host, kvtrain.DMC())


@pytest.mark.parametrize("family", SLIDING)
def test_documents_are_texts_of_their_own(family):
    """Forward; what a token's loss asks of embeddings of other documents is nothing."""
    model, ids, documents = (
        kvtrain.retrofit(make_host(family, layers=LAYERS), kvtrain.Full()),
        random_ids(2, 50),
        packed(),
    )
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, document_ids=documents, use_cache=False).logits
    real = documents > 0
    torch.testing.assert_close(logits[real], read_alone(model, ids, documents)[real], atol=1e-11, rtol=0)
    (grad,) = torch.autograd.grad(logits[0, 26].sum(), embedded)
    assert bool((grad[0, documents[0] != 2] == 0).all()) and bool((grad[0, documents[0] == 2] != 0).any(-1).all())


@pytest.mark.parametrize("family", SLIDING)
def test_a_row_takes_its_windows_and_what_the_method_keeps(family):
    """Bytes: no more than a window and a page in heads of sliding layers, all or what DMC keeps in the others."""
    host, ids = make_host(family, layers=LAYERS), random_ids(1, 200)
    for model in (kvtrain.retrofit(host, kvtrain.Full()), dmc_at_rate(host, 0.7, ids[:, :60], page_size=4, window=5)):
        cache = model.make_cache(page_size=4)
        with torch.no_grad():
            for part in ids.split(40, 1):
                model(part, past_key_values=cache)
        heads, dim, itemsize = 2, 8, 8
        for layer, held in enumerate(cache.layers):
            slides = isinstance(model.model.layers[layer].self_attn, SlidingAttention)
            assert slides == (layer % 2 == 0)
            if not slides:
                continue
            assert held.kv_tokens().tolist() == [[WINDOW] * heads]
            assert held.kv_bytes() <= heads * (WINDOW + 4) * 2 * dim * itemsize + 512  # the table beside it
        kept = torch.stack([held.kv_tokens() for held in cache.layers[1::2]]).double()
        assert kept.min() == 200 if model.method == kvtrain.Full() else kept.mean() < 120


@torch.no_grad()
def test_gemmas_shape_holds_what_the_closed_form_says():
    """Five windows of 512 tokens to one layer in which DMC keeps a part of 8,192, within a page a head."""
    kinds, page, tokens, window, dim = ["sliding_attention"] * 5 + ["full_attention"], 16, 8192, 512, 8
    host = make_host("gemma3_sliding", layers=6, dtype=torch.float32, layer_types=kinds, sliding_window=window)
    ids = random_ids(1, tokens)
    model = dmc_at_rate(host, 0.75, ids[:, 4096:5120], page_size=page, window=12)
    cache = model.make_cache()
    for part in ids.split(1024, 1):
        model(part, past_key_values=cache)
    slot, page_table = 2 * dim * 4, 8
    for layer, held in enumerate(cache.layers):
        kept = held.kv_tokens().squeeze(0)
        assert bool((kept == window).all()) if layer < 5 else kept.double().mean() < tokens / 2
        pages = sum(-(-int(slots) // page) + 1 for slots in kept)  # one more that is free or open
        assert kept.sum() * slot <= held.kv_bytes() <= pages * (page * slot + page_table) + 8192


def test_estimates_count_windows():
    config = make_host("qwen2_sliding", layers=LAYERS).config
    token = 2 * 2 * 8 * 2  # keys and values of two heads of eight channels
    assert host_kv_bytes(config, 5) == 5 * LAYERS * token
    assert host_kv_bytes(config, 1000) == 2 * (1000 + WINDOW) * token
    full, dmc = (cache_bytes(config, method, 4096) for method in (kvtrain.Full(), kvtrain.DMC(compression=4.0)))
    assert 2 * 4096 * token < full < 2 * (4096 + 64) * token * 1.03
    assert 2 * 1024 * token < dmc < 2 * (1024 + 64) * token * 1.03


def test_gates_are_of_layers_that_see_everything():
    host, ids = make_host("qwen2_sliding", layers=LAYERS), random_ids(2, 40)
    model = kvtrain.retrofit(host, kvtrain.Duo(sink=2, recent=5, page_size=4))
    assert len([name for name, _ in model.named_parameters() if name.endswith("gates")]) == 2
    with torch.no_grad():
        for attention, gates in zip(whole_attention(model), ([1.0, 0.0], [0.0, 1.0]), strict=True):
            attention.gates.copy_(torch.tensor(gates))
        trained = model(ids, use_cache=False).logits
        served = model.binarize(0.5)
        assert served.method.full_heads == ((), (0,), (), (1,))
        assert pattern_of(served.method.full_heads, 2).sum() == 2
        torch.testing.assert_close(served(ids, use_cache=False).logits, trained, atol=1e-11, rtol=0)
        torch.testing.assert_close(served(ids).logits, trained, atol=1e-11, rtol=0)
    with pytest.raises(ValueError, match="it slides in the host"):
        kvtrain.retrofit(host, kvtrain.Duo(full_heads=((0,), (0,), (), (1,))))


def test_maps_say_which_layers_slide():
    host, ids = make_host("qwen2_sliding", layers=LAYERS), random_ids(2, 40)
    with pytest.raises(ValueError, match=r"'0s_1_2s_3' with sliding_window=6"):
        kvtrain.retrofit(host, kvtrain.LCKV(kv_map="0_1_2_3"))
    with torch.no_grad():
        same = kvtrain.retrofit(host, kvtrain.LCKV(kv_map="0s_1_2s_3", sliding_window=WINDOW))
        expected = kvtrain.retrofit(host, kvtrain.Full())(ids, use_cache=False).logits
        for use_cache in (False, True):
            torch.testing.assert_close(same(ids, use_cache=use_cache).logits, expected, atol=1e-11, rtol=0)
        shared = kvtrain.retrofit(host, kvtrain.LCKV(kv_map="0s_1_2s_1", sliding_window=WINDOW))
        torch.testing.assert_close(shared(ids).logits, shared(ids, use_cache=False).logits, atol=1e-11, rtol=0)


def test_windows_take_tokens_back():
    """Assisted decoding: what a guess has pushed out of a window comes back."""
    host, assistant = (make_host("qwen2_sliding", layers=LAYERS, dtype=torch.float32, seed=seed) for seed in (0, 1))
    model, helper = (kvtrain.retrofit(host, kvtrain.Full()) for host in (host, assistant))
    ids, options = random_ids(1, 30), {"max_new_tokens": 30, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=helper, **options), model.generate(ids, **options))
    cache = model.make_cache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"make_cache\(slack="):
        cache.rollback(torch.tensor([3]))
