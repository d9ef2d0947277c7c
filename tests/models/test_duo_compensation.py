"""The token that stands for all that a window has dropped: its definition, and its forms against each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.kernels import compensation
from kvtrain.kernels.attention import attention
from kvtrain.kernels.compensation import add_compensation, dropped_by_window
from kvtrain.kernels.documents import Documents
from kvtrain.models.context import document_positions
from kvtrain.models.duo.attention import DuoStep
from tests.hosts import make_host, random_ids

PROPERTY = settings(max_examples=20)
TOLERANCE = 1e-9  # float64


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def heads_of(seed, rows, kv_heads, groups, length, dim=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, kv_heads * groups, length, dim), *[(rows, kv_heads, length, dim)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def spread_documents(seed, rows, length):
    """Ids ``(B, T)`` in runs of random length."""
    changes = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.12
    return changes.long().cumsum(1)


def definition(query, key, value, window, sink, documents=None):
    """Query by query, with the weights as they are published: ``N exp(q k) v`` beside ``exp(q k) v`` of each."""
    rows, heads, length, dim = query.shape
    groups, output = heads // key.shape[1], torch.zeros(query.shape, dtype=query.dtype)
    places = torch.arange(length).expand(rows, -1) if documents is None else document_positions(documents)
    for row in range(rows):
        for at in range(length):
            own = [j for j in range(at + 1) if documents is None or documents[row, j] == documents[row, at]]
            gone = [j for j in own if places[row, j] >= sink and at - j >= window]
            seen = [j for j in own if j not in gone]
            for head in range(heads):
                keys, values = key[row, head // groups], value[row, head // groups]
                weights = (keys[seen] @ query[row, head, at] / dim**0.5).exp()
                mass, total = weights @ values[seen], weights.sum()
                if gone:
                    weight = len(gone) * (keys[gone].mean(0) @ query[row, head, at] / dim**0.5).exp()
                    mass, total = mass + weight * values[gone].mean(0), total + weight
                output[row, head, at] = mass / total
    return output


def compensated(query, key, value, window, sink, documents=None):
    """The parallel form, from kernels alone."""
    positions = None if documents is None else document_positions(documents)
    hidden = {"sink": sink} if documents is None else {"sinks": positions < sink}
    local = attention(query, key, value, window=window, documents=Documents.of(documents), **hidden)
    told = {"position_ids": positions, "documents": Documents.of(documents)}
    dropped = dropped_by_window(key, value, window=window, sink=sink, **told)
    return add_compensation(local, query, dropped, query.shape[-1] ** -0.5)


@PROPERTY
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 24),
    st.integers(1, 9),
    st.integers(0, 4),
    st.booleans(),
)
def test_the_parallel_form_is_the_published_formula(seed, kv_heads, groups, length, window, sink, packed):
    tensors = heads_of(seed, 2, kv_heads, groups, length)
    documents = spread_documents(seed, 2, length) if packed else None
    output, _ = compensated(*tensors, window, sink, documents)
    close(output, definition(*tensors, window, sink, documents))


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_a_key_with_the_logarithm_of_the_number_as_bias(packed):
    """Of the last query: ordinary attention over what it sees and one biased key, log-sum-exp included."""
    query, key, value = heads_of(1, 1, 2, 2, 30)
    documents = torch.tensor([[3] * 11 + [4] * 19]) if packed else None
    output, lse = compensated(query, key, value, 5, 3, documents)
    start = 11 if packed else 0
    gone, seen = range(start + 3, 25), [*range(start, start + 3), *range(25, 30)]
    keys, values = (torch.cat([t[:, :, seen], t[:, :, gone].mean(2, keepdim=True)], 2) for t in (key, value))
    bias = torch.zeros(1, 2, len(seen) + 1, dtype=torch.float64)
    bias[..., -1] = math.log(len(gone))
    expected, expected_lse = attention(query[:, :, -1:], keys, values, key_bias=bias, causal=False)
    close(output[:, :, -1:], expected)
    close(lse[:, :, -1:], expected_lse)


def test_equal_keys_lose_nothing_and_others_are_never_overrated():
    """Where dropped keys are equal it is full attention; else their mass is at most the true one (Jensen)."""
    query, key, value = heads_of(2, 2, 2, 2, 26)
    _, full = attention(query, key, value)
    _, lse = compensated(query, key, value, 4, 2)
    assert (lse <= full + TOLERANCE).all() and (lse < full - 1e-3).any()
    torch.testing.assert_close(lse[:, :, :7], full[:, :, :7], atol=1e-12, rtol=0)  # one key is its own mean
    key[:, :, 2:22] = key[:, :, 2:3]
    expected, full = attention(query[:, :, -1:], key, value)
    output, lse = compensated(query, key, value, 4, 2)
    close(output[:, :, -1:], expected)
    close(lse[:, :, -1:], full)


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 8), st.integers(0, 4), st.booleans())
def test_running_means_are_batch_means(seed, length, window, sink, packed):
    """Also ``mean <- (N mean + k) / (N + 1)``, one token after the other."""
    _, key, value = heads_of(seed, 2, 2, 1, length)
    documents = spread_documents(seed, 2, length) if packed else torch.zeros(2, length, dtype=torch.long)
    places = document_positions(documents)
    told = {"position_ids": places, "documents": Documents(documents)} if packed else {}
    dropped = dropped_by_window(key, value, window=window, sink=sink, **told)
    number = dropped.number.expand(2, -1)
    for row in range(2):
        for at in range(length):
            gone = [j for j in range(at + 1) if documents[row, j] == documents[row, at] and at - j >= window]
            gone = [j for j in gone if places[row, j] >= sink]
            assert number[row, at] == len(gone)
            if not gone:
                assert dropped.keys[row, :, at].abs().max() < 1e-12
                continue
            mean = torch.zeros(2, 4, dtype=torch.float64)
            for count, j in enumerate(gone):
                mean = (count * mean + value[row, :, j]) / (count + 1)
            close(dropped.values[row, :, at] / len(gone), mean)
            close(dropped.keys[row, :, at] / len(gone), key[row, :, gone].mean(1))


def test_a_short_document_at_the_end_of_a_long_row_keeps_its_digits():
    """Sums over the row are taken apart in float64; in float32 a part in a thousand would be lost."""
    key = torch.randn(1, 1, 20_016, 4) + 50
    documents = torch.tensor([[0] * 20_000 + [1] * 16])
    told = {"position_ids": document_positions(documents), "documents": Documents(documents)}
    dropped = dropped_by_window(key, key, window=12, sink=3, **told)
    assert dropped.keys.dtype == torch.float32 and dropped.number[0, -1] == 1
    torch.testing.assert_close(dropped.keys[:, :, -1], key[:, :, -13], atol=1e-5, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_definition(packed):
    tensors = [tensor.requires_grad_() for tensor in heads_of(4, 1, 2, 2, 14)]
    documents = torch.tensor([[0] * 4 + [1] * 10]) if packed else None
    weights = torch.randn(1, 4, 14, 4, dtype=torch.float64)
    found = torch.autograd.grad((compensated(*tensors, 3, 1, documents)[0] * weights).sum(), tensors)
    expected = torch.autograd.grad((definition(*tensors, 3, 1, documents) * weights).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_half_precision_is_rounded_once():
    tensors = heads_of(5, 2, 2, 2, 40)
    halves = [tensor.bfloat16() for tensor in tensors]
    expected, _ = compensated(*[half.double() for half in halves], 6, 2)
    output, lse = compensated(*halves, 6, 2)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert dropped_by_window(*halves[1:], window=6, sink=2).keys.dtype == torch.float32
    assert (output.double() - expected).abs().max() < 0.02


def make(full_heads, family="llama", heads=4, kv_heads=2, sink=2, recent=5, page_size=3, **host):
    method = kvtrain.Duo(sink=sink, recent=recent, compensation=True, full_heads=full_heads, page_size=page_size)
    host = make_host(family, heads=heads, kv_heads=kv_heads, layers=len(full_heads), **host)
    return kvtrain.retrofit(host, method)


def fed(model, ids, sizes, mask=None, **options):
    """Logits of chunks of these sizes through one cache, and the cache."""
    cache, logits, begin = model.make_cache(**options), [], 0
    for size in sizes:
        end = begin + size
        told = None if mask is None else mask[:, :end]
        logits.append(model(ids[:, begin:end], attention_mask=told, past_key_values=cache).logits)
        begin = end
    return torch.cat(logits, 1), cache


def counts_drawn(data, length):
    sizes = []
    while sum(sizes) < length:
        sizes.append(data.draw(st.integers(1, length - sum(sizes))))
    return sizes


@PROPERTY
@given(st.data())
def test_any_chunks_are_the_parallel_form(data):
    """Heads, groups, windows, pages, chunks and padding of any kind; layers of any mixture of heads."""
    kv_heads = data.draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * data.draw(st.sampled_from([1, 2])) if kv_heads < 4 else 4
    full_heads = [data.draw(st.sets(st.integers(0, kv_heads - 1))) for _ in range(2)]
    sink, recent = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 8))
    family = data.draw(st.sampled_from(["llama", "qwen2", "qwen3", "olmo2"]))
    model = make(
        [sorted(full) for full in full_heads],
        family,
        heads,
        kv_heads,
        sink,
        recent,
        page_size=data.draw(st.integers(1, 9)),
        seed=data.draw(st.integers(0, 99)),
    )
    length = data.draw(st.integers(1, 30))
    ids = random_ids(2, length, data.draw(st.integers(0, 99)))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for sizes in ([1] * length, counts_drawn(data, length)):
            logits, cache = fed(model, ids, sizes)
            close(logits, expected)
            assert cache.tokens.tolist() == [length] * 2
        width = length + 6
        places = [sorted(data.draw(st.permutations(range(width)))[:count]) for count in (length, (length + 1) // 2)]
        mask, padded = torch.zeros(2, width, dtype=torch.long), torch.full((2, width), 7)
        for row, columns in enumerate(places):
            mask[row, columns] = 1
            padded[row, columns] = ids[row, : len(columns)]
        logits, _ = fed(model, padded, counts_drawn(data, width), mask)
        for row, columns in enumerate(places):
            close(logits[row, columns], expected[row, : len(columns)])


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_packed_documents_are_documents_alone(kv_heads):
    """And left padding is none, without a cache; the compensation token is there and does something."""
    model = make([[0], []], kv_heads=kv_heads)
    ids, documents = random_ids(1, 40), torch.tensor([[0] * 13 + [2] * 4 + [3] * 23])
    with torch.no_grad():
        packed = model(ids, document_ids=documents, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in ids.split([13, 4, 23], 1)]
        close(packed, torch.cat(alone, 1))
        mask = torch.ones(1, 40, dtype=torch.long)
        mask[0, :17] = 0
        close(model(ids, attention_mask=mask, use_cache=False).logits[:, 17:], alone[2])
        plain = kvtrain.retrofit(make_host(kv_heads=kv_heads), kvtrain.Duo(sink=2, recent=5, full_heads=[[0], []]))
        without = plain(ids[:, 17:], use_cache=False).logits
    assert (without - alone[2])[:, 7:].abs().amax(-1).min() > 1e-4
    torch.testing.assert_close(without[:, :7], alone[2][:, :7], atol=1e-12, rtol=0)


def test_layers_share_what_follows_from_documents(monkeypatch):
    """Who drops what is found once a pass, and for the next pass again."""
    found, find = [], compensation._dropping
    monkeypatch.setattr(compensation, "_dropping", lambda *args: found.append(1) or find(*args))
    model, documents = make([[0], [], []]), torch.tensor([[0] * 5 + [1] * 7])
    for _ in range(2):
        model(random_ids(1, 12), document_ids=documents, position_ids=torch.arange(12)[None], use_cache=False)
    assert found == [1, 1]


@pytest.mark.parametrize("rows", ["one document", "packed"])
def test_gates_mix_the_compensated_side_with_everything(rows):
    """Closed gates are the rounded model, open ones the host; between them outputs of a layer are mixed."""
    host, method = make_host(layers=1, heads=4, kv_heads=2), kvtrain.Duo(sink=2, recent=4, compensation=True)
    ids, told = random_ids(2, 25), {"use_cache": False}
    if rows == "packed":
        told["document_ids"] = torch.tensor([[0] * 9 + [1] * 16, [4] * 25])
    gated = kvtrain.retrofit(host, method)

    def attended(*gates):
        step = DuoStep(gates={0: torch.tensor(gates)})
        seen = []
        hook = gated.model.layers[0].self_attn.register_forward_hook(lambda *event: seen.append(event[2][0]))
        logits = gated(ids, step=step, **told).logits
        hook.remove()
        return logits, seen[0]

    with torch.no_grad():
        close(attended(1.0, 1.0)[0], kvtrain.retrofit(host, kvtrain.Full())(ids, **told).logits)
        for full in ([], [1], [0]):
            rounded = kvtrain.retrofit(host, kvtrain.Duo(sink=2, recent=4, compensation=True, full_heads=[full]))
            close(attended(float(0 in full), float(1 in full))[0], rounded(ids, **told).logits)
        closed, first, second = (attended(*gates)[1] for gates in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
        close(attended(0.25, 0.625)[1], closed + 0.25 * (first - closed) + 0.625 * (second - closed))


def test_teacher_mixing_keeps_float64_and_its_gradient():
    model = kvtrain.retrofit(make_host(layers=1), kvtrain.Duo(sink=1, recent=3, mixing="teacher", compensation=True))
    ids, record = random_ids(1, 16), {}
    model(ids, use_cache=False, step=DuoStep(full_attention=True), outputs=record)
    gates = model.model.layers[0].self_attn.gates

    def logits(value):
        with torch.no_grad():
            gates.fill_(value)
        return model(ids, use_cache=False, step=DuoStep(teacher=record)).logits

    plain = kvtrain.retrofit(make_host(layers=1), kvtrain.Duo(sink=1, recent=3, compensation=True))
    with torch.no_grad():
        plain.model.layers[0].self_attn.gates.fill_(0.5)
        close(logits(0.5), plain(ids, use_cache=False).logits)  # one layer: the student's own is the teacher's
    logits(0.5).sum().backward()
    slope = (logits(0.5 + 2**-12) - logits(0.5 - 2**-12)).sum() / 2**-11
    torch.testing.assert_close(gates.grad.sum().double(), slope.detach(), rtol=1e-4, atol=0)


def test_sums_live_in_the_cache_and_are_all_that_is_added():
    """Two wide vectors a streaming head; a layer without streaming heads pays nothing."""
    ids = random_ids(3, 20)
    model = make([[], [0], [0, 1]])
    with torch.no_grad():
        _, cache = fed(model, ids, [20])
        plain = kvtrain.retrofit(
            make_host(layers=3), kvtrain.Duo(sink=2, recent=5, full_heads=[[], [0], [0, 1]], page_size=3)
        )
        _, bare = fed(plain, ids, [20])
    assert [len(layer.stores) for layer in cache.layers] == [2, 2, 1]
    assert cache.kv_bytes() - bare.kv_bytes() == (2 + 1) * 3 * 2 * 8 * 8  # heads, rows, keys and values, D, float64
    half = kvtrain.retrofit(make_host(dtype=torch.bfloat16), model.method.rounded([[], []]))
    cache = half.make_cache()
    half(ids, past_key_values=cache)
    assert {cache.layers[0].sums[name].dtype for name in ("keys", "values")} == {torch.float32}


def test_rows_of_any_length_share_a_batch():
    """They join, change places, repeat, go back to a snapshot and leave, sums and all."""
    model, ids = make([[1], []]), random_ids(3, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        _, cache = fed(model, ids[:2], [19])
        _, other = fed(model, ids[2:], [6])
        cache.join(other)
        cache.reorder_cache(torch.tensor([2, 0, 1, 0]))
        rows, seen = torch.tensor([2, 0, 1, 0]), torch.tensor([6, 19, 19, 19])
        state = cache.snapshot_row(1)
        for _ in range(9):
            logits = model(ids[rows, seen][:, None], past_key_values=cache).logits
            close(logits[:, 0], expected[rows, seen])
            seen = seen + 1
        cache.restore_row(0, state)
        cache.free_rows([1, 3])
        rows, seen = torch.tensor([0, 1]), torch.tensor([19, 28])
        chunk = seen[:, None] + torch.arange(7)
        close(model(ids[rows[:, None], chunk], past_key_values=cache).logits, expected[rows[:, None], chunk])


def test_it_is_part_of_the_checkpoint(tmp_path):
    model, ids = make([[0], [1]]), random_ids(1, 20)
    model.save_pretrained(tmp_path)
    loaded = kvtrain.load(str(tmp_path), dtype=torch.float64)
    assert loaded.method.compensation
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_documents_need_positions():
    key = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="need position_ids"):
        dropped_by_window(key, key, window=2, documents=Documents(torch.zeros(1, 4, dtype=torch.long)))
