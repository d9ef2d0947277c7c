"""The heart: a hybrid's training form, its prefill in chunks and its decoding are one function, the one written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.models.attention import HostAttention
from kvtrain.models.full_attention import FullAttention
from kvtrain.models.hybrid.attention import LinearMixer
from tests.hosts import make_host, random_ids, with_random_mixers
from tests.models.chunks import run_chunks

EXACT = 1e-9  # float64


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


class Written(HostAttention):
    """A linear layer by its equation: one token after the other, one head after the other, every document anew."""

    def __init__(self, mixer):
        super().__init__(mixer, mixer.layer_idx)
        self.settings = mixer.settings

    def forward(self, hidden_states, position_embeddings, context, **_):
        elu = self.settings.features == "elu"
        documents = torch.ones(hidden_states.shape[:2]) if context.documents is None else context.documents.queries
        heads = [self.split_heads(part(hidden_states)) for part in (self.q_proj, self.k_proj, self.v_proj)]
        query, key = self.normalize(*heads[:2])
        if elu:
            query, key = (torch.where(part > 0, part + 1, part.exp()) for part in (query, key))
        cos, sin = (angles[:, None] for angles in position_embeddings)
        query, key = (part * cos + quarter_turn(part) * sin for part in (query, key))
        output = torch.zeros_like(query)
        for row, head in [(row, head) for row in range(len(query)) for head in range(self.num_heads)]:
            keep = 1.0
            if self.settings.decay == "lightning":
                keep = math.exp(-(2.0 ** (-8 * (head + 1) / self.num_heads)))
            for token, document in enumerate(documents[row].tolist()):
                if token == 0 or document != documents[row, token - 1]:
                    state = torch.zeros(self.head_dim, self.head_dim, dtype=query.dtype)
                shared = head // self.num_groups
                state = keep * state + torch.outer(key[row, shared, token], heads[2][row, shared, token])
                seen = self.scaling * query[row, head, token] @ state
                output[row, head, token] = seen / (seen.square().mean() + 1e-6).sqrt()
        output = output * self.mixer_norm.weight
        if self.settings.gate:
            output = output * torch.sigmoid(self.split_heads(self.mixer_gate(hidden_states)))
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


def quarter_turn(heads):
    left, right = heads.chunk(2, -1)
    return torch.cat([-right, left], -1)


def hybrid(family="llama", heads=4, kv_heads=2, layers=3, seed=0, **method):
    host = make_host(family, heads, kv_heads, layers=layers, seed=seed)
    return with_random_mixers(kvtrain.convert_linear(host, **{"page_size": 4, **method}))


def written_out(model):
    for layer in model.model.layers:
        if isinstance(layer.self_attn, LinearMixer):
            layer.self_attn = Written(layer.self_attn)
    return model


@settings(max_examples=8)
@given(st.data())
def test_forms_are_the_equation(data):
    """Packed rows against the equation; each document alone in any chunks, and one by one, against the packed row."""
    family = data.draw(st.sampled_from(["llama", "qwen3", "olmo2", "qwen2_sliding"]))
    groups, kv_heads = data.draw(st.sampled_from([(1, 4), (2, 2), (3, 1)]))
    method = {
        "features": data.draw(st.sampled_from(["none", "elu"])),
        "decay": data.draw(st.sampled_from(["lightning", "none"])),
        "gate": data.draw(st.booleans()),
    }
    shape, seed = (family, groups * kv_heads, kv_heads, 3), data.draw(st.integers(0, 99))
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    ids = random_ids(2, sum(lengths), seed)
    documents = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths)).expand(2, -1)
    model = hybrid(*shape, seed=seed, **method)
    packed = model(ids, document_ids=documents, use_cache=False).logits
    expected = written_out(hybrid(*shape, seed=seed, **method))(ids, document_ids=documents, use_cache=False).logits
    torch.testing.assert_close(packed, expected, atol=EXACT, rtol=0)
    for part, alone in zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True):
        cut = data.draw(st.integers(0, part.shape[1] - 1))
        sizes = [size for size in (cut, part.shape[1] - cut) if size]
        for logits, _ in (run_chunks(model, part, sizes), run_chunks(model, part, [1] * part.shape[1])):
            torch.testing.assert_close(logits, alone, atol=EXACT, rtol=0)


def test_padding_changes_nothing_on_either_side():
    model, ids = hybrid("qwen3"), random_ids(1, 17)
    alone = model(ids, use_cache=False).logits
    for before, after in ((5, 0), (0, 3)):
        padded = torch.nn.functional.pad(ids, (before, after))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (before, after))
        for use_cache in (False, True):
            logits = model(padded, attention_mask=mask, use_cache=use_cache).logits[:, before : before + 17]
            torch.testing.assert_close(logits, alone, atol=EXACT, rtol=0)


def test_linear_layers_take_constant_bytes():
    """And each of the others what a layer of the plain host takes."""
    model, plain = hybrid(layers=4), kvtrain.retrofit(make_host(layers=4), kvtrain.Full())
    taken = {}
    for length in (16, 32, 64):
        ids = random_ids(1, length)
        cache = model(ids, use_cache=True).past_key_values
        states = [cache.layers[layer].kv_bytes() for layer in (0, 2)]
        assert states == [4 * 8 * 8 * 8] * 2  # heads, channels squared, float64
        taken[length] = cache.kv_bytes() - sum(states)
    full = plain.make_cache(page_size=4)
    plain(random_ids(1, 64), past_key_values=full)
    assert taken[64] < 0.55 * full.kv_bytes() and taken[64] > 1.8 * taken[32] > 3.2 * taken[16]


@pytest.mark.parametrize(("asked", "linear"), [("half", [0, 2, 4]), ([3, 1], [1, 3])])
def test_layers_are_those_asked_for(asked, linear):
    model = kvtrain.convert_linear(make_host(layers=5), asked)
    kinds = [type(layer.self_attn) for layer in model.model.layers]
    assert kinds == [LinearMixer if layer in linear else FullAttention for layer in range(5)]


def test_new_weights_leave_those_that_are_there(tmp_path):
    """What is saved comes back, trained norms and gates as they were."""
    model, ids = hybrid("qwen3"), random_ids(2, 11)
    model.save_pretrained(tmp_path)
    found = kvtrain.load(str(tmp_path), dtype=torch.float64)
    assert found.method == model.method
    assert torch.equal(found(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": [0, 3]}, "names layer 3; the host has layers 0 to 2"),
        ({"layers": []}, "must name one layer or more"),
        ({"layers": [1, 1]}, "must name one layer or more, each once"),
        ({"layers": "most"}, "a list of layers or 'half'"),
        ({"features": "relu"}, "features must be none or elu"),
        ({"page_size": 0}, "page_size must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        kvtrain.convert_linear(make_host(layers=3), **settings)


def test_sliding_layers_are_not_converted():
    with pytest.raises(ValueError, match="sees a window of 6 tokens in the host and is of constant size already"):
        kvtrain.convert_linear(make_host("qwen2_sliding", layers=4), layers=[0])


def test_a_state_takes_nothing_back():
    model = hybrid()
    cache = model(random_ids(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use snapshot_row and restore_row"):
        cache.rollback(1)
